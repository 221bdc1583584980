import io
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pytest
from PIL import Image

from tessera.data.candidates import Candidate, Location, Reject
from tessera.data.images import ImageError
from tessera.data.layouts import hugging_face
from tessera.data.layouts.hugging_face import (
    NO_COLUMN,
    NO_IMAGE,
    dataset_fingerprint,
    is_saved_dataset,
    read_dataset,
    read_image,
)
from tessera.data.layouts.parquet import NO_CAPTION
from tessera.errors import UserError

CAPTIONS_FROM_TEXT = "captions taken from column 'text'"


@pytest.fixture(autouse=True)
def _quiet_and_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    datasets.disable_progress_bars()


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def made_of(images: Sequence[Any], split: str | None = None, **columns: Any) -> datasets.Dataset:
    """Of bytes, or of whatever a row is to hold instead."""
    rows = [{"bytes": image, "path": None} if isinstance(image, bytes) else image for image in images]
    table = pyarrow.table({"picture": pyarrow.array(rows, datasets.Image().pa_type), **columns})
    return datasets.Dataset(table, split=datasets.NamedSplit(split) if split else None).cast_column(
        "picture", datasets.Image()
    )


def save(made: datasets.Dataset, folder: Path) -> str:
    made.save_to_disk(str(folder))
    return str(folder)


def save_splits(folder: Path, **made: datasets.Dataset) -> str:
    splits: dict[str | datasets.NamedSplit, datasets.Dataset] = {**made}
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return str(folder)


def save_as_it_is(made: datasets.Dataset, folder: Path) -> str:
    """Saves rows without images, for which the library would look by the names in them."""
    save(made_of([png(0)] * len(made), text=["a"] * len(made)), folder)
    with pyarrow.ipc.new_stream(folder / "data-00000-of-00001.arrow", made.data.schema) as file:
        file.write_table(made.data.table)
    return str(folder)


def read(spec: str) -> tuple[dict[int | None, tuple[str, ...]], dict[str, str], Counter[str]]:
    """Captions by row, reasons by place, and the notes."""
    notes: Counter[str] = Counter()
    items = list(read_dataset(spec, notes))
    candidates = {item.location.row: item.captions for item in items if isinstance(item, Candidate)}
    return candidates, dict(item for item in items if isinstance(item, Reject)), notes


def test_a_saved_data_set_is_read_as_it_was_stored(tmp_path: Path) -> None:
    images = [png(shade) for shade in range(150)]
    spec = save(made_of(images, text=[f" caption  {number}" for number in range(150)]), tmp_path / "saved")
    notes: Counter[str] = Counter()
    assert list(read_dataset(f"hf:{spec}", notes)) == [
        Candidate(Location(f"hf:{spec}", row=row), (f"caption {row}",)) for row in range(150)
    ]
    assert notes == {CAPTIONS_FROM_TEXT: 1}
    assert [read_image(spec, row) for row in range(150)] == images
    assert read_image(f"hf:{spec}", 3) == images[3]


def test_captions_may_be_lists_in_a_column_of_any_of_the_names(tmp_path: Path) -> None:
    made = made_of([png(1), png(2)], Captions=[["one", "two"], []], title=["no", "no"], prompt=["last", "last"])
    candidates, rejects, notes = read(save(made, tmp_path / "saved"))
    assert candidates == {0: ("one", "two")}
    assert rejects == {f"{tmp_path / 'saved'} row 1": NO_CAPTION}
    assert notes == {"captions taken from column 'Captions'": 1}


def test_splits_are_asked_for_by_name_and_train_is_the_default(tmp_path: Path) -> None:
    made = {name: made_of([png(shade)], name, text=[name]) for shade, name in enumerate(("test", "train"))}
    spec = save_splits(tmp_path / "saved", **made)
    assert read(spec)[0] == {0: ("train",)} and read_image(spec, 0) == png(1)
    assert read(f"hf:{spec}:test")[0] == {0: ("test",)} and read_image(f"hf:{spec}:test", 0) == png(0)
    assert read(spec)[2] == {CAPTIONS_FROM_TEXT: 1, "split 'test' of a data set passed over": 1}
    (candidate,) = read_dataset(f"{spec}:test", Counter())
    assert isinstance(candidate, Candidate) and candidate.location.file == f"hf:{spec}:test"
    with pytest.raises(UserError, match="has no split 'validation': expected test, train$"):
        read(f"{spec}:validation")


