"""The journey from images to a model folder: on a tiny budget, interrupted, resumed, and run by mistake."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes import fit as fit_module
from recipes.fit import image_size, main, request_of
from recipes.run_folder import RunFolder
from tessera.config import from_plain, to_plain
from tessera.errors import run_command
from tessera.model_folder import ModelFolder, write_part, write_sampling_defaults
from transformer.model import Prior, PriorConfig


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


@pytest.fixture(scope="module")
def fitted_model(scenes_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its prior reads codes digit by digit, as fit makes them."""
    path = Path(shutil.copytree(scenes_model, tmp_path_factory.mktemp("models") / "scenes"))
    folder = ModelFolder.open(path)
    config = from_plain(PriorConfig, folder.config("prior"), source="the test's model")
    levels = tuple(folder.config("dvae")["levels"])
    prior = Prior(replace(config, layout=replace(config.layout, codebook_levels=levels)))
    requires = {"dvae": folder.part_sha256("dvae"), "tokenizer": folder.tokenizer_sha256}
    write_part(path, "prior", config=to_plain(prior.config), tensors=prior.state_dict(), requires=requires)
    write_sampling_defaults(path, {"temperature": 0.9, "guidance": 1.0})
    return path


def test_an_interrupted_fine_tuning_goes_on_and_leaves_its_model_as_it_was(
    fitted_model: Path,
    scenes_model: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out = Path(shutil.copytree(fitted_model, tmp_path / "scenes")), tmp_path / "m"
    before = {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}
    limits = ["--minutes", "0.02", "--device", "cpu", "data.limit=16"]
    command = [str(image_folder), "--from", str(model), "--out", str(out), *limits]
    train_scorer = fit_module.train_scorer

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_module, "train_scorer", interrupted)
    assert run_command(main, command) == 130
    shown = capsys.readouterr()
    assert f"--from {model}" in shown.err and "training the dVAE" not in shown.out
    monkeypatch.setattr(fit_module, "train_scorer", train_scorer)

    goes_on = [str(image_folder), "--out", str(out)]
    shutil.move(model, tmp_path / "away")
    assert run_command(main, goes_on) == 2
    assert f"--from {model}: no such model folder" in capsys.readouterr().err
    shutil.copytree(scenes_model, model)
    assert run_command(main, goes_on) == 2
    assert f"--from {model} has changed: expected sha256" in capsys.readouterr().err
    shutil.rmtree(model)
    shutil.move(tmp_path / "away", model)
    assert run_command(main, goes_on) == 0
    tuned, source = ModelFolder.open(out), ModelFolder.open(model)
    assert tuned.parts == ("dvae", "prior", "scorer")
    assert tuned.part_sha256("dvae") == source.part_sha256("dvae")
    assert tuned.tokenizer_sha256 == source.tokenizer_sha256
    assert tuned.part_sha256("prior") != source.part_sha256("prior")
    moved = tuned.tensors("prior")["text_embedding.weight"] - source.tensors("prior")["text_embedding.weight"]
    assert 0 < moved.abs().mean() < 0.5  # new weights would be 1.1 away
    assert tuned.sampling_defaults() == {"temperature": 0.9, "guidance": 1.0}  # too few captions to tune with
    card = (out / "README.md").read_text()
    assert "Fine-tuned from scenes, sha256" in card and "Chosen by: as scenes has them: too few captions" in card
    assert {file: file.read_bytes() for file in model.rglob("*") if file.is_file()} == before

    shutil.rmtree(model)  # a finished model needs it no more
    assert run_command(main, goes_on) == 0
    assert "is finished already" in capsys.readouterr().out


def test_a_dvae_is_trained_on_only_if_that_is_asked_for(fitted_model: Path, image_folder: Path, tmp_path: Path) -> None:
    command = [str(image_folder), "--from", str(fitted_model), "--train-dvae", "--minutes", "0.02", "--device", "cpu"]
    assert run_command(main, [*command, "--out", str(tmp_path / "m")]) == 0
    tuned, source = ModelFolder.open(tmp_path / "m"), ModelFolder.open(fitted_model)
    assert tuned.tokenizer_sha256 == source.tokenizer_sha256
    assert tuned.part_sha256("dvae") != source.part_sha256("dvae")
    assert tuned.requires("prior")["dvae"] == tuned.part_sha256("dvae")


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
        (["scenes", "--train-dvae"], "--train-dvae trains on the dvae of a model: name it with --from"),
        (["scenes", "--from", "absent"], "absent: no such model folder"),
        (["scenes", "--from", "{empty}"], "is not a model folder"),
        (["scenes", "--from", "{model}", "--out", "{model}"], "is only read"),
        (["scenes", "--from", "{model}", "--out", "{model}/new", "--fresh"], "is only read"),
        (["scenes", "--from", "{model}", "--image-size", "64"], "draws 16x16 pixels"),
        (["scenes", "--from", "{model}", "prior.model.dim=8"], "the sizes of the prior are those of"),
        ([], "required"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    argv: list[str],
    message: str,
    scenes_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run_command(main, [argument.format(empty=empty, model=scenes_model) for argument in argv]) == 2
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


def test_files_are_remembered_by_their_absolute_path_and_datasets_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos.tar").touch()
    for path, remembered in (("photos.tar", str(tmp_path / "photos.tar")), ("hf:me/pets", "hf:me/pets")):
        arguments = fit_module._parser().parse_args([path])
        assert request_of(arguments, RunFolder(tmp_path / "run")).path == remembered


def test_image_sizes_are_read_as_height_by_width() -> None:
    assert image_size("64") == (64, 64)
    assert image_size("64x96") == (64, 96)
