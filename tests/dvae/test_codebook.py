"""The codebook's picture shows what codes decode to, and its figures are counts of a corpus."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dvae import codebook
from dvae.codebook import count_uses, decode_codebook, digit_columns, draw_codebook, main, shown_codes
from dvae.model import DiscreteVAE, DiscreteVAEConfig
from tessera.config import to_plain
from tessera.data.corpus import open_corpus
from tessera.data.images import read_png_text
from tessera.errors import run_command
from tessera.model_folder import write_part
from tessera.precision import Precision

FP32 = Precision("fp32", "chosen by the test")


@pytest.fixture(scope="module")
def vae() -> DiscreteVAE:
    torch.manual_seed(0)
    return DiscreteVAE(DiscreteVAEConfig(levels=(5, 3), patch_size=4, widths=(8,), blocks=(1,))).eval()


@pytest.fixture(scope="module")
def models(vae: DiscreteVAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders `scenes`, `photos` and `nothing`, named for the corpus in their metadata."""
    root = tmp_path_factory.mktemp("models")
    known = {"scenes": {"corpus": "scenes", "image_size": [32, 40]}, "photos": {"corpus": "photos"}, "nothing": {}}
    for name, metadata in known.items():
        write_part(root / name, "dvae", config=to_plain(vae.config), tensors=vae.state_dict(), metadata=metadata)
    return root