def test_without_a_split_for_training_the_first_one_is_read(tmp_path: Path) -> None:
    made = {name: made_of([png(1)], text=[name]) for name in ("easy", "hard")}
    assert read(save_splits(tmp_path / "saved", **made))[0] == {0: ("easy",)}


def test_a_saved_split_is_not_taken_for_another(tmp_path: Path) -> None:
    spec = save(made_of([png(1)], "validation", text=["a"]), tmp_path / "saved")
    assert read(f"{spec}:validation")[0] == read(spec)[0] == {0: ("a",)}
    with pytest.raises(UserError, match="has no split 'train': it was saved as validation$"):
        read(f"{spec}:train")


def test_folders_with_colons_are_found(tmp_path: Path) -> None:
    for folder in ("a", "a:b"):
        (tmp_path / folder).mkdir()
    spec = save_splits(tmp_path / "a:b:test", test=made_of([png(1)], text=["a"]))
    assert read(spec)[0] == read(f"{spec}:test")[0] == {0: ("a",)}


def test_rows_without_images_are_rejected(tmp_path: Path) -> None:
    made = made_of([png(1), None, {"bytes": None, "path": None}, png(2)], text=["a", "b", "c", None])
    spec = save_as_it_is(made, tmp_path / "saved")
    candidates, rejects, _ = read(spec)
    assert candidates == {0: ("a",)}
    assert rejects == {f"{spec} row 1": NO_IMAGE, f"{spec} row 2": NO_IMAGE, f"{spec} row 3": NO_CAPTION}
    for row, reason in ((1, NO_IMAGE), (4, "no row 4: the data set has 4"), (-1, "no row -1")):
        with pytest.raises(ImageError, match=f"^{reason}"):
            read_image(spec, row)


def test_files_that_rows_name_are_read_from_the_data_set_and_the_cache_only(tmp_path: Path) -> None:
    for name in ("secret.png", "cache/ours.png", "saved/beside.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(7))
    names = ["secret.png", "cache/ours.png", "saved/beside.png", "saved/../secret.png", "cache/\0.png"]
    made = made_of([{"bytes": None, "path": str(tmp_path / name)} for name in names], text=["a"] * 5)
    spec = save_as_it_is(made, tmp_path / "saved")
    candidates, rejects, _ = read(spec)
    assert list(candidates) == [1, 2]
    assert read_image(spec, 1) == read_image(spec, 2) == png(7)
    assert list(rejects) == [f"{spec} row {row}" for row in (0, 3, 4)]
    for row in (0, 3, 4):
        with pytest.raises(ImageError, match=r"^points outside the folder|^cannot be read: .*null"):
            read_image(spec, row)


def test_loose_files_that_were_downloaded_from_the_hub_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "disk" / "datasets--someone--photos"
    for folder in ("blobs", "snapshots"):
        (repository / folder).mkdir(parents=True)
    (repository / "blobs" / "0a1b").write_bytes(png(7))
    (repository / "snapshots" / "a.png").symlink_to("../blobs/0a1b")
    (tmp_path / "secret.png").write_bytes(png(8))
    (repository / "snapshots" / "b.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "moved").symlink_to("disk")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "moved"))
    names = [tmp_path / "moved" / repository.name / "snapshots" / name for name in ("a.png", "b.png")]
    spec = save_as_it_is(
        made_of([{"bytes": None, "path": str(name)} for name in names], text=["a", "b"]), tmp_path / "s"
    )
    candidates, rejects, _ = read(spec)
    assert candidates == {0: ("a",)} and read_image(spec, 0) == png(7)
    assert list(rejects) == [f"{spec} row 1"] and rejects[f"{spec} row 1"].startswith("points outside")


def test_data_sets_of_other_things_are_one_reject(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"text": ["a"], "image": ["a.png"]})
    spec = save(made, tmp_path / "saved")
    assert read(spec) == ({}, {spec: NO_COLUMN}, {})


def test_of_several_columns_of_images_the_first_is_read(tmp_path: Path) -> None:
    made = made_of([png(1)], text=["a"]).add_column("mask", [{"bytes": png(2), "path": None}])
    with_mask = made.cast_column("mask", datasets.Image())
    assert isinstance(with_mask, datasets.Dataset)
    spec = save(with_mask, tmp_path / "saved")
    assert read(spec)[2] == {CAPTIONS_FROM_TEXT: 1, "column 'mask' of images passed over": 1}
    assert read_image(spec, 0) == png(1)


def test_threads_that_read_the_same_rows_get_the_same_bytes(tmp_path: Path) -> None:
    images = [png(shade) for shade in range(50)]
    spec = save(made_of(images, text=["a"] * 50), tmp_path / "saved")
    rows = list(range(50)) * 6
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda row: read_image(spec, row), rows)) == [images[row] for row in rows]


