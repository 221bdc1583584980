import dataclasses
import os
import random
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tessera.data.candidates import Candidate, Location, Reject
from tessera.data.images import ImageError
from tessera.data.layouts import parquet
from tessera.data.layouts.parquet import (
    NO_CAPTION,
    NO_COLUMN,
    NO_IMAGE,
    NOTE_SEVERAL,
    NOTE_SLOW,
    has_images,
    read_image,
    read_parquet,
)
from tessera.errors import UserError

FILE = "data/train.parquet"
STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


@pytest.fixture
def read_row_groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The row groups whose images are read, in their order, growing as they are."""
    groups: list[int] = []
    read_images = parquet._read_images

    def spy(table: Any, group: int) -> Any:
        groups.append(group)
        return read_images(table, group)

    monkeypatch.setattr(parquet, "_read_images", spy)
    return groups


def image(content: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": content, "path": path}


def write(root: Path, columns: dict[str, Any], **options: Any) -> Path:
    path = root / FILE
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def read(root: Path) -> tuple[dict[int | None, tuple[str, ...]], dict[str, str], Counter[str]]:
    """Captions by row, reasons by place, and the notes."""
    notes: Counter[str] = Counter()
    items = list(read_parquet(root, FILE, notes))
    candidates = {item.location.row: item.captions for item in items if isinstance(item, Candidate)}
    return candidates, dict(item for item in items if isinstance(item, Reject)), notes


def test_hugging_face_keeps_images_in_structs(tmp_path: Path) -> None:
    images = pyarrow.array([image(b"first", "a.jpg"), image(b"second")], STRUCT)
    path = write(tmp_path, {"id": [7, 8], "image": images, "text": ["a  red star", None], "prompt": ["no", "a ring"]})
    assert has_images(path)
    assert list(read_parquet(tmp_path, FILE, Counter())) == [
        Candidate(Location(FILE, row=0), ("a red star",)),
        Candidate(Location(FILE, row=1), ("a ring",)),
    ]
    assert [read_image(path, row) for row in (0, 1)] == [b"first", b"second"]


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary()])
@pytest.mark.parametrize("name", ["jpg", "PNG", "webp", "image"])
def test_img2dataset_keeps_images_in_binary_columns(tmp_path: Path, name: str, kind: pyarrow.DataType) -> None:
    path = write(tmp_path, {"key": ["0", "1"], "caption": ["a", "b"], name: pyarrow.array([b"1", b"2"], kind)})
    assert has_images(path)
    assert read(tmp_path) == ({0: ("a",), 1: ("b",)}, {}, {})
    assert read_image(path, 1) == b"2"


def test_a_row_may_have_several_captions(tmp_path: Path) -> None:
    captions = [["one", "two ", "one"], [], ['["x"]'], None]
    write(tmp_path, {"image": pyarrow.array([image(b"x")] * 4, STRUCT), "Captions": captions})
    candidates, rejects, _ = read(tmp_path)
    assert candidates == {0: ("one", "two"), 2: ('["x"]',)}
    assert rejects == {f"{FILE} row 1": NO_CAPTION, f"{FILE} row 3": NO_CAPTION}


def test_rows_without_captions_are_rejected_one_by_one(tmp_path: Path) -> None:
    write(tmp_path, {"image": pyarrow.array([image(b"x")] * 200, STRUCT)})
    candidates, rejects, _ = read(tmp_path)
    assert not candidates and rejects == {f"{FILE} row {row}": NO_CAPTION for row in range(200)}


def test_rows_without_bytes_are_rejected_with_the_path_that_they_name(tmp_path: Path) -> None:
    images = [image(b"x"), image(None, "photos/a.jpg"), None, image(None, None), image(b"", "b.jpg")]
    path = write(
        tmp_path,
        {"image": pyarrow.array(images, STRUCT), "text": ["caption"] * 5},
        row_group_size=2,
    )
    candidates, rejects, _ = read(tmp_path)
    assert candidates == {0: ("caption",), 4: ("caption",)}
    assert rejects == {
        f"{FILE} row 1": f"{NO_IMAGE}: only the path 'photos/a.jpg'",
        f"{FILE} row 2": NO_IMAGE,
        f"{FILE} row 3": NO_IMAGE,
    }
    for row in (1, 2, 3):
        with pytest.raises(ImageError, match=f"^{NO_IMAGE}$"):
            read_image(path, row)
    assert read_image(path, 4) == b""


def test_missing_images_of_binary_columns_are_found(tmp_path: Path) -> None:
    write(tmp_path, {"jpg": [b"x", None], "caption": ["a", "b"]})
    assert read(tmp_path) == ({0: ("a",)}, {f"{FILE} row 1": NO_IMAGE}, {})


def test_tables_of_other_things_have_no_images(tmp_path: Path) -> None:
    write(tmp_path, {"image": ["a.jpg"], "text": ["a"], "embedding": [b"\0\0"]})
    assert not has_images(tmp_path / FILE)
    assert read(tmp_path)[1] == {FILE: NO_COLUMN}


def test_of_several_columns_of_images_the_likeliest_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {
            "conditioning": pyarrow.array([image(b"edges")], STRUCT),
            "image": pyarrow.array([image(b"photo")], STRUCT),
            "text": ["a"],
        },
    )
    assert read(tmp_path)[2] == {NOTE_SEVERAL: 1}
    assert read_image(path, 0) == b"photo"


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
def test_every_row_is_read_from_its_own_row_group(tmp_path: Path, compression: str) -> None:
    contents = [b"%d" % row * 50 for row in range(1_000)]
    path = write(tmp_path, {"jpg": contents}, row_group_size=70, compression=compression)
    assert all(read_image(path, row) == contents[row] for row in range(0, 1_000, 23))
    for row in (-1, 1_000):
        with pytest.raises(ImageError, match=f"^no row {row}: the file has 1000$"):
            read_image(path, row)


def test_threads_that_read_the_same_rows_get_the_same_bytes_and_read_a_row_group_once(
    tmp_path: Path, read_row_groups: list[int]
) -> None:
    contents = [random.randbytes(100) for _ in range(400)]
    path = write(tmp_path, {"jpg": contents}, row_group_size=100)
    rows = list(range(400)) * 3
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda row: read_image(path, row), rows)) == [contents[row] for row in rows]
    assert sorted(read_row_groups) == [0, 1, 2, 3]


def test_the_cache_is_bounded_and_gives_the_right_bytes_when_it_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "CACHE_BYTES", 25_000)
    contents = [random.randbytes(1_000) for _ in range(100)]
    path = write(tmp_path, {"jpg": contents}, row_group_size=10)
    parquet._row_groups_of.cache_clear()
    before = pyarrow.total_allocated_bytes()
    rows = [row * 7 % 100 for row in range(300)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda row: read_image(path, row), rows)) == [contents[row] for row in rows]
    assert pyarrow.total_allocated_bytes() - before < 60_000  # all of them are 100,000 bytes


def test_a_row_group_larger_than_the_cache_is_read_once_for_its_neighbors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_row_groups: list[int]
) -> None:
    monkeypatch.setattr(parquet, "CACHE_BYTES", 100)
    path = write(tmp_path, {"jpg": [random.randbytes(1_000) for _ in range(40)]}, row_group_size=20)
    for row in range(40):
        read_image(path, row)
    assert read_row_groups == [0, 1]


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path, {"jpg": [b"old"]})
    assert read_image(path, 0) == b"old"
    write(tmp_path, {"jpg": [b"newer", b"more"]})
    assert read_image(path, 0) == b"newer" and read_image(path, 1) == b"more"


def test_row_groups_too_large_for_memory_are_refused_and_large_ones_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, {"jpg": [b"x" * 3_000, b"y" * 50, b"z" * 50], "text": ["a", "b", "c"]}, row_group_size=2)
    monkeypatch.setattr(parquet, "MAX_ROW_GROUP_BYTES", 2_000)
    candidates, rejects, _ = read(tmp_path)
    assert candidates == {2: ("c",)} and set(rejects) == {f"{FILE} row 0", f"{FILE} row 1"}
    assert "row_group_size=100" in rejects[f"{FILE} row 0"]
    with monkeypatch.context() as patch:
        patch.setattr(parquet._Table, "batches", None)  # nothing of it is read
        with pytest.raises(ImageError, match="^row group too large"):
            read_image(path, 1)
    monkeypatch.setattr(parquet, "MAX_ROW_GROUP_BYTES", 2**20)
    monkeypatch.setattr(parquet, "SLOW_ROW_GROUP_BYTES", 2_000)
    assert read(tmp_path)[2] == {NOTE_SLOW: 1}


def test_a_small_row_group_that_unpacks_to_a_large_one_is_refused_and_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_row_groups: list[int]
) -> None:
    path = write(tmp_path, {"jpg": [b"x" * 1_000] * 200})  # one image in a dictionary, and two hundred references
    monkeypatch.setattr(parquet, "MAX_ROW_GROUP_BYTES", 100_000)
    assert parquet._describe(path).sizes[0] < 100_000
    for row in range(200):
        with pytest.raises(ImageError, match="^row group too large"):
            read_image(path, row)
    assert read_row_groups == [0]


@pytest.mark.parametrize("rows", [2, 4])
def test_a_row_group_of_another_length_than_its_footer_says_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    path = write(tmp_path, {"jpg": [b"x"] * 3, "text": ["a"] * 3})
    wrong = dataclasses.replace(parquet._describe(path), starts=(0, rows))
    monkeypatch.setattr(parquet, "_describe", lambda path: wrong)
    parquet._describe_once.cache_clear()
    with pytest.raises(ImageError, match="^damaged: a row group of more or fewer rows"):
        read_image(path, 0)
    parquet._describe_once.cache_clear()
    candidates, rejects, _ = read(tmp_path)
    assert len(candidates) <= rows and list(rejects) == [FILE]


def test_row_groups_of_negative_length_are_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, {"jpg": [b"x"] * 3, "text": ["a"] * 3})
    groups = [SimpleNamespace(num_rows=rows, total_byte_size=9) for rows in (5, -2)]
    lie = SimpleNamespace(
        schema=pyarrow.parquet.read_metadata(path).schema, num_row_groups=2, row_group=groups.__getitem__
    )
    monkeypatch.setattr(parquet, "_read_metadata", lambda path: lie)
    assert read(tmp_path)[1] == {FILE: "damaged: a row group of fewer than no rows"}


def test_a_caption_that_is_not_text_costs_its_row_only(tmp_path: Path) -> None:
    texts = pyarrow.array([b"good", b"\xff\xfe", b"also good"], pyarrow.binary()).view(pyarrow.string())
    write(tmp_path, {"jpg": [b"x"] * 3, "text": texts})
    candidates, rejects, _ = read(tmp_path)
    assert candidates == {0: ("good",), 2: ("also good",)}
    assert rejects == {f"{FILE} row 1": "damaged: a caption that is not UTF-8"}


def test_damaged_files_are_one_reject_behind_what_came_before(tmp_path: Path) -> None:
    path = write(tmp_path, {"jpg": [b"x" * 500] * 300, "text": ["a"] * 300}, row_group_size=100, compression="zstd")
    whole = path.read_bytes()
    place = pyarrow.parquet.read_metadata(path).row_group(1).column(1).data_page_offset
    path.write_bytes(whole[:place] + b"\xff" * 40 + whole[place + 40 :])
    candidates, rejects, _ = read(tmp_path)
    assert list(candidates) == list(range(100))
    assert list(rejects) == [FILE] and rejects[FILE].startswith("damaged: ")
    for content in (b"", b"PAR1", b"noise" * 100, whole[:-20], whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert not has_images(path)
        ((source, reason),) = read(tmp_path)[1].items()
        assert source == FILE and reason.startswith("damaged: ") and len(reason) < 120
        with pytest.raises(ImageError, match=r"^damaged: "):
            read_image(path, 0)


def test_what_is_no_file_below_the_root_is_rejected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.parquet")
    (tmp_path / "outside.parquet").symlink_to("/dev/zero")
    for file, reason in {
        "pipe.parquet": "not a regular file",
        "outside.parquet": "points outside the folder",
        "missing.parquet": "cannot be read: No such file or directory",
    }.items():
        assert list(read_parquet(tmp_path, file, Counter())) == [Reject(file, reason)]
    assert not has_images(tmp_path / "pipe.parquet")
    with pytest.raises(ImageError, match="cannot be read: No such file or directory"):
        read_image(tmp_path / "missing.parquet", 0)


def test_without_pyarrow_the_user_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, {"jpg": [b"x"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'pip install "tessera\[parquet\]"'):
        has_images(path)
    with pytest.raises(UserError, match=r'pip install "tessera\[parquet\]"'):
        list(read_parquet(tmp_path, FILE, Counter()))
