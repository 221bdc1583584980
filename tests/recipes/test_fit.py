"""The journey from images to a model folder: on a tiny budget, interrupted, resumed, and run by mistake."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes import fit as fit_module
from recipes.fit import image_size, main
from tessera.errors import run_command
from tessera.model_folder import ModelFolder


def command(images: Path, out: Path, tiny: tuple[str, ...], *more: str) -> list[str]:
    return [str(images), "--out", str(out), "--minutes", "0.2", "--image-size", "32", "--device", "cpu", *tiny, *more]


def test_an_interrupted_fit_goes_on_and_its_model_draws(
    image_folder: Path,
    tmp_path: Path,
    tiny: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "my model"
    train_prior = fit_module.train_prior

    def interrupted(config: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_module, "train_prior", interrupted)
    assert run_command(main, command(image_folder, out, tiny)) == 130
    assert f"to go on from here: tessera fit {image_folder}" in capsys.readouterr().err
    run_dir = tmp_path / "my model.run"
    spent = json.loads((run_dir / "seconds.json").read_text())
    dvae_sha256 = ModelFolder.open(out, parts=["dvae"]).part_sha256("dvae")
    dvae_finished = (run_dir / "dvae" / "finished.json").stat().st_mtime_ns

    monkeypatch.setattr(fit_module, "train_prior", train_prior)
    # what the command line leaves open is as it was
    assert run_command(main, [str(image_folder), "--out", str(out)]) == 0
    assert "going on with" in capsys.readouterr().out
    folder = ModelFolder.open(out)
    assert folder.parts == ("dvae", "prior", "scorer")
    assert folder.part_sha256("dvae") == dvae_sha256
    assert (run_dir / "dvae" / "finished.json").stat().st_mtime_ns == dvae_finished
    assert folder.sampling_defaults()["temperature"] > 0
    after = json.loads((run_dir / "seconds.json").read_text())
    assert after["total"] > spent["total"] and after["budgets"]["dvae"] == spent["budgets"]["dvae"]
    card = (out / "README.md").read_text()
    assert "tessera generate" in card and "psnr" in card and "Chosen by" in card

    assert run_command(main, [str(image_folder), "--out", str(out)]) == 0
    assert "is finished already" in capsys.readouterr().out
    assert (run_dir / "seconds.json").read_text() == json.dumps(after, indent=1)

    assert run_command(main, command(image_folder, out, tiny, "--minutes", "7")) == 2
    assert "begun with minutes 0.2, now it is 7" in capsys.readouterr().err

    words = ["generate", str(out), "a red star", "-n", "2", "--out", str(tmp_path / "drawn"), "--device", "cpu"]
    subprocess.run([sys.executable, "-m", "tessera", *words], check=True)  # a process that knows the folder alone
    assert len(list((tmp_path / "drawn").glob("a-red-star-*.png"))) == 2


def test_a_model_that_is_there_is_not_overwritten(
    scenes_model: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = ModelFolder.open(scenes_model).sha256
    assert run_command(main, [str(image_folder), "--out", str(scenes_model)]) == 2
    assert "holds a model already" in capsys.readouterr().err
    assert ModelFolder.open(scenes_model).sha256 == before


def test_images_that_changed_since_the_plan_are_refused(
    image_folder: Path,
    tmp_path: Path,
    tiny: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images, out = tmp_path / "images", tmp_path / "m"
    images.mkdir()
    for file in sorted(image_folder.iterdir())[:20]:
        (images / file.name).write_bytes(file.read_bytes())

    def interrupted(config: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_module, "train_dvae", interrupted)
    assert run_command(main, command(images, out, tiny)) == 130
    for caption in images.glob("*.txt"):
        caption.write_text("something else")
    assert run_command(main, [str(images), "--out", str(out)]) == 2
    assert "have changed since" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_leaves_nothing(
    image_folder: Path, tmp_path: Path, tiny: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m"
    assert run_command(main, command(image_folder, out, tiny, "--dry-run")) == 0
    shown = capsys.readouterr().out
    assert "seen 24 = kept 24" in shown and "peak memory" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv, message",
    [
        (["{empty}"], "no images in"),
        (["{empty}/absent"], "no data"),
        (["scenes", "--minutes", "0"], "--minutes must be positive"),
        (["scenes", "--minutes", "inf"], "--minutes must be positive and finite, got inf"),
        (["scenes", "--minutes", "nan"], "--minutes must be positive and finite, got nan"),
        (["scenes", "--minutes", "1e308"], "--minutes must be positive and finite"),
        (["scenes", "minutes=.inf"], "--minutes must be positive and finite, got inf"),
        (["scenes", "--image-size", "4"], "no image size"),
        (["scenes", "--image-size", "60"], "divisible by 8"),
        (["scenes", "prior.model.width=3"], "unknown key 'prior.model.width'"),
        (["scenes", "dvae.data.limit=5"], "set data.limit"),
        (["scenes", "prior.shards=elsewhere"], "follow from --out"),
        (["scenes", "scorer.trainer.num_workers=2"], "num_workers must be 0"),
        (["scenes", "encode.bpe_dropout=0.2"], "follows prior.bpe_dropout"),
        (["scenes", "quickly"], "neither an option nor KEY=VALUE"),
        (["scenes", "--minuets", "3"], "unrecognized arguments"),
        ([], "required"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run_command(main, [argument.format(empty=empty) for argument in argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "my-model").exists()


@pytest.mark.parametrize(
    "slip", [("--image-size", "60"), ("--seed", "-1"), ("data.limit=0",), ("--device", "abacus"), ("prior.depth=4",)]
)
def test_starting_over_waits_for_a_plan(slip: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = [tmp_path / "my-model" / "tessera.yaml", tmp_path / "my-model.run" / "plan.yaml"]
    for file in kept:
        file.parent.mkdir()
        file.touch()
    assert run_command(main, ["scenes", "--fresh", *slip]) == 2
    assert all(file.exists() for file in kept)


def test_image_sizes_are_read_as_height_by_width() -> None:
    assert image_size("64") == (64, 64)
    assert image_size("64x96") == (64, 96)
