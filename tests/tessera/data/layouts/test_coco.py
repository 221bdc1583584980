import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tessera.data.candidates import NO_IMAGE_FOR_CAPTION, Candidate, Reject
from tessera.data.captions import NOTE_CLEANED
from tessera.data.layouts.coco import NOT_COCO, NOTE_NO_CAPTION, is_coco, read_coco
from tessera.data.reading import OUTSIDE

FILE = "annotations/captions_val2017.json"
IMAGES = [{"id": 9, "file_name": "9.jpg", "license": 3, "height": 8}, {"id": 25, "file_name": "25.jpg"}]
ANNOTATIONS = [
    {"image_id": 25, "id": 1, "caption": "a  giraffe"},
    {"image_id": 9, "id": 2, "caption": "bins of food"},
    {"image_id": 25, "id": 3, "caption": "two giraffes"},
    {"image_id": 25, "id": 4, "caption": "a giraffe\n"},
]


def write(root: Path, images: Any = IMAGES, annotations: Any = ANNOTATIONS, *, file: str = FILE) -> Path:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"info": {"year": 2017}, "licenses": [{"id": 1}], "images": images, "annotations": annotations}
    path.write_text(json.dumps(content, indent=1))
    return path


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def read(root: Path, file: str = FILE) -> tuple[dict[str, tuple[str, ...]], dict[str, str], Counter[str]]:
    """Captions by image, reasons by place, and the notes."""
    notes: Counter[str] = Counter()
    items = list(read_coco(root, file, notes))
    candidates = {item.location.file: item.captions for item in items if isinstance(item, Candidate)}
    return candidates, dict(item for item in items if isinstance(item, Reject)), notes


def test_images_meet_their_captions(tmp_path: Path) -> None:
    write(tmp_path)
    touch(tmp_path, "val2017/9.jpg")
    candidates, rejects, notes = read(tmp_path)
    assert candidates == {"val2017/9.jpg": ("bins of food",), "val2017/25.jpg": ("a giraffe", "two giraffes")}
    assert not rejects
    assert notes == {"images of captions_val2017.json found in val2017": 1}


@pytest.mark.parametrize(
    "folder",
    ["annotations", "", "val2017", "annotations/val2017", "images/val2017", "images", "annotations/images"],
)
def test_the_folder_of_the_images_is_found(tmp_path: Path, folder: str) -> None:
    write(tmp_path)
    touch(tmp_path, "elsewhere/9.jpg", f"{folder}/9.jpg" if folder else "9.jpg")
    candidates, rejects, notes = read(tmp_path)
    assert list(candidates) == [os.path.join(folder, "9.jpg"), os.path.join(folder, "25.jpg")] and not rejects
    assert notes == {f"images of captions_val2017.json found in {folder or '.'}": 1}


def test_the_first_image_need_not_be_there(tmp_path: Path) -> None:
    write(tmp_path, file="captions.json")
    touch(tmp_path, "images/25.jpg")
    assert list(read(tmp_path, "captions.json")[0]) == ["images/9.jpg", "images/25.jpg"]


def test_images_that_lie_nowhere_are_one_reject_that_says_where_they_were_looked_for(tmp_path: Path) -> None:
    write(tmp_path)
    touch(tmp_path, "pictures/9.jpg")
    candidates, rejects, _ = read(tmp_path)
    assert not candidates
    assert list(rejects) == [FILE]
    assert rejects[FILE].startswith("images not found: '9.jpg' in none of annotations, ., annotations/val2017, val2017")


def test_images_above_the_root_are_pointed_out(tmp_path: Path) -> None:
    write(tmp_path)
    touch(tmp_path, "val2017/9.jpg")
    root = tmp_path / "annotations"
    rejects = read(root, "captions_val2017.json")[1]
    assert rejects == {"captions_val2017.json": f"images lie outside of the folder: ingest {tmp_path} instead"}


def test_captions_without_images_are_rejected_and_images_without_captions_left_to_others(tmp_path: Path) -> None:
    write(tmp_path, IMAGES, [{"image_id": 9, "caption": ""}, {"image_id": 10, "caption": "nobody's"}])
    touch(tmp_path, "val2017/9.jpg")
    candidates, rejects, _ = read(tmp_path)
    assert candidates == {"val2017/9.jpg": ("",), "val2017/25.jpg": ()}
    assert rejects == {f"{FILE}: annotations[1]": NO_IMAGE_FOR_CAPTION}


