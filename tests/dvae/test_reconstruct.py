"""Sheets of reconstructions: one for every image that can be read, none over another."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dvae.model import DiscreteVAE, DiscreteVAEConfig
from dvae.reconstruct import decode_grids, encode_images, image_files, main, reconstruct, sheet_names
from tessera.config import to_plain
from tessera.data.images import read_png_text
from tessera.errors import UserError, run_command
from tessera.model_folder import write_part
from tessera.precision import Precision

FP32 = Precision("fp32", "chosen by the test")


@pytest.fixture(scope="module")
def vae() -> DiscreteVAE:
    torch.manual_seed(0)
    return DiscreteVAE(DiscreteVAEConfig(levels=(5, 3), patch_size=4, widths=(8,), blocks=(1,))).eval()


@pytest.fixture(scope="module")
def model(vae: DiscreteVAE, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "my-model"
    write_part(folder, "dvae", config=to_plain(vae.config), tensors=vae.state_dict(), metadata={"image_size": [16, 24]})
    return str(folder)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, size: int) -> str:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(noise(size, 24, 3)).save(path)
    return str(path)


def test_reconstructing_is_encoding_and_decoding(vae: DiscreteVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise(5, 16, 24, 3)
    remade, codes = reconstruct(vae, images, precision=FP32)
    assert (codes.shape, codes.dtype) == ((5, 4, 6), np.int64) and codes.max() < 15
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    assert np.array_equal(codes, vae.encode(pixels).numpy())
    expected = (vae.decode(torch.from_numpy(codes)) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert remade.dtype == np.uint8 and np.array_equal(remade, expected)
    assert remade.std() > 1, "a blank picture would make this test blind"
    monkeypatch.setattr("dvae.reconstruct._MOST_AT_ONCE", 2)
    assert np.array_equal(encode_images(vae, images, precision=FP32), codes)
    assert np.array_equal(decode_grids(vae, codes.astype(np.uint16), precision=FP32), remade)


def test_every_readable_image_gets_its_sheet(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    out = tmp_path / "out"
    assert main([model, save(tmp_path / "a.png", 50), str(broken), "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    (line,) = printed.out.splitlines()
    assert json.loads(line)["path"] == str(out / "a-reconstruction.png")
    assert (out / "a-reconstruction.png").exists()
    assert "broken.png" in printed.err


def test_images_of_equal_stems_get_a_sheet_each(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [save(tmp_path / "a" / "x.png", 16), save(tmp_path / "b" / "x.png", 32)]
    for _ in range(2):  # again, the same files
        assert main([model, *images, "--out", str(tmp_path / "out"), "--json"]) == 0
        paths = [Path(json.loads(line)["path"]) for line in capsys.readouterr().out.splitlines()]
        assert [path.name for path in paths] == ["x-reconstruction.png", "x-reconstruction-2.png"]
        assert sorted((tmp_path / "out").iterdir()) == sorted(paths)
    assert paths[0].read_bytes() != paths[1].read_bytes()


def test_a_folder_stands_for_the_images_in_it(tmp_path: Path) -> None:
    for name in ("d.png", "b.png", "a.JPG", "e.webp", "c.tiff", "f.gif", ".hidden.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "inner.png").mkdir()
    files = image_files(["x.png", str(tmp_path), "y.png"])
    inside = ["a.JPG", "b.png", "c.tiff", "d.png", "e.webp", "f.gif"]
    assert files == ["x.png", *(str(tmp_path / name) for name in inside), "y.png"]
    with pytest.raises(UserError, match="no images in .*inner.png: expected png"):
        image_files([str(tmp_path / "inner.png")])


def test_all_images_of_a_folder_can_share_one_sheet(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, size in (("b.png", 50), ("a.png", 24)):
        save(tmp_path / "photos" / name, size)
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")
    together = tmp_path / "sheets" / "all.png"
    assert main([model, "photos", "--together", str(together), "--json"]) == 0
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [(line["image"], line["path"]) for line in lines] == [("a.png", str(together)), ("b.png", str(together))]
    assert "broken.png" in printed.err
    assert not (tmp_path / "out").exists(), "no sheets besides"
    described = json.loads(read_png_text(together)["tessera"])["images"]
    assert [image["psnr"] for image in described] == [line["psnr"] for line in lines]
    assert run_command(main, [model, "photos/broken.png", "--together", str(tmp_path / "none.png")]) == 2
    assert not (tmp_path / "none.png").exists()
    assert main([model, "photos/a.png", "--together", str(tmp_path / "one.png")]) == 0
    with Image.open(together) as both, Image.open(tmp_path / "one.png") as one:
        assert one.height < both.height


def test_more_images_than_a_sheet_holds_are_left_out_aloud(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dvae.reconstruct.most_rows", lambda panel_pixels: 2)
    images = [save(tmp_path / f"{number}.png", 16) for number in range(3)]
    assert main([model, *images, "--together", str(tmp_path / "all.png")]) == 0
    printed = capsys.readouterr()
    assert "shows the first 2 of 3 images" in printed.err and "2 images, on average" in printed.out


def test_names_of_sheets_differ_whatever_the_images_are_called() -> None:
    names = sheet_names(["a/x.png", "b/x.jpg", "X.png", "x-2.png", "x-reconstruction.png", "x-reconstruction-2.png"])
    assert names[:3] == ["x-reconstruction.png", "x-reconstruction-2.png", "X-reconstruction-3.png"]
    assert len({name.casefold() for name in names}) == len(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}"], "required: images; see `tessera reconstruct --help`"),
        (["{model}", "x.png", "--longest", "wide"], "invalid int value: 'wide'"),
        (["{model}", "x.png", "--colour"], "unrecognized arguments: --colour"),
        (["nowhere", "x.png"], "no such model folder"),
        (["{model}", "x.png", "--longest", "0"], "--longest must be at least 1 pixel; got 0"),
        (["{model}", "x.png", "--out", __file__], "is a file, expected a folder"),
        (["{model}", "x.png", "--together", "x.jpg"], "--together must name a .png file in a folder; got x.jpg"),
        (["{model}", "x.png", "--together", __file__ + "/x.png"], "--together must name a .png file in a folder"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    model: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, [argument.format(model=model) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
