import ast
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from tessera.data import source as source_module
from tessera.data.candidates import Candidate, Location, Reject
from tessera.data.ingest import ingest
from tessera.data.layouts.coco import read_coco
from tessera.data.layouts.folder import NOTE_BESIDE_SHARD, NOTE_NO_IMAGES_INSIDE
from tessera.data.manifest_corpus import ManifestCorpus
from tessera.data.source import find_source
from tessera.errors import UserError

LAYOUTS = Path(source_module.__file__).with_name("layouts")


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def save(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def save_tar(path: Path, numbers: range) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            for suffix, content in ((".png", png(number)), (".txt", f"tar {number}".encode())):
                header = tarfile.TarInfo(f"{number:04}{suffix}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    return path


def save_parquet(path: Path, numbers: range) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(number), "path": None} for number in numbers]
    parquet.write_table(pyarrow.table({"image": images, "text": [f"parquet {number}" for number in numbers]}), path)
    return path


def save_coco(root: Path, numbers: range) -> Path:
    for number in numbers:
        save(root / "val2017" / f"{number:012}.png", png(number))
    content = {
        "images": [{"id": number, "file_name": f"{number:012}.png"} for number in numbers],
        "annotations": [{"id": n, "image_id": n, "caption": f"coco {n}"} for n in numbers],
    }
    return save(root / "annotations" / "captions_val2017.json", json.dumps(content))


@pytest.fixture
def everything(tmp_path: Path) -> Path:
    """Three images in each of several layouts, all below one folder."""
    root = tmp_path / "everything"
    save_tar(root / "shards" / "00000.tar", range(3))
    save(root / "shards" / "00000.parquet", "img2dataset's table")
    save(root / "shards" / "00000_stats.json", '{"count": 3}')
    save_parquet(root / "data" / "train.parquet", range(10, 13))
    parquet.write_table(pyarrow.table({"url": ["https://"]}), root / "data" / "urls.parquet")
    save_coco(root / "coco", range(20, 23))
    for number in range(30, 33):
        save(root / "loose" / f"{number}.png", png(number))
        save(root / "loose" / f"{number}.txt", f"loose {number}")
    save(root / "loose" / "copy.png", png(0))
    save(root / "loose" / "copy.txt", "copy of a member of the archive")
    return root


def test_a_folder_may_hold_images_in_every_layout(everything: Path, tmp_path: Path) -> None:
    manifest = ingest(everything, directory=tmp_path / "out")
    names = [record.location.name for record in manifest.records]
    assert names == [
        *(f"coco/val2017/{number:012}.png" for number in range(20, 23)),
        *(f"data/train.parquet row {row}" for row in range(3)),
        *(f"loose/{number}.png" for number in range(30, 33)),
        "loose/copy.png",
        *(f"shards/00000.tar/{number:04}.png" for number in (1, 2)),
    ]
    assert dict(manifest.duplicates) == {"shards/00000.tar/0000.png": "duplicate: same bytes as loose/copy.png"}
    assert (manifest.num_seen, len(manifest.rejects)) == (13, 0)
    assert manifest.notes[NOTE_BESIDE_SHARD] == manifest.notes[NOTE_NO_IMAGES_INSIDE] == 1
    corpus = ManifestCorpus(manifest, image_size=(9, 9))
    for index in range(len(corpus)):
        caption = corpus.captions(index)[0]
        number = 0 if caption.startswith("copy") else int(caption.split()[1])
        assert (corpus.image(index) == np.asarray(Image.open(io.BytesIO(png(number))))).all()
    assert corpus.num_substituted == 0


def test_whatever_changes_in_it_is_noticed(everything: Path) -> None:
    listings = {find_source(str(everything)).listing}
    for name in ("shards/00000.tar", "data/train.parquet", "coco/annotations/captions_val2017.json"):
        assert find_source(str(everything)).listing in listings
        with (everything / name).open("ab") as file:
            file.write(b"\n")
        listings.add(find_source(str(everything)).listing)
    assert len(listings) == 4
    save(everything / "shards" / "00000_stats.json", '{"count": 4}')
    assert find_source(str(everything)).listing in listings, "nothing is read from that"


def test_a_damaged_parquet_file_is_a_reject_and_one_without_images_is_not(everything: Path) -> None:
    path = everything / "data" / "train.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    manifest = ingest(everything)
    ((name, reason),) = manifest.rejects
    assert name == "data/train.parquet" and reason.startswith("damaged: ")
    assert manifest.notes[NOTE_NO_IMAGES_INSIDE] == 1


@pytest.mark.parametrize(
    ("name", "captions"),
    [
        ("shards/00000.tar", ["tar 0", "tar 1", "tar 2"]),
        ("data/train.parquet", ["parquet 10", "parquet 11", "parquet 12"]),
        ("coco/annotations/captions_val2017.json", ["coco 20", "coco 21", "coco 22"]),
    ],
)
def test_each_of_them_can_be_given_alone(everything: Path, name: str, captions: list[str]) -> None:
    assert [record.captions for record in ingest(everything / name).records] == [(caption,) for caption in captions]


