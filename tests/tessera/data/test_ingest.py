import gc
import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessera.data import ingest as ingest_module
from tessera.data.candidates import Candidate, Reject
from tessera.data.ingest import ingest
from tessera.data.layouts.folder import NO_CAPTION
from tessera.data.manifest import Manifest
from tessera.data.manifest_writer import JOURNAL_NAME
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


def same(first: Manifest, second: Manifest) -> bool:
    """Whether two manifests say the same, wherever they lie."""
    return (
        (first.root, first.header) == (second.root, second.header)
        and list(first.records) == list(second.records)
        and [list(first.rejects), list(first.duplicates)] == [list(second.rejects), list(second.duplicates)]
    )


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
    assert [record.location.file for record in manifest.records] == [f"{number:03}.png" for number in range(5)]
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
        "1 too small, 1 not an image, 1 no caption, 1 truncated, 1 no image for caption"
    )


def test_a_record_holds_what_training_needs(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 0, size=(12, 16))
    (tmp_path / "a.txt").write_text("one\ntwo\0\n")
    manifest = ingest(tmp_path)
    (record,) = manifest.records
    assert (record.width, record.height, record.captions, record.split) == (16, 12, ("one", "two"), "train")
    assert len(record.sha256) == 64 and record.id == record.sha256[:16]
    assert manifest.notes == {"control characters or lone surrogates removed from a caption": 1}


def test_refusals_are_written_with_their_reasons(messy: Path, tmp_path: Path) -> None:
    ingest(messy, directory=tmp_path / "out")
    lines = read_lines(tmp_path / "out" / "rejects.jsonl")
    assert {"kind": "rejected", "source": "torn.png", "reason": "truncated"} in lines
    assert [line["kind"] for line in lines].count("duplicate") == 2 and len(lines) == 7
    header = read_lines(tmp_path / "out" / "manifest.jsonl")[0]
    assert [header[key] for key in ("seen", "kept", "rejected", "duplicate")] == [12, 5, 5, 2]


def test_a_manifest_can_be_ingested_by_name(messy: Path, tmp_path: Path) -> None:
    written = ingest(messy, directory=tmp_path / "run" / "data")
    files = sorted(file.name for file in (tmp_path / "run" / "data").iterdir())
    assert files == ["manifest.index", "manifest.jsonl", "rejects.jsonl"]
    assert same(ingest(tmp_path / "run" / "data" / "manifest.jsonl"), written)


def test_the_home_folder_may_be_abbreviated(messy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(messy.parent))
    written = ingest("~/messy", directory=messy.parent / "out")
    assert same(ingest("~/out/manifest.jsonl"), written)


