"""`tessera generate`: every flag reaches the pipeline, files come out, errors are one line."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sampling.generate
import sampling.pictures
from sampling.editing import read_mask
from sampling.generate import main
from sampling.generated_image import GeneratedImage
from sampling.outpainting import Margins
from sampling.pipeline import Pipeline
from sampling.saving import description, read_metadata
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


def run_as_json(capsys: pytest.CaptureFixture[str], model: Path, out: Path, *arguments: str) -> list[dict[str, Any]]:
    """What the command says of its images, in order."""
    assert main([str(model), "a red star", "--json", "--out", str(out), *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def files(tmp_path: Path, photo: Image.Image) -> dict[str, str]:
    """Files of a user: an image, a mask for it, both twice as large, and something else."""
    mask = np.zeros((16, 24), dtype=np.uint8)
    mask[5:9, 9:18] = 255
    images = {
        "photo": photo,
        "mask": Image.fromarray(mask),
        "large": photo.resize((48, 32)),
        "large_mask": Image.fromarray(mask).resize((48, 32)),
    }
    folder = tmp_path / "files"
    folder.mkdir()
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    (folder / "text.png").write_text("not an image")
    return {name: str(folder / f"{name}.png") for name in (*images, "text")}


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--guidance", "3", "--guidance-schedule", "linear"], {"guidance": 3.0, "guidance_schedule": "linear"}),
        (
            ["--guidance-schedule", "power-cosine", "--guidance-power", "2.5", "--guidance-threshold", "1.5"],
            {"guidance_schedule": "power-cosine", "guidance_power": 2.5, "guidance_threshold": 1.5},
        ),
        (["--top-k", "3", "--top-p", "0.5", "--min-p", "0.1"], {"top_k": 3, "top_p": 0.5, "min_p": 0.1}),
        (["--temperature", "0"], {"temperature": 0.0}),
        (["-n", "2", "--best-of", "5", "--scorer", "likelihood"], {"n": 2, "best_of": 5, "scorer": "likelihood"}),
        (["-n", "2", "--scorer", "none"], {"n": 2, "scorer": None}),
        (
            ["--best-of", "8", "--prune-keep", "0.25", "--prune-after", "0.3"],
            {"best_of": 8, "prune_keep": 0.25, "prune_after": 0.3},
        ),
        (["--init", "{photo}", "--keep-rows", "2"], {"init": "photo", "keep_rows": 2}),
        (["--init", "{photo}", "--keep", "0.5", "-n", "2"], {"init": "photo", "keep": 0.5, "n": 2}),
        (["--init", "{photo}", "--mask", "{mask}"], {"init": "photo", "mask": "mask"}),
        (
            ["--init", "{photo}", "--mask", "{mask}", "--seam", "blend"],
            {"init": "photo", "mask": "mask", "seam": "blend"},
        ),
        (
            ["--init", "{photo}", "--mask", "{mask}", "--seam", "reencode", "--best-of", "3", "--scorer", "context"],
            {"init": "photo", "mask": "mask", "seam": "reencode", "best_of": 3, "scorer": "context"},
        ),
    ],
)
def test_flags_do_what_the_arguments_of_the_pipeline_do(
    model_folder: Path,
    pipeline: Pipeline,
    tmp_path: Path,
    files: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    options: dict[str, Any],
) -> None:
    given = [argument.format(**files) for argument in arguments]
    lines = run_as_json(capsys, model_folder, tmp_path, "--seed", "5", *given)
    options = {name: files[value] if name in ("init", "mask") else value for name, value in options.items()}
    expected = pipeline("a red star", seed=5, **options)
    assert len(lines) == len(expected)
    for line, image in zip(lines, expected, strict=True):
        assert line == {"path": line["path"], **json.loads(json.dumps(description(image)))}
        assert np.array_equal(pixels(Path(line["path"])), image.image)
    plain = pipeline("a red star", seed=5)[0]
    assert lines[0]["candidates"] > 1 or not np.array_equal(expected[0].image, plain.image), "the flags change nothing"


def test_what_a_mask_leaves_is_kept_and_what_it_paints_is_not(
    model_folder: Path, pipeline: Pipeline, tmp_path: Path, files: dict[str, str], photo: Image.Image
) -> None:
    main(
        [str(model_folder), "a red star", "--init", files["photo"], "--mask", files["mask"], "--seam", "blend"]
        + ["--no-sheet", "--out", str(tmp_path / "out")]
    )
    (path,) = (tmp_path / "out").iterdir()
    drawn, painted = pixels(path), read_mask(files["mask"], (16, 24)).numpy()
    assert np.array_equal(drawn[:, :4], np.asarray(photo)[:, :4])
    assert (drawn[painted] != np.asarray(photo)[painted]).mean() > 0.9


def test_an_image_of_another_size_is_resized_with_its_mask_and_that_is_said(
    model_folder: Path, tmp_path: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        [str(model_folder), "x", "--init", files["large"], "--mask", files["large_mask"], "--out", str(tmp_path / "o")]
    )
    assert "has 32x48 pixels (height x width), the model draws 16x24: it is resized" in " ".join(
        capsys.readouterr().err.split()
    )
    assert pixels(tmp_path / "o" / "x-0-0.png").shape == (16, 24, 3)


def test_outpaint_extends_each_prompt(
    model_folder: Path,
    pipeline: Pipeline,
    tmp_path: Path,
    files: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--init", files["photo"], "--outpaint", "right=3,bottom=1", "--outpaint-step", "1"]
    arguments += ["-n", "2", "--temperature", "0.5", "--seed", "3"]
    lines = run_as_json(capsys, model_folder, tmp_path, "a blue ring", *arguments)
    expected = [
        image
        for prompt in ("a red star", "a blue ring")
        for image in pipeline.outpaint(
            prompt, init=files["photo"], margins=Margins(right=3, bottom=1), n=2, step=1, temperature=0.5, seed=3
        )
    ]
    assert [line["prompt"] for line in lines] == ["a red star"] * 2 + ["a blue ring"] * 2
    for line, image in zip(lines, expected, strict=True):
        assert line["edit"]["margins"] == {"left": 0, "top": 0, "right": 3, "bottom": 1}
        assert pixels(Path(line["path"])).shape == (20, 36, 3)
        assert np.array_equal(pixels(Path(line["path"])), image.image)
    assert (tmp_path / "sheet-a-red-star-3.png").is_file()


def test_outpaint_chooses_among_candidates_and_writes_their_sheet(
    model_folder: Path, tmp_path: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--init", files["photo"], "--outpaint", "right=3", "-n", "2", "--best-of", "4"]
    lines = run_as_json(capsys, model_folder, tmp_path, *arguments)
    assert [line["candidates"] for line in lines] == [2, 2]
    assert all(line["scorer"] == "context" and line["scores"]["context"] < 0 for line in lines)
    assert (tmp_path / "sheet-a-red-star-0.png").is_file()


def test_a_mask_may_be_a_rectangle(
    model_folder: Path, tmp_path: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    def drawn_with(mask: str) -> np.ndarray:
        (line,) = run_as_json(capsys, model_folder, tmp_path / str(len(mask)), "--init", files["photo"], "--mask", mask)
        return pixels(Path(line["path"]))

    assert np.array_equal(drawn_with("9,5,18,9"), drawn_with(files["mask"])), "left, top, right, bottom of the mask"


def test_grid_makes_an_image_for_each_combination_and_a_sheet(
    model_folder: Path, pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run_as_json(
        capsys, model_folder, tmp_path, "--grid", "guidance=1,3", "--grid", "top-k=1,4,0", "--temperature", "0.7"
    )
    expected = pipeline.grid("a red star", axes={"guidance": [1, 3], "top_k": [1, 4, 0]}, temperature=0.7)
    for line, image in zip(lines, expected, strict=True):
        settings = line["settings"]
        assert (settings["guidance"], settings["top_k"]) == (image.settings.guidance, image.settings.top_k)
        assert line["path"].endswith(f"-guidance-{settings['guidance']:g}-top_k-{settings['top_k']}.png")
        assert np.array_equal(pixels(Path(line["path"])), image.image)
    sheet = read_metadata(tmp_path / "sheet-a-red-star-0.png")
    assert sheet is not None and len(sheet["images"]) == 6
    height, width, _ = pixels(tmp_path / "sheet-a-red-star-0.png").shape
    assert (width - 2 * 24 + 16) // (192 + 16) == 3 and height > 2 * 128


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_other_number_formats_are_said_in_the_files(
    model_without_scorer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    (line,) = run_as_json(
        capsys, model_without_scorer, tmp_path, "--precision", precision, "--deterministic", "--device", "cpu"
    )
    assert line["precision"] == precision and pixels(Path(line["path"])).std() > 1


def test_device_precision_and_determinism_reach_the_model(
    model_folder: Path, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[dict[str, Any]] = []

    def load(path: str, **options: Any) -> Pipeline:
        loaded.append(options)
        return pipeline

    monkeypatch.setattr(sampling.generate.Pipeline, "load", load)
    main([str(model_folder), "x", "--out", str(tmp_path)])
    main(
        [str(model_folder), "x", "--deterministic", "--precision", "int8", "--device", "cuda:1", "--out", str(tmp_path)]
    )
    assert loaded == [
        {"device": "auto", "precision": "auto", "deterministic": False},
        {"device": "cuda:1", "precision": "int8", "deterministic": True},
    ]


def test_guidance_that_cannot_work_is_noted(
    model_without_dropout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(model_without_dropout), "x", "--device", "cpu", "--precision", "fp32", "--out", str(tmp_path)]
    main([*command, "--guidance", "3"])
    assert "note: guidance compares with the empty caption" in capsys.readouterr().err
    main([*command, "--guidance", "1"])
    assert capsys.readouterr().err == ""


def test_ctrl_c_saves_the_best_of_what_was_finished(
    model_folder: Path,
    small: Pipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count_decode_calls: Callable[..., list[int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(call: int) -> None:
        if call == 3 * 23 + 7:  # in the fourth batch of two
            raise KeyboardInterrupt

    expected = small("a red star", n=2, best_of=6, seed=1)
    count_decode_calls(small, interrupt)
    monkeypatch.setattr(sampling.generate.Pipeline, "load", lambda path, **options: small)
    command = [str(model_folder), "a red star", "a blue ring", "-n", "2", "--best-of", "10000", "--seed", "1"]
    assert run_command(main, [*command, "--json", "--out", str(tmp_path)]) == 130
    output = capsys.readouterr()
    lines = [json.loads(line) for line in output.out.splitlines()]
    assert [line["image_index"] for line in lines] == [image.image_index for image in expected]
    for line, image in zip(lines, expected, strict=True):
        assert line["candidates"] == 6 and np.array_equal(pixels(Path(line["path"])), image.image)
    said = " ".join(output.err.split())
    assert f"2 images are in {tmp_path}; the last are the best of the 6 candidates that were finished" in said
    assert "interrupted" in said


def test_a_sheet_that_would_be_too_large_is_noted_and_the_images_are_there(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sampling.pictures, "MAX_SIDE_PIXELS", 500)
    assert main([str(model_folder), "x", "-n", "5", "--out", str(tmp_path)]) == 0
    assert "note: no contact sheet: a sheet of 5 images would have" in " ".join(capsys.readouterr().err.split())
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask", "{mask}"], "--mask needs --init beside it"),
        (["--keep-rows", "2"], "--keep-rows needs --init"),
        (["--keep", "0.5"], "--keep needs --init"),
        (["--outpaint", "right=4"], "--outpaint needs --init"),
        (["--init", "{photo}"], "--init needs --mask or --keep-rows or --keep or --outpaint beside it"),
        (["--init", "{photo}", "--keep", "0.5", "--keep-rows", "2"], "--keep-rows does not go with --keep"),
        (["--init", "{photo}", "--keep", "0.5", "--seam", "blend"], "--seam needs --mask"),
        (["--init", "{photo}", "--mask", "{mask}", "--outpaint", "left=1"], "--mask does not go with --outpaint"),
        (["--init", "{photo}", "--outpaint", "left=1", "--all"], "--outpaint does not go with --all"),
        (["--init", "{photo}", "--outpaint", "left=1", "--scorer", "clip"], "--outpaint does not go with --scorer"),
        (["--init", "{photo}", "--outpaint", "up=1"], "cannot read margin 'up=1'"),
        (["--init", "{photo}", "--outpaint", "left=0"], "add nothing"),
        (["--outpaint-step", "2"], "--outpaint-step needs --outpaint"),
        (["--init", "nowhere.png", "--keep", "0.5"], "--init nowhere.png: there is no such file"),
        (["--init", "{photo}", "--mask", "nowhere.png"], "--mask nowhere.png: there is no such file"),
        (["--grid", "guidance=1,2", "more"], "--grid is for one prompt, got 2"),
        (["--grid", "guidance=1,2", "-n", "2"], "--grid does not go with -n"),
        (["--grid", "guidance=1,2", "--best-of", "4"], "--grid does not go with --best-of"),
        (["--grid", "guidance=1,2", "--init", "{photo}", "--keep", "0.5"], "--grid does not go with --init"),
        (["--grid", "guidance=1,2", "--guidance", "3"], "--grid guidance does not go with --guidance"),
        (["--grid", "guidence=1,2"], "did you mean guidance"),
        (["--grid", "top_p=2"], "top_p is 2.0, expected"),
        (["--scorer", "context"], "give --init"),
        (["--best-of", "4", "--scorer", "none"], "needs a scorer to choose by"),
        (["--prune-after", "0.3"], "--prune-after needs --prune-keep"),
        (["--best-of", "4", "--all", "--prune-keep", "0.5"], "--all does not go with --prune-keep"),
        (["-n", "3", "--best-of", "4", "--prune-keep", "0.5"], "of 4 candidates leaves fewer than -n 3"),
        (["-n", "0"], "n is 0, expected at least 1"),
        (["-n", "-2"], "n is -2, expected at least 1"),
        (["--best-of", "0"], "best_of is 0, expected at least n = 1"),
        (["--seed", "-1"], "seed is -1"),
        (["--temperature", "nan"], "temperature is nan, expected"),
        (["--temperature", "-0.5"], "temperature is -0.5, expected"),
        (["--top-p", "0"], "top_p is 0.0, expected"),
        (["--top-p", "1.5"], "top_p is 1.5, expected"),
        (["--guidance-power", "0"], "guidance_power is 0.0, expected"),
        (["--guidance-threshold", "-1"], "guidance_threshold is -1.0, expected"),
        (["--guidance-schedule", "cubic"], "invalid choice: 'cubic'"),
        (["--seam", "glue"], "invalid choice: 'glue'"),
        (["--keep-rows", "two"], "invalid int value: 'two'"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_looked_for(
    tmp_path: Path,
    files: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [argument.format(**files) for argument in arguments]
    assert run_command(main, ["no-such-model", "x", "--out", "out", *given]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and message in error
    assert not (tmp_path / "out").exists()


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
        (["{model}", "x", "--init", "{text}", "--keep", "0.5"], "text.png: "),
        (["{model}", "x", "--init", "{photo}", "--mask", "{text}"], "text.png: "),
        (["{model}", "x", "--init", "{photo}", "--mask", "{large_mask}"], "the mask has 32x48 pixels"),
        (["{model}", "x", "--init", "{photo}", "--keep", "2"], "keep is 2, expected a share"),
        (["{model}", "x", "--init", "{photo}", "--keep-rows", "4"], "4 known rows of a grid of 4, expected 1 to 3"),
        (["{model}", "x", "--init", "{photo}", "--outpaint", "left=9", "--outpaint-step", "4"], "step is 4 cells"),
        (["{model}", "x", "--init", "{photo}", "--outpaint", "left=999"], "expected at most 512 on a side"),
        (["{model}", "x", "--prune-keep", "0"], "prune_keep is 0.0"),
        (["{model}", "x", "--device", "toaster"], "device 'toaster' is unknown"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    model_folder: Path,
    model_without_scorer: Path,
    tmp_path: Path,
    files: dict[str, str],
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
    names = {"model": model_folder, "plain": model_without_scorer, "file": "file", "empty": "empty", **files}
    assert run_command(main, [argument.format(**names) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1 and message in output.err
    assert not list((tmp_path / "out").glob("*.png"))


def test_help_gives_types_defaults_and_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "integer from 0 to 2^63 - 1 (default: 0)",
        "number in (0, 1]",
        "(default: out)",
        "u + W (c - u)",
        "power-cosine",
        "number in (0, 1) (default: 0.5)",
        "right=4,bottom=2",
        "cells, integer >= 1",
        "(default: none, all pixels are as decoded)",
        "guidance=1,2,4",
        "clip,likelihood,combined,context,none",
        "auto,bf16,fp32,int8",
    ):
        assert part in text
