import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessera.data import manifest as manifest_module
from tessera.data.manifest import Manifest, ingest, split_key
from tessera.data.sources import NO_CAPTION
from tessera.errors import UserError


def save_image(path: Path, number: int, size: tuple[int, int] = (12, 16)) -> None:
    """A picture (height, width) that differs from those of other numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def save_pairs(root: Path, count: int) -> None:
    for number in range(count):
        save_image(root / f"{number:03}.png", number)
        (root / f"{number:03}.txt").write_text(f"picture {number}")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """5 good images, 2 copies, and one of each kind of trouble."""
    root = tmp_path / "messy"
    save_pairs(root, 5)
    (root / "copy.png").write_bytes((root / "002.png").read_bytes())
    (root / "copy.txt").write_text("another caption of the same")
    (root / "z" / "copy.png").parent.mkdir()
    (root / "z" / "copy.png").write_bytes((root / "002.png").read_bytes())
    (root / "z" / "copy.txt").write_text("picture 2")
    save_image(root / "silent.png", 100)
    (root / "torn.png").write_bytes((root / "001.png").read_bytes()[:200])
    (root / "torn.txt").write_text("torn")
    (root / "page.jpg").write_text("<html>not found</html>")
    (root / "page.txt").write_text("page")
    Image.new("RGB", (1, 1)).save(root / "dot.png")
    (root / "dot.txt").write_text("dot")
    (root / "lost.txt").write_text("lost")
    return root


def test_every_file_is_kept_rejected_or_a_duplicate(messy: Path) -> None:
    manifest = ingest(messy)
    assert [record.source for record in manifest.records] == [f"{number:03}.png" for number in range(5)]
    assert dict(manifest.rejects) == {
        "dot.png": "too small: 1x1, at least 8x8",
        "lost.txt": "no image for caption",
        "page.jpg": "not an image: expected PNG, JPEG, WEBP, BMP, GIF or TIFF",
        "silent.png": NO_CAPTION,
        "torn.png": "truncated",
    }
    assert dict(manifest.duplicates) == {
        "copy.png": "duplicate: same bytes as 002.png",
        "z/copy.png": "duplicate: same bytes as 002.png",
    }
    assert manifest.num_seen == 12
    assert manifest.summary() == (
        "seen 12 = kept 5 + rejected 5 + duplicate 2; rejected: "
        "1 no caption, 1 no image for caption, 1 too small, 1 not an image, 1 truncated"
    )


def test_a_record_holds_what_training_needs(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 0, size=(12, 16))
    (tmp_path / "a.txt").write_text("one\ntwo\0\n")
    manifest = ingest(tmp_path)
    (record,) = manifest.records
    assert (record.width, record.height, record.captions, record.split) == (16, 12, ("one", "two"), "train")
    assert len(record.sha256) == 64 and record.id == record.sha256[:16]
    assert manifest.notes == {"control characters or lone surrogates removed from a caption": 1}


def test_a_manifest_comes_back_as_it_was_written(messy: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run" / "data"
    written = ingest(messy, directory=directory)
    assert sorted(file.name for file in directory.iterdir()) == ["manifest.jsonl", "rejects.jsonl"]
    assert Manifest.read(directory / "manifest.jsonl") == written
    assert ingest(directory / "manifest.jsonl") == written


def test_refusals_are_written_with_their_reasons(messy: Path, tmp_path: Path) -> None:
    ingest(messy, directory=tmp_path / "out")
    lines = read_lines(tmp_path / "out" / "rejects.jsonl")
    assert {"kind": "rejected", "source": "torn.png", "reason": "truncated"} in lines
    assert [line["kind"] for line in lines].count("duplicate") == 2 and len(lines) == 7
    header = read_lines(tmp_path / "out" / "manifest.jsonl")[0]
    assert [header[key] for key in ("seen", "kept", "rejected", "duplicate")] == [12, 5, 5, 2]


def test_file_names_that_are_not_text_survive(tmp_path: Path) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    save_image(tmp_path / "data" / f"{name}.png", 0)
    (tmp_path / "data" / f"{name}.txt").write_text("coffee")
    manifest = ingest(tmp_path / "data", directory=tmp_path / "out")
    assert Manifest.read(tmp_path / "out" / "manifest.jsonl") == manifest
    assert manifest.records[0].source == f"{name}.png"


def test_a_second_ingest_reads_the_first_one_until_a_file_changes(
    messy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    check = manifest_module._check

    def counted(root: Path, candidate: manifest_module.Candidate) -> object:
        decoded.append(candidate.source)
        return check(root, candidate)

    monkeypatch.setattr(manifest_module, "_check", counted)
    first = ingest(messy, directory=tmp_path / "out")
    assert len(decoded) == 10
    assert ingest(messy, directory=tmp_path / "out") == first
    assert len(decoded) == 10
    (messy / "silent.txt").write_text("no longer silent")
    assert len(ingest(messy, directory=tmp_path / "out").records) == 6
    assert len(decoded) == 21


@pytest.mark.parametrize("damage", ["", "not json\n", '{"tessera_manifest": 99}\n', "half"])
def test_a_damaged_manifest_is_made_again_and_not_trusted(messy: Path, tmp_path: Path, damage: str) -> None:
    first = ingest(messy, directory=tmp_path / "out")
    file = tmp_path / "out" / "manifest.jsonl"
    file.write_text(file.read_text()[:-50] if damage == "half" else damage)
    with pytest.raises(UserError, match=r"manifest\.jsonl"):
        Manifest.read(file)
    assert ingest(messy, directory=tmp_path / "out") == first
    assert Manifest.read(file) == first


@pytest.mark.parametrize(
    ("key", "value"),
    [("captions", []), ("captions", "a"), ("captions", [1]), ("split", "test"), ("width", "8"), ("id", 7)],
)
def test_a_record_with_wrong_values_is_refused_by_its_line(tmp_path: Path, key: str, value: object) -> None:
    save_pairs(tmp_path / "data", 2)
    ingest(tmp_path / "data", directory=tmp_path)
    lines = read_lines(tmp_path / "manifest.jsonl")
    lines[2][key] = value
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=r"manifest\.jsonl:3 is not a record"):
        ingest(tmp_path / "manifest.jsonl")


def test_a_data_set_may_move_with_its_manifest(tmp_path: Path) -> None:
    save_pairs(tmp_path / "old", 3)
    ingest(tmp_path / "old", directory=tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    assert ingest(tmp_path / "new" / "manifest.jsonl").root == (tmp_path / "new").resolve()


def test_metadata_files_can_be_ingested_by_name(tmp_path: Path) -> None:
    save_image(tmp_path / "images" / "a.png", 0)
    save_image(tmp_path / "images" / "b.png", 1)
    (tmp_path / "train.csv").write_text("file_name,text\nimages/a.png,a cat\nimages/gone.png,a dog\n../x.png,out\n")
    manifest = ingest(tmp_path / "train.csv")
    assert [(record.source, record.captions) for record in manifest.records] == [("images/a.png", ("a cat",))]
    assert dict(manifest.rejects) == {
        "train.csv:3": "no image for metadata row",
        "train.csv:4": "points outside the folder",
    }


def test_about_a_twentieth_is_for_validation_whatever_else_is_there(tmp_path: Path) -> None:
    save_pairs(tmp_path, 120)
    everything = {record.sha256: record.split for record in ingest(tmp_path).records}
    share = list(everything.values()).count("validation") / len(everything)
    assert 0.01 <= share <= 0.12
    for number in range(0, 120, 2):
        (tmp_path / f"{number:03}.png").unlink()
        (tmp_path / f"{number:03}.txt").unlink()
    fewer = {record.sha256: record.split for record in ingest(tmp_path).records}
    assert "validation" in fewer.values()
    assert all(everything[sha256] == split for sha256, split in fewer.items())


@pytest.mark.parametrize(("count", "least"), [(1, 0), (9, 0), (10, 1), (12, 1)])
def test_ten_images_are_enough_for_one_of_validation(tmp_path: Path, count: int, least: int) -> None:
    save_pairs(tmp_path, count)
    validation = ingest(tmp_path).of_split("validation")
    assert least <= len(validation) <= 3 * least


def test_split_keys_are_spread_evenly() -> None:
    keys = [split_key(f"{number:064x}") for number in range(4000)]
    assert min(keys) >= 0 and max(keys) < 1
    assert np.histogram(keys, bins=10, range=(0, 1))[0].min() > 300


def test_progress_is_told_to_the_end(messy: Path) -> None:
    told: list[tuple[int, int]] = []
    ingest(messy, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 10) for done in range(1, 11)]


def failures(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    yield tmp_path / "missing", "does not exist: expected a folder of captioned images or a manifest"
    (tmp_path / "empty").mkdir()
    yield tmp_path / "empty", "no images in .*empty: expected png, .*caption in x.txt or in a row of metadata.jsonl"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.md").touch()
    yield tmp_path / "notes", "no images in .*notes"
    (tmp_path / "photo.png").touch()
    yield tmp_path / "photo.png", r"neither a folder nor a manifest \(.jsonl or .csv\)"
    for number in range(3):
        save_image(tmp_path / "silent" / f"{number}.png", number)
    (tmp_path / "silent" / "3.png").touch()
    (tmp_path / "silent" / "3.txt").touch()
    counts = r"seen 4 = kept 0 \+ rejected 4 \+ duplicate 0; mostly: no caption \(3\)"
    yield tmp_path / "silent", f"no usable image in .*silent: {counts}"
    (tmp_path / "rows.jsonl").write_text("nothing\nof use\n")
    yield tmp_path / "rows.jsonl", r"mostly: metadata row is not JSON \(2\)"


def test_hopeless_input_is_one_clear_line(tmp_path: Path) -> None:
    for path, message in failures(tmp_path):
        with pytest.raises(UserError, match=message) as caught:
            ingest(path)
        assert "\n" not in str(caught.value)


def test_rejects_are_written_even_if_nothing_is_left(tmp_path: Path) -> None:
    save_image(tmp_path / "data" / "a.png", 0)
    with pytest.raises(UserError):
        ingest(tmp_path / "data", directory=tmp_path / "out")
    assert read_lines(tmp_path / "out" / "rejects.jsonl") == [
        {"kind": "rejected", "source": "a.png", "reason": NO_CAPTION}
    ]