def test_file_names_that_are_not_text_survive(tmp_path: Path) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    save_image(tmp_path / "data" / f"{name}.png", 0)
    save_image(tmp_path / "data" / f"copy {name}.png", 0)
    (tmp_path / "data" / f"{name}.txt").write_text("coffee")
    (tmp_path / "data" / f"copy {name}.txt").write_text("coffee")
    ingest(tmp_path / "data", directory=tmp_path / "out")
    manifest = Manifest.read(tmp_path / "out" / "manifest.jsonl")
    assert [record.location.file for record in manifest.records] == [f"{name}.png"]
    assert dict(manifest.duplicates) == {f"copy {name}.png": f"duplicate: same bytes as {name}.png"}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that were opened, in some order."""
    names: list[str] = []
    check = ingest_module._check

    def counted(root: Path, item: object) -> object:
        if isinstance(item, Candidate):
            names.append(item.location.name)
        return check(root, item)  # type: ignore[arg-type]

    monkeypatch.setattr(ingest_module, "_check", counted)
    return names


def test_a_second_ingest_reads_the_first_one_until_a_file_changes(
    messy: Path, tmp_path: Path, decoded: list[str]
) -> None:
    first = ingest(messy, directory=tmp_path / "out")
    assert len(decoded) == 10
    assert same(ingest(messy, directory=tmp_path / "out"), first)
    assert len(decoded) == 10
    (messy / "silent.txt").write_text("no longer silent")
    assert len(ingest(messy, directory=tmp_path / "out").records) == 6
    assert len(decoded) == 21


def test_an_interrupted_ingest_goes_on_where_it_stopped(messy: Path, tmp_path: Path, decoded: list[str]) -> None:
    whole = ingest(messy, directory=tmp_path / "whole")
    decoded.clear()

    def interrupt(done: int, _: int | None) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(messy, directory=tmp_path / "out", on_progress=interrupt)
    assert [file.name for file in (tmp_path / "out").iterdir()] == [JOURNAL_NAME]
    decoded.clear()
    told: list[int] = []
    resumed = ingest(messy, directory=tmp_path / "out", on_progress=lambda done, _: told.append(done))
    assert same(resumed, whole)
    assert told[0] == 8 and set(decoded) == {"page.jpg", "torn.png", "z/copy.png"}, "what comes after the seventh"
    assert not (tmp_path / "out" / JOURNAL_NAME).exists()


def interrupted(path: Path, out: Path, *, behind: int) -> None:
    def interrupt(done: int, _: int | None) -> None:
        if done == behind:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(path, directory=out, on_progress=interrupt)


def test_a_file_that_cannot_be_used_counts_when_an_ingest_goes_on(messy: Path, tmp_path: Path) -> None:
    interrupted(messy, tmp_path / "out", behind=4)
    (messy / "000.heic").touch()
    resumed = ingest(messy, directory=tmp_path / "out")
    assert same(resumed, ingest(messy, directory=tmp_path / "whole")) and resumed.num_seen == 13


def test_a_journal_that_ends_elsewhere_is_not_gone_on_with(
    messy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessera.data.layouts.folder.listing_of", lambda root, files: "always the same")
    interrupted(messy, tmp_path / "out", behind=4)
    (messy / "000.txt").unlink()
    (messy / "000.png").unlink()
    resumed = ingest(messy, directory=tmp_path / "out")
    assert same(resumed, ingest(messy, directory=tmp_path / "whole")) and resumed.num_seen == 11


def test_two_ingests_into_one_folder_do_the_work_once(messy: Path, tmp_path: Path, decoded: list[str]) -> None:
    found: list[Manifest] = []
    threads = [
        threading.Thread(target=lambda: found.append(ingest(messy, directory=tmp_path / "out"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(decoded) == 10 and same(found[0], found[1]) and same(found[0], found[2])


@pytest.mark.parametrize("damage", ["", "not json\n", '{"tessera_manifest": 1}\n', "half"])
def test_a_damaged_manifest_is_made_again_and_not_trusted(messy: Path, tmp_path: Path, damage: str) -> None:
    records = list(ingest(messy, directory=tmp_path / "out").records)
    file = tmp_path / "out" / "manifest.jsonl"
    file.write_text(file.read_text()[:-50] if damage == "half" else damage)
    with pytest.raises(UserError, match=r"manifest\.jsonl"):
        Manifest.read(file)
    assert list(ingest(messy, directory=tmp_path / "out").records) == records
    assert list(Manifest.read(file).records) == records


def test_a_manifest_without_a_folder_of_its_own_goes_when_it_is_no_longer_used(messy: Path) -> None:
    manifest = ingest(messy)
    folder = manifest.path.parent
    assert manifest.path.exists() and not folder.is_relative_to(messy)
    del manifest
    gc.collect()
    assert not folder.exists()


def test_a_data_set_may_move_with_its_manifest(tmp_path: Path) -> None:
    save_pairs(tmp_path / "old", 3)
    ingest(tmp_path / "old", directory=tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    assert ingest(tmp_path / "new" / "manifest.jsonl").root == (tmp_path / "new").resolve()


def test_metadata_files_can_be_ingested_by_name(tmp_path: Path) -> None:
    save_image(tmp_path / "images" / "a.png", 0)
    save_image(tmp_path / "images" / "b.png", 1)
    rows = "file_name,text\nimages/a.png,a cat\nimages/gone.png,a dog\n../x.png,out\nimages/a.png,a pet\n"
    (tmp_path / "train.csv").write_text(rows)
    manifest = ingest(tmp_path / "train.csv")
    assert [(record.location.file, record.captions) for record in manifest.records] == [
        ("images/a.png", ("a cat", "a pet"))
    ]
    assert dict(manifest.rejects) == {
        "train.csv:3": "no image for metadata row",
        "train.csv:4": "points outside the folder",
    }


def test_a_metadata_file_is_read_again_when_an_image_that_it_names_changes(tmp_path: Path, decoded: list[str]) -> None:
    save_image(tmp_path / "a.png", 0)
    (tmp_path / "train.csv").write_text("file_name,text\na.png,a cat\nb.png,a dog\n")
    for _ in range(2):
        ingest(tmp_path / "train.csv", directory=tmp_path / "out")
    assert decoded == ["a.png"]
    save_image(tmp_path / "a.png", 1, size=(20, 20))
    assert ingest(tmp_path / "train.csv", directory=tmp_path / "out").records[0].width == 20
    save_image(tmp_path / "b.png", 2)
    assert len(ingest(tmp_path / "train.csv", directory=tmp_path / "out").records) == 2


def test_links_to_images_outside_of_the_folder_are_refused(tmp_path: Path) -> None:
    save_pairs(tmp_path / "data", 1)
    save_image(tmp_path / "secret.png", 7)
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data" / "link.txt").write_text("x")
    assert dict(ingest(tmp_path / "data").rejects) == {"link.png": "points outside the folder"}


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


def test_progress_is_told_to_the_end(messy: Path) -> None:
    told: list[tuple[int, int | None]] = []
    ingest(messy, on_progress=lambda done, total: told.append((done, total)))
    assert told == [*((done, 11) for done in range(1, 12)), (12, 12), (12, 12)]


def test_images_are_checked_in_bounded_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pairs(tmp_path, 60)
    monkeypatch.setattr(ingest_module, "usable_cores", lambda: 1)
    source = ingest_module.find_source(str(tmp_path))
    taken = 0

    def read(notes: Counter[str]) -> Iterator[Candidate | Reject]:
        nonlocal taken
        for item in source.read(notes):
            taken += 1
            yield item

    monkeypatch.setattr(ingest_module, "find_source", lambda _: source._replace(read=read))
    ahead: list[int] = []
    ingest(tmp_path, on_progress=lambda done, _: ahead.append(taken - done))
    assert len(ahead) == 61 and max(ahead) <= 16


def failures(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    yield tmp_path / "missing", "does not exist: expected a folder of captioned images, a .tar"
    (tmp_path / "empty").mkdir()
    yield tmp_path / "empty", "no images in .*empty: expected png, .*caption in x.txt, x.caption or x.json, or in a row"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.md").touch()
    yield tmp_path / "notes", "no images in .*notes"
    (tmp_path / "photo.png").touch()
    yield tmp_path / "photo.png", r"photo.png is not a folder of captioned images, a .tar"
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
