"""Any images are put in order; bad files are named and the others ranked; the order does not depend on the batch."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import sampling.rerank
from sampling.pipeline import Pipeline
from sampling.rerank import ImageRanker, main
from tessera.data.images import save_png
from tessera.errors import run_command
from tessera.model_folder import ModelFolder


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Six pictures of several sizes."""
    paths = []
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (16 + number, 24, 3), dtype=np.uint8)
        path = tmp_path / f"{number}.png"
        save_png(path, pixels, {})
        paths.append(str(path))
    return paths


def ranked_paths(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [json.loads(line)["path"] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("scorer", ["clip", "likelihood", "combined"])
def test_files_come_best_first(
    model_folder: Path, images: list[str], capsys: pytest.CaptureFixture[str], scorer: str
) -> None:
    assert main([str(model_folder), "a red star", *images, "--scorer", scorer, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["rank"] for line in lines] == list(range(6))
    assert {line["path"] for line in lines} == set(images)
    scores = [line["scores"][scorer] for line in lines]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1


def test_the_order_given_and_the_batch_size_do_not_matter(
    model_folder: Path, images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker = ImageRanker(ModelFolder.open(model_folder))
    expected, _ = ranker.rank_files(images, "a red star")
    monkeypatch.setattr(sampling.rerank, "_AT_ONCE", 2)
    actual, _ = ranker.rank_files(images[::-1], "a red star")
    assert [image.path for image in actual] == [image.path for image in expected]
    for first, second in zip(actual, expected, strict=True):
        assert first.scores == pytest.approx(second.scores, abs=1e-5)


def test_a_generated_image_gets_the_score_that_it_was_ranked_by(
    model_folder: Path, pipeline: Pipeline, tmp_path: Path
) -> None:
    best = pipeline("a red star", n=3, seed=5)
    paths = []
    for image in best:
        path = tmp_path / f"{image.image_index}.png"
        save_png(path, image.image, {})
        paths.append(str(path))
    ranked, _ = ImageRanker(ModelFolder.open(model_folder)).rank_files(sorted(paths), "a red star")
    assert [image.path for image in ranked] == paths
    assert [image.scores["clip"] for image in ranked] == pytest.approx([i.scores["clip"] for i in best], abs=1e-4)


def test_ties_keep_the_order_given_and_nan_comes_last(model_folder: Path, images: list[str]) -> None:
    ranker = ImageRanker(ModelFolder.open(model_folder))

    class Fixed:
        name = "fixed"

        def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
            return torch.tensor([0.5, math.nan, 0.5, 0.9, -math.inf, 0.5])

    ranker.scorer = Fixed()
    ranked, _ = ranker.rank_files(images, "a red star")
    assert [Path(image.path).stem for image in ranked] == ["3", "0", "2", "5", "4", "1"]


def test_bad_files_are_named_and_the_others_ranked(
    model_folder: Path, images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(images[0]).read_bytes()[:100])
    missing = str(tmp_path / "missing.png")
    given = [images[0], str(broken), images[1], missing]
    assert main([str(model_folder), "a red star", *given]) == 0
    output = capsys.readouterr()
    assert images[0] in output.out and images[1] in output.out and "broken" not in output.out
    assert [line.split(":")[0] for line in output.err.splitlines()] == [f"skipped {broken}", f"skipped {missing}"]
    main([str(model_folder), "a red star", *given, "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["path"] for line in lines if "error" in line] == [str(broken), missing]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "a red star"], "IMAGE"),
        (["{model}", "a red star", "missing.png"], "no image can be read"),
        (["nowhere", "a red star", "x.png"], "no such model folder"),
        (["{model}", "a red star", "x.png", "--scorer", "beauty"], "invalid choice: 'beauty'"),
        (["{plain}", "a red star", "x.png", "--scorer", "clip"], "has no scorer"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    model_folder: Path,
    model_without_scorer: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    filled = [argument.format(model=model_folder, plain=model_without_scorer) for argument in arguments]
    assert run_command(main, filled) == 2
    *skipped, last = capsys.readouterr().err.splitlines()
    assert message in last and last.startswith("tessera: ")
    assert all(line.startswith("skipped") for line in skipped)


def test_a_scorer_for_another_size_than_the_prior_ranks_alone_but_not_with_it(
    model_with_another_scorer: Path, images: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(model_with_another_scorer), "a red star", *images, "--json"]
    assert main([*argv, "--scorer", "clip"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert run_command(main, [*argv, "--scorer", "combined"]) == 2
    output = capsys.readouterr()
    assert "images of 16x24 pixels" in output.err and "trained on 32x32" in output.err
    assert output.err.count("\n") == 1 and not output.out


def test_a_model_without_scorer_ranks_by_likelihood(
    model_without_scorer: Path, images: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(model_without_scorer), "a red star", *images, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["scorer"] == "likelihood"
