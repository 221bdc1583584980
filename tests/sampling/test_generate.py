"""`tessera generate`: files that say how they were made, names that never cover another image, errors of one line."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sampling.generate
from sampling.generate import free_path, main, read_metadata, save_image, slug
from sampling.generated_image import GeneratedImage
from sampling.pipeline import Pipeline
from tessera.data.images import read_png_text, save_png
from tessera.errors import run_command

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline, model_folder: Path) -> None:
    """Commands on the tiny model take the pipeline that is already loaded."""
    load = Pipeline.load

    def load_or_take(path: str, **options) -> Pipeline:
        return pipeline if Path(path) == model_folder else load(path, **options)

    monkeypatch.setattr(sampling.generate.Pipeline, "load", load_or_take)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_fresh_process_draws_the_same_pixels_from_the_exported_folder(
    model_folder: Path, pipeline: Pipeline, tmp_path: Path
) -> None:
    arguments = ["-n", "2", "--best-of", "4", "--seed", "7", "--json", "--precision", "fp32", "--device", "cpu"]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "tessera",
            "generate",
            str(model_folder),
            "a red star",
            "--out",
            str(tmp_path),
            *arguments,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    expected = pipeline("a red star", n=2, best_of=4, seed=7)
    assert [line["image_index"] for line in lines] == [image.image_index for image in expected]
    for line, image in zip(lines, expected, strict=True):
        assert np.array_equal(pixels(Path(line["path"])), image.image)


def test_png_metadata_make_a_round_trip(model_folder: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    main(
        [str(model_folder), 'Звезда: a "red" star, 50%', "--seed", "3", "--temperature", "0.5", "--out", str(tmp_path)]
    )
    (path,) = tmp_path.glob("звезда*.png")
    metadata = read_metadata(path)
    (image,) = pipeline('Звезда: a "red" star, 50%', seed=3, temperature=0.5, on_warning=print)
    assert metadata is not None
    assert {name: metadata[name] for name in image.description()} == image.description()
    assert metadata["settings"]["temperature"] == 0.5 and metadata["scores"]["clip"] == image.scores["clip"]
    parameters = read_png_text(path)["parameters"].splitlines()
    assert parameters[0] == 'Звезда: a "red" star, 50%'
    assert parameters[1] == "Negative prompt: "
    for field in ("Seed: 3", "Size: 24x16", f"Model hash: {image.model_sha256[:12]}", "CFG scale: 2.0"):
        assert field in parameters[2].split(", ")


def test_json_is_one_line_per_image_on_stdout_and_nothing_else(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        [str(model_folder), "a red star", "a blue ring", "-n", "2", "--best-of", "3", "--json", "--out", str(tmp_path)]
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["prompt"], line["rank"]) for line in lines] == [
        ("a red star", 0),
        ("a red star", 1),
        ("a blue ring", 0),
        ("a blue ring", 1),
    ]
    for line in lines:
        assert Path(line["path"]).is_file()
        assert {"seed", "image_index", "scores", "settings", "model_sha256"} <= set(line)


def test_all_saves_the_losers_too_and_the_sheet_shows_the_best(model_folder: Path, tmp_path: Path) -> None:
    main([str(model_folder), "a red star", "-n", "1", "--best-of", "3", "--all", "--out", str(tmp_path)])
    assert len(list(tmp_path.glob("a-red-star-0-*.png"))) == 3
    sheet = read_metadata(tmp_path / "sheet-a-red-star-0.png")
    assert sheet is not None and len(sheet["images"]) == 1


def test_no_sheet_writes_none(model_folder: Path, tmp_path: Path) -> None:
    main([str(model_folder), "a red star", "--no-sheet", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["a-red-star-0-0.png"]


def test_the_same_command_writes_the_same_files_and_another_one_covers_none(model_folder: Path, tmp_path: Path) -> None:
    command = [str(model_folder), "a red star", "--out", str(tmp_path)]
    main(command)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {"a-red-star-0-0.png", "sheet-a-red-star-0.png"}
    main(command)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    main([*command, "--temperature", "0.1"])
    main([str(model_folder), "A red star!", "--out", str(tmp_path)])
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name: after[name] for name in first} == first
    assert {"a-red-star-0-0-2.png", "a-red-star-0-0-3.png", "sheet-a-red-star-0-2.png"} <= set(after)


def test_a_foreign_file_of_that_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("not an image")
    assert free_path(tmp_path, "x", same={}).name == "x-2.png"
    save_png(tmp_path / "x-2.png", np.zeros((8, 8, 3), dtype=np.uint8), {"tessera": "[1]"})
    assert free_path(tmp_path, "x", same={}).name == "x-3.png"


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red star, left of a ring!", "a-red-star-left-of-a-ring"),
        ("", "image"),
        ("../../etc/passwd", "etc-passwd"),
        ("赤い星", "赤い星"),
        ("🌟", "image"),
        ("x" * 500, "x" * 80),
    ],
)
def test_a_prompt_becomes_a_short_safe_file_name(prompt: str, name: str) -> None:
    assert slug(prompt) == name
    assert len(slug("é" * 300).encode()) <= 80


def test_prompts_come_from_a_file_and_the_command_line(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red star\r\n\r\n  a blue ring\n".encode())
    main([str(model_folder), "first", "--prompts-file", str(file), "--json", "--out", str(tmp_path / "out")])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["first", "a red star", "a blue ring"]


def test_options_may_stand_between_prompts(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(model_folder), "one", "--json", "--out", str(tmp_path), "two", "--no-sheet", "three"])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_prompt_that_is_cut_is_told_on_stderr(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(model_folder), "a [bold] star " * 10, "--json", "--out", str(tmp_path)])
    output = capsys.readouterr()
    assert "note: the prompt has" in output.err and "[bold]" in output.err
    assert len(output.out.splitlines()) == 1


def test_ctrl_c_keeps_what_is_written(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = Pipeline.stream

    def interrupted(self: Pipeline, *arguments, **options) -> Iterator[list[GeneratedImage]]:
        yield next(stream(self, *arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "stream", interrupted)
    assert run_command(main, [str(model_folder), "a red star", "a blue ring", "--out", str(tmp_path)]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["a-red-star-0-0.png"]
    assert f"1 images are in {tmp_path}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "MODEL"),
        (["{model}"], "no prompt given"),
        (["{model}", "x", "-n", "0"], "n is 0, expected at least 1"),
        (["{model}", "x", "-n", "four"], "invalid int value: 'four'"),
        (["{model}", "x", "-n", "4", "--best-of", "2"], "best_of is 2, expected at least n = 4"),
        (["{model}", "x", "--seed", "-1"], "seed is -1"),
        (["{model}", "x", "--temperature", "-1"], "temperature is -1.0, expected"),
        (["{model}", "x", "--temperature", "nan"], "temperature is nan, expected"),
        (["{model}", "x", "--top-p", "0"], "top_p is 0.0, expected"),
        (["{model}", "x", "--guidence", "2"], "unrecognized arguments: --guidence"),
        (["{model}", "x", "--out", "{file}"], "is a file, expected a folder"),
        (["{model}", "--prompts-file", "nowhere.txt"], "nowhere.txt: No such file"),
        (["{model}", "--prompts-file", "{empty}"], "has no prompt"),
        (["nowhere", "x"], "no such model folder"),
        (["{plain}", "x", "--scorer", "clip"], "train-scorer"),
        (["{model}", "x", "--device", "toaster"], "device 'toaster' is unknown"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    model_folder: Path,
    model_without_scorer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    if "toaster" in arguments:
        monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").write_text("\n")
    names = {"model": model_folder, "plain": model_without_scorer, "file": "file", "empty": "empty"}
    assert run_command(main, [argument.format(**names) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1 and message in output.err
    assert not list(tmp_path.glob("**/*.png"))


def test_help_gives_types_defaults_and_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("integer from 0 to 2^63 - 1 (default: 0)", "number in (0, 1]", "(default: out)", "u + W (c - u)"):
        assert part in text


def test_the_metadata_of_an_unreadable_score_are_still_json(pipeline: Pipeline, tmp_path: Path) -> None:
    import dataclasses

    (image,) = pipeline("a red star")
    path = save_image(dataclasses.replace(image, scores={"clip": float("nan")}), tmp_path)
    metadata = read_metadata(path)
    assert metadata is not None and metadata["scores"] == {"clip": None}
