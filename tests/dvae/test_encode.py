"""Encoding a corpus as a command: codes and captions, going on after an interruption, views, what is reported."""

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from dvae import encode as encode_module
from dvae.encode import EncodeConfig, encode, main
from dvae.model import DiscreteVAE, DiscreteVAEConfig, load
from dvae.pixels import to_float
from tessera.config import to_plain
from tessera.data.config import DataConfig
from tessera.data.corpus import load_images
from tessera.data.ingest import ingest
from tessera.data.shards import TokenShards
from tessera.errors import UserError
from tessera.model_folder import ModelFolder, write_part

SIZE = (16, 24)
SCENES = DataConfig(path="scenes", image_size=SIZE, limit=20)
MODEL = DiscreteVAEConfig(widths=(8, 16), blocks=(0, 1), levels=(8, 5, 5))


@pytest.fixture(autouse=True)
def _batches_of_six_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_module, "_CPU_PIXELS", 6 * SIZE[0] * SIZE[1])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A model folder with an untrained dvae, and a folder of nine pictures with its manifest."""
    write_dvae(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(9):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
        (tmp_path / "photos" / f"{number}.txt").write_text(f"picture {number}")
    ingest(tmp_path / "photos", directory=tmp_path / "manifest")
    return tmp_path


def write_dvae(project: Path) -> None:
    vae = DiscreteVAE(MODEL)
    write_part(project / "model", "dvae", config=to_plain(MODEL), tensors=vae.state_dict())


def config_of(project: Path, **changes: Any) -> EncodeConfig:
    config = EncodeConfig(
        data=SCENES, out=str(project / "model"), shards=str(project / "shards"), vocab_size=300, device="cpu"
    )
    return replace(config, **changes)


def photos(project: Path, **changes: Any) -> DataConfig:
    """The pictures by their manifest, which is not compared with the files again."""
    return DataConfig(path=str(project / "manifest" / "manifest.jsonl"), image_size=SIZE, **changes)


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def interrupt(monkeypatch: pytest.MonkeyPatch, *, before: int, then: Callable[[], None] = lambda: None) -> None:
    """Lets the user press Ctrl-C while a batch is encoded, counted from 0; afterwards nothing is pressed any more."""
    original, encoded = DiscreteVAE.encode, 0

    def encode_batch(vae: DiscreteVAE, images: Tensor) -> Tensor:
        nonlocal encoded
        if encoded == before:
            monkeypatch.setattr(DiscreteVAE, "encode", original)
            then()
            raise KeyboardInterrupt
        encoded += 1
        return original(vae, images)

    monkeypatch.setattr(DiscreteVAE, "encode", encode_batch)


def test_codes_and_captions_are_those_of_the_corpus(project: Path) -> None:
    result = encode(config_of(project))
    assert (result["num_samples"], result["encoded"], result["grid"]) == (20, 20, [2, 3])
    assert result["seconds"] > 0 and 0 < result["waiting_share"] < 1
    assert result["images_per_second"] == pytest.approx(20 / result["seconds"])
    shards, corpus = TokenShards(project / "shards"), SCENES.open("train")
    vae = load(ModelFolder.open(project / "model", parts=["dvae"]))
    codes = vae.encode(to_float(torch.from_numpy(load_images(corpus))))
    assert shards.codes.shape == (20, 1, 6)
    assert (shards.codes.reshape(codes.shape) == codes.numpy()).mean() > 0.99, "up to the rounding of other batches"
    assert [shards.captions(index) for index in range(20)] == [corpus.captions(index) for index in range(20)]


def test_the_same_shards_are_not_made_again(project: Path) -> None:
    config = config_of(project)
    encode(config)
    written = (project / "shards" / "codes.u16").stat().st_mtime_ns
    for same in (config, replace(config, crop_scale=0.9)):
        result = encode(same)
        assert (result["encoded"], result["images_per_second"], result["waiting_share"]) == (0, 0.0, 0.0)
    assert (project / "shards" / "codes.u16").stat().st_mtime_ns == written


@pytest.mark.parametrize("crops", [1, 3])
@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_ctrl_c_loses_no_batch_and_changes_no_byte(
    before: int, crops: int, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(project, crops=crops)
    whole = replace(config, shards=str(project / "whole"))
    encode(whole)
    interrupt(monkeypatch, before=before)
    with pytest.raises(KeyboardInterrupt):
        encode(config)
    assert encode(config)["encoded"] == 20 - before * 6 // crops
    assert content(project / "shards") == content(project / "whole")


@pytest.mark.parametrize(
    "change",
    [
        {"crops": 3},
        {"crops": 2, "flip": True},
        {"crops": 2, "crop_scale": 0.9},
        {"data": replace(SCENES, seed=1)},
        {"data": replace(SCENES, limit=19)},
    ],
)
def test_other_settings_start_afresh(change: dict[str, Any], project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, before=1)
    with pytest.raises(KeyboardInterrupt):
        encode(config_of(project, crops=2))
    result = encode(config_of(project, **{"crops": 2, **change}))
    assert result["encoded"] == result["num_samples"]


def test_another_dvae_starts_afresh(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, before=1)
    with pytest.raises(KeyboardInterrupt):
        encode(config_of(project))
    write_dvae(project)
    assert encode(config_of(project))["encoded"] == 20


def test_captions_stay_with_the_pictures_that_were_encoded(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(project, data=photos(project), crops=3)  # two samples a batch
    second = project / "photos" / "1.png"
    sound = second.read_bytes()
    second.unlink()  # the picture after it takes its place

    def repair() -> None:
        second.write_bytes(sound)
        (project / "photos" / "6.png").unlink()

    interrupt(monkeypatch, before=2, then=repair)
    with pytest.raises(KeyboardInterrupt):
        encode(config)
    assert encode(config)["encoded"] == 9 - 4
    shards, names = TokenShards(project / "shards"), [0, 2, 2, 3, 4, 5, 7, 7, 8]
    assert [shards.captions(index) for index in range(9)] == [(f"picture {name}",) for name in names]
    assert (shards.codes[1, 0] == shards.codes[2, 0]).all() and (shards.codes[6, 0] == shards.codes[7, 0]).all()


def test_the_seed_matters_where_there_are_crops(project: Path) -> None:
    for crops, encoded in ((1, 0), (2, 9)):
        config = config_of(project, data=photos(project), crops=crops)
        encode(config)
        assert encode(replace(config, data=photos(project, seed=1)))["encoded"] == encoded


def test_the_first_view_is_the_picture_and_the_others_are_not(project: Path) -> None:
    plain = config_of(project, data=photos(project))
    for crops, shards in ((1, "one"), (2, "two"), (5, "five")):
        encode(replace(plain, crops=crops, shards=str(project / shards)))
    one, two, five = (TokenShards(project / name).codes for name in ("one", "two", "five"))
    assert (one.shape, five.shape) == ((9, 1, 6), (9, 5, 6))
    assert (five[:, :1] == one).all() and (five[:, :2] == two).all()
    assert all(len(np.unique(views, axis=0)) == 5 for views in five)


def test_pictures_of_an_earlier_stage_are_not_drawn_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = photos(project, cache_dir=str(project / "cache"))
    encode(config_of(project, data=data, shards=str(project / "read")))
    load_images(data.open("train"), directory=data.cache_path)
    monkeypatch.setattr("tessera.data.corpus.ManifestCorpus.picture", None)
    encode(config_of(project, data=data))
    assert content(project / "shards") == content(project / "read")


def test_a_log_file_gets_lines_and_the_user_the_speed(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encode_module, "_LINE_EVERY_SECONDS", 0.0)
    arguments = [f"out={project / 'model'}", f"shards={project / 'shards'}", "device=cpu", "data.limit=20"]
    arguments += ["data.image_size=[16,24]", "text_len=8"]
    interrupt(monkeypatch, before=1)
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "crops=2"])
    capsys.readouterr()
    assert main([*arguments, "crops=2"]) == 0
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 6 and lines[0].startswith("encode  6 of 20  ")
    assert lines[-1].startswith("encode  20 of 20  ") and lines[-1].endswith("  0 s left")
    assert all("images/s  waiting" in line for line in lines)
    assert f"20 images, 2 views of each, as 2x3 codes in {project / 'shards'}; " in printed.out
    assert " images/s, " in printed.out and "% waiting for pictures; 8 text positions, " in printed.out
    main([*arguments, "crops=2"])
    assert "codes in" in (again := capsys.readouterr().out) and "; encoded before; 8 text positions" in again


def test_a_terminal_gets_a_bar(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(
        encode_module, "Console", lambda **_: Console(file=written, force_terminal=True, width=120, color_system=None)
    )
    encode(config_of(project))
    assert re.search(r"encode  [\d,]+ images/s  waiting \d+% ━+ 20/20 ", written.getvalue())


def test_settings_out_of_range_are_refused(project: Path) -> None:
    for change, message in (
        ({"crops": 0}, "crops must be at least 1; got 0"),
        ({"crop_scale": 0.4}, r"crop_scale must lie in \[0.5, 1\]; got 0.4"),
        ({"flip": True}, "flip mirrors crops and there are none"),
        ({"bpe_dropout": 1.0}, r"bpe_dropout must lie in \[0, 1\); got 1.0"),
    ):
        with pytest.raises(UserError, match=message):
            config_of(project, **change)
    with pytest.raises(UserError, match=r"data.image_size must be divisible by 8, as this dvae needs; got 20x24"):
        encode(config_of(project, data=replace(SCENES, image_size=(20, 24))))