@pytest.mark.parametrize("place", [".", "annotations", "val2017"])
def test_annotations_are_parsed_once_to_find_their_images(
    everything: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    file = everything / "coco" / place / "captions_val2017.json"
    (everything / "coco" / "annotations" / file.name).rename(file)
    parsed: list[Path] = []

    def counted(root: Path, name: str, notes: Counter[str]) -> Iterator[Candidate | Reject]:
        parsed.append(root)
        return read_coco(root, name, notes)

    monkeypatch.setattr("tessera.data.source.read_coco", counted)
    source = find_source(str(file))
    assert (len(parsed), source.num_images) == (1, 3)
    assert source.root == everything / "coco" / ("val2017" if place == "val2017" else "")
    names = [item.location.file for item in source.read(Counter()) if isinstance(item, Candidate)]
    assert all((source.root / name).is_file() for name in names) and len(names) == 3


def test_the_home_folder_of_a_saved_data_set_may_be_abbreviated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"image": [{"bytes": png(7), "path": None}], "text": ["seven"]})
    rows.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    monkeypatch.setenv("HOME", str(tmp_path))
    short, long = (find_source(f"hf:{folder}/saved") for folder in ("~", tmp_path))
    assert short.listing == long.listing
    assert list(short.read(Counter())) == list(long.read(Counter()))


def test_a_parquet_file_without_images_is_a_table_of_files(tmp_path: Path) -> None:
    save(tmp_path / "a.png", png(0))
    parquet.write_table(pyarrow.table({"file_name": ["a.png"], "text": ["hello"]}), tmp_path / "mine.parquet")
    source = find_source(str(tmp_path / "mine.parquet"))
    assert source.num_images == 1
    assert list(source.read(Counter())) == [Candidate(Location("a.png"), ("hello",))]


def test_data_sets_that_were_saved_are_read_in_folders_and_by_name(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    images = [{"bytes": png(number), "path": None} for number in range(3)]
    rows = datasets.Dataset.from_dict({"image": images, "text": ["zero", "one", "two"]})
    rows.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "root" / "saved"))
    for path in (str(tmp_path / "root"), str(tmp_path / "root" / "saved"), f"hf:{tmp_path / 'root' / 'saved'}"):
        manifest = ingest(path, directory=tmp_path / "out")
        corpus = ManifestCorpus(manifest, image_size=(9, 9))
        assert [corpus.captions(index) for index in range(3)] == [("zero",), ("one",), ("two",)]
        assert (corpus.image(1) == np.asarray(Image.open(io.BytesIO(png(1))))).all()


def test_a_saved_data_set_may_move_with_its_manifest(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"image": [{"bytes": png(7), "path": None}], "text": ["seven"]})
    rows.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "old" / "saved"))
    ingest(tmp_path / "old", directory=tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    corpus = ManifestCorpus(ingest(tmp_path / "new" / "manifest.jsonl"), image_size=(9, 9))
    assert (corpus.image(0) == np.asarray(Image.open(io.BytesIO(png(7))))).all()


def test_a_local_data_set_that_changed_is_ingested_again(tmp_path: Path) -> None:
    save(tmp_path / "saved" / "state.json", "{}")
    first = find_source(f"hf:{tmp_path / 'saved'}").listing
    assert find_source(f"hf:{tmp_path / 'saved'}").listing == first
    save(tmp_path / "saved" / "data" / "more.arrow", "x")
    second = find_source(f"hf:{tmp_path / 'saved'}").listing
    assert len({first, second, find_source(f"hf:{tmp_path / 'saved'}:test").listing}) == 3


def test_a_data_set_on_the_hub_that_changed_is_ingested_again(monkeypatch: pytest.MonkeyPatch) -> None:
    listings = []
    for fingerprint in ("first 10", "first 10", "second 10"):
        monkeypatch.setattr("tessera.data.source.dataset_fingerprint", lambda spec, found=fingerprint: found)
        listings.append(find_source("hf:someone/cats").listing)
    assert listings[0] == listings[1] != listings[2]


def test_a_folder_of_a_manifest_alone_names_the_manifest(tmp_path: Path) -> None:
    save(tmp_path / "out" / "manifest.jsonl", "{}")
    with pytest.raises(UserError, match=r"holds a manifest and no images: give .*out/manifest\.jsonl"):
        find_source(str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["x.json", "x.txt", "x.tar.gz", "x"])
def test_other_files_are_refused_with_what_would_be_right(tmp_path: Path, name: str) -> None:
    save(tmp_path / name, "{}")
    with pytest.raises(UserError, match=rf"{name} is not a folder of captioned images, a \.tar, .* or hf:NAME"):
        find_source(str(tmp_path / name))


def test_what_layouts_say_in_the_same_words_stands_in_one_place() -> None:
    assigned = Counter(
        node.value.value
        for file in LAYOUTS.glob("*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )
    assert assigned and [text for text, count in assigned.items() if count > 1] == []
