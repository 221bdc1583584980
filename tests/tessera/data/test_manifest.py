import hashlib
import json
import pickle
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tessera.data.candidates import Location, Reject
from tessera.data.manifest import Manifest, Record, split_key
from tessera.data.manifest_corpus import ManifestCorpus
from tessera.data.manifest_writer import ManifestWriter
from tessera.errors import UserError


def record(number: int) -> Record:
    """Of an image that need not exist."""
    sha256 = hashlib.sha256(bytes([number % 256, number // 256])).hexdigest()
    return Record(sha256[:16], Location(f"{number}.png"), sha256, 16, 12, (f"picture {number}", "thé"), "train")


def write_manifest(directory: Path, count: int) -> Manifest:
    directory.mkdir(parents=True, exist_ok=True)
    with ManifestWriter(directory, listing="x") as writer:
        for number in range(count):
            writer.add(record(number))
        writer.add(Reject("a.png", "damaged: in some way"))
        writer.add(Reject("b.png", "damaged: in another"))
        writer.add(record(0)._replace(location=Location("copy.png")))
        writer.finish(name="pictures", root=directory, notes={"a note": 2})
    return Manifest.read(directory / "manifest.jsonl")


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Files of the records that were parsed."""
    files: list[str] = []
    of_row = Record.of_row

    def counted(row: dict) -> Record | None:
        files.append(row["file"])
        return of_row(row)

    monkeypatch.setattr(Record, "of_row", counted)
    yield files


def test_what_was_written_is_read(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, 30)
    assert [found._replace(split="train") for found in manifest.records] == [record(number) for number in range(30)]
    assert list(manifest.rejects) == [Reject("a.png", "damaged: in some way"), Reject("b.png", "damaged: in another")]
    assert list(manifest.duplicates) == [Reject("copy.png", "duplicate: same bytes as 0.png")]
    assert (manifest.num_seen, len(manifest.rejects), len(manifest.duplicates)) == (33, 2, 1)
    assert manifest.reasons() == [("damaged", 2)] and manifest.notes == {"a note": 2}
    assert manifest.summary() == ("seen 33 = kept 30 + rejected 2 + duplicate 1; rejected: 2 damaged; noted: 2 a note")


@pytest.mark.parametrize(
    "location",
    [
        Location("a/b.png"),
        Location("00000.tar", member="0.png", offset=512, size=1000),
        Location("00000.tar", member="0.png", offset=0, size=0),
        Location("train.parquet", row=0),
        Location("hf:cats:train", row=17),
    ],
)
def test_a_record_says_where_its_bytes_lie_and_nothing_more(location: Location) -> None:
    row = record(0)._replace(location=location).to_row()
    wanted = {name: value for name, value in location._asdict().items() if value is not None and value != ""}
    assert {name: row[name] for name in ("file", "member", "offset", "size", "row") if name in row} == wanted
    found = Record.of_row(json.loads(json.dumps(row)))
    assert found is not None and found.location == location


def test_opening_and_describing_reads_no_record(tmp_path: Path, parsed: list[str]) -> None:
    write_manifest(tmp_path, 3000)
    parsed.clear()
    manifest = Manifest.read(tmp_path / "manifest.jsonl")
    corpus = ManifestCorpus(manifest, image_size=(8, 8), limit=2000)
    assert (len(manifest.records), len(corpus)) == (3000, 2000)
    assert manifest.summary() and corpus.fingerprint() and len(manifest.of_split("validation"))
    assert parsed == []
    assert manifest.records[2999].captions == ("picture 2999", "thé")
    assert parsed == ["2999.png"]
    assert corpus.captions(7)[0] == f"picture {parsed[-1].removesuffix('.png')}" and len(parsed) == 2


def test_nothing_of_the_records_is_held_in_memory(tmp_path: Path) -> None:
    small, large = (ManifestCorpus(write_manifest(tmp_path / str(n), n), image_size=(8, 8)) for n in (10, 3000))
    bytes_per_record = (len(pickle.dumps(large)) - len(pickle.dumps(small))) / 2990
    assert bytes_per_record <= 8, "the number of a record, and not what it says"


def test_records_are_numbered_like_a_list(tmp_path: Path) -> None:
    records = write_manifest(tmp_path, 1500).records
    everything = list(records)
    assert len(everything) == 1500 and everything[1024] == records[1024] and everything[1499] == records[1499]
    for number in (-1, 1500):
        with pytest.raises(IndexError, match=rf"expected a record in \[0, 1500\), got {number}"):
            records[number]


def test_threads_may_read_side_by_side(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, 200)
    start = threading.Barrier(4)

    def read(first: int) -> list[str]:
        start.wait()
        return [manifest.records[number].location.file for number in range(first, 200, 4)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read, range(4)))
    assert found == [[f"{number}.png" for number in range(first, 200, 4)] for first in range(4)]


def test_a_manifest_travels_by_its_path(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, 20)
    travelling = pickle.dumps(manifest)
    assert list(pickle.loads(travelling).records) == list(manifest.records)
    assert len(travelling) < 1000
    write_manifest(tmp_path, 21)
    with pytest.raises(UserError, match="was replaced by another manifest"):
        pickle.loads(travelling)
    assert len(list(manifest.records)) == 20, "the open one is not disturbed"


@pytest.mark.parametrize("change", ["missing", "stale", "torn", "empty", "copied"])
def test_an_index_that_does_not_fit_is_made_again(tmp_path: Path, parsed: list[str], change: str) -> None:
    manifest = write_manifest(tmp_path, 50)
    splits = [list(manifest.of_split(split)) for split in ("train", "validation")]
    keys = np.array(manifest.records.keys(np.arange(50)))  # copied: what is mapped must not be cut short
    index, lines = tmp_path / "manifest.index", tmp_path / "manifest.jsonl"
    if change == "missing":
        index.unlink()
    elif change == "stale":
        write_manifest(tmp_path / "other", 51)
        shutil.copy(tmp_path / "other" / "manifest.index", index)
    elif change == "torn":
        index.write_bytes(index.read_bytes()[:-1])
    elif change == "empty":
        index.write_bytes(b"")
    else:
        lines.touch()
    parsed.clear()
    again = Manifest.read(lines)
    assert len(parsed) == 50
    assert [list(again.of_split(split)) for split in ("train", "validation")] == splits
    assert (again.records.keys(np.arange(50)) == keys).all()
    parsed.clear()
    assert Manifest.read(lines).records[49].captions == ("picture 49", "thé")
    assert len(parsed) == 1, "the new index was written"


def test_a_manifest_in_a_folder_that_may_not_be_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_manifest(tmp_path, 12)
    (tmp_path / "manifest.index").unlink()

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("tessera.data.manifest.write_index", refuse)
    assert len(list(Manifest.read(tmp_path / "manifest.jsonl").records)) == 12
    assert not (tmp_path / "manifest.index").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("captions", []),
        ("captions", "a"),
        ("captions", [1]),
        ("split", "test"),
        ("width", "8"),
        ("id", 7),
        ("offset", -1),
        ("row", "7"),
        ("member", 7),
    ],
)
def test_a_record_with_wrong_values_is_refused_by_its_line(tmp_path: Path, key: str, value: object) -> None:
    write_manifest(tmp_path, 4)
    path = tmp_path / "manifest.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2][key] = value
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=r"manifest\.jsonl:3 is not a record"):
        Manifest.read(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"tessera_manifest": 2', '"tessera_manifest": 1', "is not a manifest of version 2: ingest the images again"),
        ('"kept": 4', '"kept": "4"', "its first line is not a header"),
        ('"kept": 4', '"kept": 5', "is cut short: 4 of 5 records"),
        ('"seen": 7, ', "", "its first line is not a header"),
        ('"picture 2"', '"picture 3"', "was changed after it was written: ingest the images again"),
        ("{", "", "is damaged"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    write_manifest(tmp_path, 4)
    path = tmp_path / "manifest.jsonl"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        Manifest.read(path)


def test_a_manifest_cut_short_while_open_is_no_shorter_manifest(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, 20)
    with (tmp_path / "manifest.jsonl").open("r+b") as file:
        file.truncate(3000)
    with pytest.raises(UserError, match="cut short while it was in use"):
        list(manifest.records)


def test_rejects_that_are_gone_or_damaged_disturb_nothing_else(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, 4)
    (tmp_path / "rejects.jsonl").write_text('{"kind": "rejected"}\n')
    with pytest.raises(UserError, match=r"rejects\.jsonl:1 is not a refusal"):
        list(manifest.rejects)
    (tmp_path / "rejects.jsonl").unlink()
    assert list(manifest.rejects) == [] and len(manifest.rejects) == 2
    assert len(list(manifest.records)) == 4


def test_the_content_follows_pixels_and_captions_of_each_split_alone(tmp_path: Path) -> None:
    contents = []
    variants = (record(0), record(0)._replace(location=Location("moved.png")), record(0)._replace(captions=("other",)))
    for place, first in enumerate(variants):
        (tmp_path / str(place)).mkdir()
        with ManifestWriter(tmp_path / str(place), listing="x") as writer:
            writer.add(first)
            writer.add(record(1))
            writer.finish(name="pictures", root=tmp_path, notes={})
        contents.append(Manifest.read(tmp_path / str(place) / "manifest.jsonl").header.content)
    assert contents[0] == contents[1] != contents[2]
    assert contents[0]["validation"] == contents[2]["validation"]


def test_split_keys_are_spread_evenly() -> None:
    keys = [split_key(f"{number:064x}") for number in range(4000)]
    assert min(keys) >= 0 and max(keys) < 1
    assert np.histogram(keys, bins=10, range=(0, 1))[0].min() > 300