def test_a_data_set_that_was_saved_anew_is_opened_again(tmp_path: Path) -> None:
    spec = save(made_of([png(1)], text=["old"]), tmp_path / "saved")
    assert read_image(spec, 0) == png(1)
    save(made_of([png(2)], text=["new"]), tmp_path / "other")
    for file in (tmp_path / "other").iterdir():
        os.replace(file, tmp_path / "saved" / file.name)
    assert read_image(spec, 0) == png(2)


def test_the_fingerprint_changes_with_the_content_and_with_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    found = []
    for lines in (["a"], ["a"], ["a", "b"]):
        for name in lines:
            if not (folder / f"{name}.png").exists():
                (folder / f"{name}.png").write_bytes(png(5))
                with (folder / "metadata.jsonl").open("a") as file:
                    file.write(f'{{"file_name": "{name}.png", "text": "{name}"}}\n')
        hugging_face._open_once.cache_clear()  # as in another process
        found.append(dataset_fingerprint(f"hf:{folder}"))
    assert found[0] == found[1] != found[2]
    assert [text.split()[1] for text in found] == ["1", "1", "2"]


def test_the_fingerprint_is_that_of_the_split_and_of_what_was_saved_last(tmp_path: Path) -> None:
    made = {name: made_of([png(shade)], name, text=[name]) for shade, name in enumerate(("test", "train"))}
    spec = save_splits(tmp_path / "saved", **made)
    assert dataset_fingerprint(spec) == dataset_fingerprint(f"hf:{spec}:train") != dataset_fingerprint(f"{spec}:test")
    spec = save(made_of([png(1)], text=["old"]), tmp_path / "one")
    old = dataset_fingerprint(spec)
    save(made_of([png(1)], text=["new"]), tmp_path / "other")
    for file in (tmp_path / "other").iterdir():
        os.replace(file, tmp_path / "one" / file.name)
    assert dataset_fingerprint(spec) != old


def test_the_fingerprint_of_what_holds_no_images_is_the_reason(tmp_path: Path) -> None:
    spec = save(datasets.Dataset.from_dict({"text": ["a"]}), tmp_path / "saved")
    assert dataset_fingerprint(spec) == NO_COLUMN
    with pytest.raises(UserError, match=r"^cannot load data set "):
        dataset_fingerprint(f"hf:{tmp_path / 'missing'}")


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = save_splits(tmp_path / "saved", test=made_of([png(1)], text=["a"]))
    monkeypatch.setenv("HOME", str(tmp_path))
    (candidate,) = read_dataset("hf:~/saved:test", Counter())
    assert candidate == Candidate(Location(f"hf:{spec}:test", row=0), ("a",))
    assert dataset_fingerprint("hf:~/saved") == dataset_fingerprint(spec)


def test_a_folder_of_images_is_loaded_with_the_library(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(5))
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a square"}\n')
    assert not is_saved_dataset(folder)
    assert read(f"hf:{folder}")[0] == {0: ("a square",)}
    assert read_image(f"hf:{folder}", 0) == png(5)


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("content", [b"", b"[]", b"noise" * 100])
def test_damaged_data_sets_are_one_reject(tmp_path: Path, file: str, content: bytes) -> None:
    spec = save(made_of([png(1)], text=["a"]), tmp_path / "saved")
    (tmp_path / "saved" / file).write_bytes(content)
    candidates, rejects, _ = read(spec)
    assert not candidates and list(rejects) == [spec]
    assert rejects[spec].startswith(("damaged: ", NO_COLUMN))
    with pytest.raises(ImageError):
        read_image(spec, 0)


def test_only_what_the_library_has_saved_is_taken_for_that(tmp_path: Path) -> None:
    save_splits(tmp_path / "saved", train=made_of([png(1)], text=["a"]))
    assert is_saved_dataset(tmp_path / "saved") and is_saved_dataset(tmp_path / "saved" / "train")
    assert not is_saved_dataset(tmp_path) and not is_saved_dataset(tmp_path / "missing")


def test_what_cannot_be_loaded_is_told_to_the_user(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for spec in ("hf:", f"hf:{tmp_path / 'missing'}", f"hf:{tmp_path / 'empty'}:train"):
        with pytest.raises(UserError, match=r"^cannot load data set "):
            read(spec)


def test_without_the_library_the_user_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = save(made_of([png(1)], text=["a"]), tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'pip install "tessera\[hf\]"'):
        read(spec)
