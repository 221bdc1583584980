import hashlib
import json
from pathlib import Path

import pytest

from tessera.data.candidates import Location, Reject
from tessera.data.manifest import Manifest, Record
from tessera.data.manifest_writer import JOURNAL_NAME, MIN_FOR_VALIDATION, ManifestWriter


def record(number: int) -> Record:
    sha256 = hashlib.sha256(str(number).encode()).hexdigest()
    return Record(sha256[:16], Location(f"{number}.png"), sha256, 16, 12, (f"picture {number}",), "train")


OUTCOMES: list[Record | Reject] = [
    record(0),
    Reject("a.png", "no caption: at all"),
    record(1),
    record(0)._replace(location=Location("x.tar", member="0.png", offset=512, size=9)),
    *map(record, range(2, 14)),
]


def read(directory: Path) -> Manifest:
    return Manifest.read(directory / "manifest.jsonl")


def write(directory: Path, outcomes: list[Record | Reject]) -> Manifest:
    directory.mkdir(exist_ok=True)
    with ManifestWriter(directory, listing="listing") as writer:
        for outcome in outcomes[writer.num_seen :]:
            writer.add(outcome)
        writer.finish(name="pictures", root=directory, notes={})
    return read(directory)


@pytest.mark.parametrize("complete", range(0, 17, 4))
@pytest.mark.parametrize("tail", [b"", b'{"kind": "rejected", "sour', b'{"kind": 7}\n{"never": "read"}\n'])
def test_a_writer_goes_on_behind_the_last_whole_line_of_a_killed_one(
    tmp_path: Path, complete: int, tail: bytes
) -> None:
    whole = write(tmp_path / "whole", OUTCOMES)
    (tmp_path / "resumed").mkdir()
    with ManifestWriter(tmp_path / "resumed", listing="listing") as writer:
        for outcome in OUTCOMES[:complete]:
            writer.add(outcome)
    with (tmp_path / "resumed" / JOURNAL_NAME).open("ab") as file:
        file.write(tail)
    with ManifestWriter(tmp_path / "resumed", listing="listing") as writer:
        assert writer.num_seen == complete
    resumed = write(tmp_path / "resumed", OUTCOMES)
    assert list(resumed.records) == list(whole.records) and resumed.header.content == whole.header.content
    assert list(resumed.rejects) == list(whole.rejects) == [Reject("a.png", "no caption: at all")]
    assert list(resumed.duplicates) == list(whole.duplicates)
    assert list(whole.duplicates) == [Reject("x.tar/0.png", "duplicate: same bytes as 0.png")]


@pytest.mark.parametrize("journal", [b"", b"\x00" * 100, b'{"tessera_manifest": 2, "listing": "other"}\n{"kind"'])
def test_a_journal_of_something_else_is_thrown_away(tmp_path: Path, journal: bytes) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(journal)
    manifest = write(tmp_path, OUTCOMES)
    assert manifest.num_seen == len(OUTCOMES)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.index", "manifest.jsonl", "rejects.jsonl"]


def test_a_writer_knows_where_it_stopped_and_can_start_over(tmp_path: Path) -> None:
    with ManifestWriter(tmp_path, listing="listing") as writer:
        assert writer.last_source is None
        for outcome, name in zip(OUTCOMES[:4], ("0.png", "a.png", "1.png", "x.tar/0.png"), strict=True):
            writer.add(outcome)
            assert writer.last_source == name
    with ManifestWriter(tmp_path, listing="listing") as writer:
        assert writer.last_source == "x.tar/0.png"
        writer.start_over()
        assert (writer.num_seen, writer.last_source) == (0, None)
        writer.add(OUTCOMES[3])
        writer.finish(name="pictures", root=tmp_path, notes={})
    assert [found.location.name for found in read(tmp_path).records] == ["x.tar/0.png"]


def test_the_lines_say_what_the_index_says(tmp_path: Path) -> None:
    manifest = write(tmp_path, OUTCOMES)
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert lines[0]["content"] == manifest.header.content and lines[0]["kept"] == 14
    for split in ("train", "validation"):
        assert [number for number in range(14) if lines[number + 1]["split"] == split] == list(manifest.of_split(split))


@pytest.mark.parametrize("count", [1, MIN_FOR_VALIDATION - 1, MIN_FOR_VALIDATION, 14])
def test_ten_images_are_enough_for_one_of_validation(tmp_path: Path, count: int) -> None:
    manifest = write(tmp_path, [record(number) for number in range(count)])
    least = 0 if count < MIN_FOR_VALIDATION else 1
    assert least <= len(manifest.of_split("validation")) <= 3 * least


def test_an_image_stays_in_its_split_when_others_come(tmp_path: Path) -> None:
    few = write(tmp_path / "few", [record(number) for number in range(300)])
    many = write(tmp_path / "many", [record(number) for number in range(900, -1, -1)])
    splits = {found.id: found.split for found in many.records}
    assert {found.id: found.split for found in few.records}.items() <= splits.items()
    assert 0.03 < len(many.of_split("validation")) / 901 < 0.07


def test_an_error_while_writing_leaves_the_old_manifest_and_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, OUTCOMES[:1])

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr("tessera.data.manifest_writer.write_index", fail)
        write(tmp_path, OUTCOMES)
    assert read(tmp_path).num_seen == 1
    with ManifestWriter(tmp_path, listing="listing") as writer:
        assert writer.num_seen == len(OUTCOMES)