def fields(vae: DiscreteVAE, side: int) -> np.ndarray:
    """Every code's field, decoded by the model itself, uint8 [K, side * f, side * f, 3]."""
    grids = torch.arange(vae.codebook_size)[:, None, None].expand(-1, side, side)
    return (vae.decode(grids) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_a_tile_is_the_middle_of_a_field_of_one_code(vae: DiscreteVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fields(vae, 5)[:, 8:12, 8:12]
    tiles = decode_codebook(vae, precision=FP32)
    assert (tiles.shape, tiles.dtype) == ((15, 4, 4, 3), np.uint8)
    assert np.array_equal(tiles, expected)
    assert len({tile.tobytes() for tile in tiles}) == 15, "codes that look alike would make this test blind"
    monkeypatch.setattr(codebook, "_FIELDS_AT_ONCE", 4)
    assert np.array_equal(decode_codebook(vae, np.array([7, 3, 3, 14, 0]), precision=FP32), expected[[7, 3, 3, 14, 0]])


def test_the_side_of_the_field_can_be_chosen_and_has_a_middle(vae: DiscreteVAE) -> None:
    assert np.array_equal(decode_codebook(vae, precision=FP32, field=1), fields(vae, 1))
    with pytest.raises(ValueError, match="an odd side; got 4"):
        decode_codebook(vae, precision=FP32, field=4)


def test_uses_are_counted_over_the_whole_corpus(vae: DiscreteVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebook, "_IMAGES_AT_ONCE", 3)
    corpus = open_corpus("scenes", image_size=(32, 40), split="train", limit=7)
    seen: list[tuple[int, int]] = []
    counts = count_uses(vae, corpus, precision=FP32, on_progress=lambda done, total: seen.append((done, total)))
    images = torch.from_numpy(np.stack([corpus.image(index) for index in range(7)]))
    codes = vae.encode(images.permute(0, 3, 1, 2).float() / 255)
    assert np.array_equal(counts, torch.bincount(codes.flatten(), minlength=15).numpy())
    assert counts.sum() == 7 * 8 * 10
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_shown_codes_are_the_most_used_ones_in_the_order_that_was_asked_for() -> None:
    counts = np.array([3, 0, 9, 3, 0, 1])
    assert shown_codes(counts, 6, order="use", most=99).tolist() == [2, 0, 3, 5, 1, 4]
    assert shown_codes(counts, 6, order="index", most=99).tolist() == [0, 1, 2, 3, 4, 5]
    assert shown_codes(counts, 6, order="use", most=2).tolist() == [2, 0]
    assert shown_codes(counts, 6, order="index", most=2).tolist() == [0, 2]
    assert shown_codes(None, 6, order="index", most=4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("digits", "columns"), [((8, 5, 5, 5), 40), ((2,) * 10, 32), ((8, 8, 8, 5, 5, 5), 512), ((7,), None), ((), None)]
)
def test_rows_end_where_a_digit_does(digits: tuple[int, ...], columns: int | None) -> None:
    assert digit_columns(digits, int(np.prod(digits))) == columns


def test_a_picture_with_fewer_codes_is_smaller(vae: DiscreteVAE) -> None:
    counts = np.arange(15)
    whole = draw_codebook(vae, counts, precision=FP32, source="a corpus")
    part = draw_codebook(vae, counts, precision=FP32, source="a corpus", most=3)
    assert part.size < whole.size
    assert draw_codebook(vae, None, precision=FP32).dtype == np.uint8


def test_the_command_writes_a_picture_and_the_counts(
    models: Path, vae: DiscreteVAE, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "codes.png"
    arguments = [str(models / "photos"), "scenes", "--limit", "4", "--image-size", "32x40", "--device", "cpu"]
    assert main([*arguments, "--out", str(out), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    printed, written = json.loads(line), json.loads(out.with_suffix(".json").read_text())
    counts = np.array(written.pop("counts"))
    assert counts.shape == (15,) and counts.sum() == written["codes"] == 4 * 8 * 10
    assert written["dead_codes"] == (counts == 0).sum()
    assert written["usage"] == pytest.approx((counts > 0).mean())
    share = counts[counts > 0] / counts.sum()
    assert written["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert (written["corpus"], written["images"], written["image_size"]) == ("scenes", 4, [32, 40])
    assert printed == {"path": str(out), **written}
    assert json.loads(read_png_text(out)["tessera"]) == {"kind": "codebook", **written}


def test_without_a_path_the_corpus_of_the_training_is_counted_where_it_is_built_in(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "codes.png"
    assert main([str(models / "scenes"), "--limit", "2", "--out", str(out)]) == 0
    assert "2 training images of scenes, 32x40 px" in capsys.readouterr().out
    counted = out.read_bytes()
    for name, told in (("photos", "trained on 'photos'"), ("nothing", "names no corpus")):
        assert main([str(models / name), "--out", str(out)]) == 0
        printed = capsys.readouterr()
        assert told in printed.err and "not counted" in printed.err and "15 codes by index" in printed.out
        assert "counts" not in json.loads(out.with_suffix(".json").read_text())
        assert out.read_bytes() != counted


def test_a_built_in_corpus_that_is_not_to_be_had_does_not_keep_the_codes_from_being_seen(
    vae: DiscreteVAE, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = {"corpus": "emoji", "image_size": [32, 32]}
    write_part(tmp_path / "m", "dvae", config=to_plain(vae.config), tensors=vae.state_dict(), metadata=metadata)
    out = tmp_path / "codes.png"
    missing = ["--font", str(tmp_path / "no-font.ttf"), "--out", str(out)]
    assert main([str(tmp_path / "m"), *missing]) == 0
    assert "uses are not counted" in capsys.readouterr().err
    assert json.loads(read_png_text(out)["tessera"])["codebook_size"] == 15
    assert run_command(main, [str(tmp_path / "m"), "emoji", *missing]) == 2, "asked for, it is an error"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: MODEL; see `tessera codebook --help`"),
        (["nowhere"], "no such model folder"),
        (["{model}", "no-such-data"], "no data 'no-such-data'"),
        (["{model}", "--out", "codes.json"], "--out must name a .png file in a folder; got codes.json"),
        (["{model}", "--out", "."], "--out must name a .png file in a folder; got ."),
        (["{model}", "--out", __file__ + "/codes.png"], "--out must name a .png file in a folder"),
        (["{model}", "--limit", "0"], "'0' is no whole number of at least 1"),
        (["{model}", "--most", "many"], "'many' is no whole number of at least 1"),
        (["{model}", "--image-size", "wide"], "'wide' is no image size"),
        (["{model}", "--image-size", "30"], "multiples of 4 pixels; got 30x30"),
        (["{model}", "--order", "color"], "invalid choice: 'color'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    models: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, [argument.format(model=models / "scenes") for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