def test_odd_entries_are_rejected_one_by_one(tmp_path: Path) -> None:
    odd = [{"id": 9, "file_name": "other.jpg"}, {"id": [1], "file_name": "x.jpg"}, {"id": 2}, 7, None]
    captions = [
        *ANNOTATIONS,
        {"image_id": 9, "caption": ["listed", "a\0b"]},
        {"image_id": {}, "caption": "x"},
        {"image_id": 9, "bbox": [1, 2, 3, 4]},
        "x",
    ]
    write(tmp_path, [*IMAGES, *odd], captions)
    touch(tmp_path, "val2017/9.jpg")
    candidates, rejects, notes = read(tmp_path)
    assert candidates["val2017/9.jpg"] == ("bins of food", "listed", "ab") and len(candidates) == 2
    assert rejects == {
        f"{FILE}: images[2]": "duplicate id: 9",
        **{f"{FILE}: images[{number}]": "image without id or file_name" for number in (3, 4, 5, 6)},
        f"{FILE}: annotations[5]": NO_IMAGE_FOR_CAPTION,
    }
    assert notes[NOTE_NO_CAPTION] == 2 and notes[NOTE_CLEANED] == 1


def test_names_that_lead_out_of_the_folder_are_rejected(tmp_path: Path) -> None:
    names = ["9.jpg", "../../up.jpg", "/etc/passwd", "a/../../../up.jpg", "..", "a/../fine.jpg"]
    write(tmp_path, [{"id": number, "file_name": name} for number, name in enumerate(names)], [])
    touch(tmp_path, "val2017/9.jpg")
    touch(tmp_path.parent, "up.jpg")
    candidates, rejects, _ = read(tmp_path)
    assert list(candidates) == ["val2017/9.jpg", ".", "val2017/fine.jpg"]
    assert list(rejects.values()) == [OUTSIDE] * 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b'{"images": [', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"images": {}, "annotations": []}', NOT_COCO),
        (b'{"images": []}', NOT_COCO),
        (b'{"images": [], "annotations": []}', NOT_COCO),
        (b"[1, 2]", NOT_COCO),
    ],
)
def test_other_files_are_one_reject(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    candidates, rejects, _ = read(tmp_path, "a.json")
    assert not candidates and list(rejects) == ["a.json"] and rejects["a.json"].startswith(reason)
    assert not is_coco(tmp_path / "a.json")


def test_what_is_no_file_below_the_root_is_rejected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "outside.json").symlink_to("/dev/zero")
    for file in ("pipe.json", "outside.json", "missing.json", "nul\0.json"):
        assert len(list(read_coco(tmp_path, file, Counter()))) == 1
        assert not is_coco(tmp_path / file)


@pytest.mark.parametrize("is_coco_expected", [True, False])
def test_a_large_file_is_known_by_its_beginning_and_end(tmp_path: Path, is_coco_expected: bool) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.write(b'{"info": {"year": 2017}, "images": [{"id": 9, "file_name": "9.jpg"},')
        file.seek(2**40)  # a hole of a tebibyte: whoever read all of it would not come back
        caption = b'"caption": "a"' if is_coco_expected else b'"bbox": [1, 2, 3, 4]'
        file.write(b'], "annotations": [{"image_id": 9, ' + caption + b"}]}")
    assert is_coco(path) == is_coco_expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"annotations": [{"image_id": 1, "caption": "x"}], "images": []}', True),
        ('\ufeff {"images": [{"id": 1, "file_name": "x"}], "annotations": [{"caption": "x"}]}', True),
        ('{"annotations": [{"image_id": 1, "bbox": []}], "images": [{"caption": 1}]}', False),
        ('{"caption": "a star", "url": "http://x", "images": 1}', False),
        ('{"images": [], "caption": "x"}', False),
        ('["images", "caption"]', False),
        ('{"info": "' + "x" * 100_000 + '", "images": [{"id": 1, "file_name": "x"}], "caption": ""}', False),
    ],
)
def test_captions_beside_images_and_other_tables_are_told_apart(tmp_path: Path, content: str, expected: bool) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    assert is_coco(tmp_path / "a.json") == expected
