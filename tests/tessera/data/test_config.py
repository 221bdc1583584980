"""Opening a corpus for a stage: what it says of an ingest, to whom, and when it says nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes.planning import open_training_split
from tessera import progress
from tessera.data.config import DataConfig
from tessera.errors import UserError

SUMMARY = "seen 13 = kept 12 + rejected 1 + duplicate 0; rejected: 1 no caption"


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """12 images with captions and one without; manifests are kept."""
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(13):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:02}.png")
        if number < 12:
            (root / f"{number:02}.txt").write_text(f"picture {number}")
    return DataConfig(path=str(root), image_size=(8, 8), cache_dir=str(tmp_path / "cache"))


def test_an_ingest_is_summed_up_once(data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = data.open("train")
    refused = f"what was refused, and why: {tmp_path / 'cache' / 'rejects.jsonl'}"
    assert (tmp_path / "cache" / "rejects.jsonl").exists()
    assert capsys.readouterr() == ("", f"{SUMMARY}\n{refused}\n")
    data.open("validation", beside=corpus)
    data.open("validation")
    replace(data, path=str(tmp_path / "cache" / "manifest.jsonl")).open("train")
    assert capsys.readouterr() == ("", ""), "a manifest that is only read was checked before"


def test_an_ingest_for_each_split_is_summed_up_once(data: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    data = replace(data, cache_dir=None)
    data.open("train")
    data.open("validation")
    assert capsys.readouterr().err == f"{SUMMARY}\n"


def test_what_a_plan_has_summed_up_its_stages_do_not(data: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    open_training_split(data, said.append)
    data.open("train")
    assert said[0] == SUMMARY and capsys.readouterr().err == ""


def test_a_long_ingest_shows_how_far_it_is(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_SECONDS", 0.0)
    data.open("train")
    lines = capsys.readouterr().err.splitlines()
    assert lines[4].startswith("checking images  5 of 13  ") and lines[-2] == SUMMARY
    data.open("train")
    assert capsys.readouterr().err == ""


def test_of_several_processes_the_first_one_speaks(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = replace(data, cache_dir=None)  # each process then checks the images for itself
    monkeypatch.setattr(progress, "_LINE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    assert len(data.open("train")) == 10
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    data.open("train")
    assert capsys.readouterr().err.splitlines()[-1] == SUMMARY


def test_pictures_that_are_drawn_have_no_summary(capsys: pytest.CaptureFixture[str]) -> None:
    DataConfig(limit=3, image_size=(16, 16)).open("train")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "message"), [({"image_size": (7, 64)}, "got 7x64"), ({"cache_gib": -1.0}, "got -1")]
)
def test_sizes_that_cannot_be_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(**change)
