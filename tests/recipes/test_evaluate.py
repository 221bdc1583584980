import json
import shutil
from pathlib import Path

import pytest

from recipes.accuracy import TUNING_SEED
from recipes.evaluate import main
from tessera.data.images import read_png_text
from tessera.data.scenes import PROMPT_CLASSES
from tessera.errors import run_command
from tessera.model_folder import ModelFolder


def test_scenes_give_every_figure_by_split_and_class(
    scenes_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.evaluate._MEASURED_IMAGES", 24)
    file = tmp_path / "r.json"
    argv = [str(scenes_model), "scenes", "--json", str(file), "--prompts", "6", "--best-of", "4", "--device", "cpu"]
    assert main(argv) == 0
    figures = json.loads(file.read_text())
    assert {"psnr", "ssim", "codebook_usage", "perplexity"} <= set(figures["dvae"])
    assert {"image_loss", "text_loss", "caption_gap"} == set(figures["prior"])
    assert 0 <= figures["scorer"]["recall_at_1"] <= 1
    accuracy = figures["accuracy"]
    assert accuracy["prompts"] == {"seen": 6, "unseen": 6}
    for kind in ("single", "best_of_4", "oracle_of_4"):
        for pairs in ("seen", "unseen"):
            assert set(accuracy[kind][pairs]) == {"all", *PROMPT_CLASSES}
    assert accuracy["renders"] > 0.5 > accuracy["reconstructions"]  # true pictures of 16 pixels, and noise
    assert figures["hardware"]["cores"] >= 1 and "torch" in figures["versions"]
    shown = capsys.readouterr().out
    assert "psnr" in shown and "best of 4, unseen" in shown


def test_a_folder_is_measured_without_a_parser(scenes_model: Path, image_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    assert main([str(scenes_model), str(image_folder), "--json", str(file), "--device", "cpu"]) == 0
    figures = json.loads(file.read_text())
    assert "accuracy" not in figures
    assert figures["images"] >= 1


def test_a_folder_that_happens_to_be_called_scenes_is_an_ordinary_corpus(
    scenes_model: Path, image_folder: Path, tmp_path: Path
) -> None:
    folder, file = tmp_path / "my" / "scenes", tmp_path / "r.json"
    shutil.copytree(image_folder, folder)
    assert main([str(scenes_model), str(folder), "--json", str(file), "--device", "cpu"]) == 0
    figures = json.loads(file.read_text())
    assert figures["corpus"] == "scenes" and "accuracy" not in figures


def test_copies_are_looked_for_where_a_sheet_is_asked_for(
    scenes_model: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, sheet = tmp_path / "r.json", tmp_path / "pictures" / "nearest.png"
    argv = [str(scenes_model), str(image_folder), "--json", str(file), "--nearest", str(sheet), "--device", "cpu"]
    assert main(argv) == 0
    memorized = json.loads(file.read_text())["memorized"]
    shares = {name for name in memorized if name == "share" or name.startswith("of_")}
    assert shares == {"share", "of_training_captions", "of_held_out_captions", "of_held_out_pictures"}
    assert all(0 <= memorized[name] <= 1 for name in shares)
    assert 10 < memorized["training_pictures"] < 24 and 2 <= memorized["samples"] <= 24
    assert json.loads(read_png_text(sheet)["tessera"]) == {"model": str(scenes_model), **memorized}
    assert "copies  " in capsys.readouterr().out


def test_copies_of_other_pictures_than_the_given_ones_are_not_promised(
    scenes_model: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ModelFolder, "metadata", lambda folder, part: {"corpus": "scenes"})
    assert main([str(scenes_model), str(image_folder), "--nearest", str(tmp_path / "n.png"), "--device", "cpu"]) == 0
    note = f"was trained on scenes: copies of those pictures are not found in {image_folder.name}"
    assert note in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["scenes", "--nearest", "sheet.jpg"], "--nearest must name a .png file in a folder; got sheet.jpg"),
        (["scenes", "--prompts", "0"], "--prompts and --best-of must be at least 1"),
        (["scenes", "--json", "absent/r.json"], "its folder does not exist"),
        (["scenes", "--seed", str(TUNING_SEED)], "take another"),
        (["nowhere"], "no data 'nowhere'"),
    ],
)
def test_mistakes_are_one_line(
    scenes_model: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, [str(scenes_model), *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
