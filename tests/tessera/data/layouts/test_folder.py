import json
from collections import Counter
from pathlib import Path

import pytest

from tessera.data.candidates import NO_IMAGE_FOR_CAPTION, Candidate, Reject
from tessera.data.captions import NOTE_CLEANED
from tessera.data.layouts.folder import (
    NO_CAPTION,
    NOTE_BESIDE_SHARD,
    NOTE_PACKED,
    read_folder,
    survey_folder,
)


def write(root: Path, **files: str) -> None:
    """Writes text files; double underscores in names stand for slashes and dots: a__b__png is a/b.png."""
    for name, content in files.items():
        *folders, stem, suffix = name.split("__")
        path = root.joinpath(*folders, f"{stem}.{suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


def read(root: Path, notes: Counter[str] | None = None) -> list[Candidate | Reject]:
    root = root.resolve()
    return list(read_folder(root, survey_folder(root), Counter() if notes is None else notes))


def captions(root: Path) -> dict[str, tuple[str, ...]]:
    return {item.location.name: item.captions for item in read(root) if isinstance(item, Candidate)}


def reasons(root: Path) -> dict[str, str]:
    return dict(item for item in read(root) if isinstance(item, Reject))


def test_captions_lie_beside_their_images_at_any_depth(tmp_path: Path) -> None:
    write(tmp_path, b__png="", b__txt="a blue ring", sub__deep__a__JPG="", sub__deep__a__caption="one\ntwo")
    (tmp_path / "c.webp").touch()
    (tmp_path / "c.webp.TXT").write_text("named after the whole file")
    assert captions(tmp_path) == {
        "b.png": ("a blue ring",),
        "c.webp": ("named after the whole file",),
        "sub/deep/a.JPG": ("one", "two"),
    }
    assert reasons(tmp_path) == {}


def test_images_come_in_an_order_that_the_file_system_does_not_decide(tmp_path: Path) -> None:
    write(tmp_path, **{f"{name}__png": "" for name in ("z", "b", "a__y", "c__a", "c__b__x")})
    write(tmp_path, **{f"{name}__txt": "" for name in ("z", "b", "a__y", "c__a", "c__b__x")})
    assert list(captions(tmp_path)) == ["b.png", "z.png", "a/y.png", "c/a.png", "c/b/x.png"]


def test_two_images_may_share_a_caption_file(tmp_path: Path) -> None:
    write(tmp_path, a__png="", a__jpg="", a__txt="twins")
    assert captions(tmp_path) == {"a.jpg": ("twins",), "a.png": ("twins",)}


def test_blank_captions_are_legal_and_missing_ones_are_not(tmp_path: Path) -> None:
    write(tmp_path, a__png="", a__txt="", b__png="")
    assert captions(tmp_path) == {"a.png": ("",)}
    assert reasons(tmp_path) == {"b.png": NO_CAPTION}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"caption": "a cat", "width": 8}', ("a cat",)),
        ('{"Prompt": ["one", "two", "one"]}', ("one", "two")),
        ('["one", "two"]', ("one", "two")),
        ('{"text": ""}', ("",)),
    ],
)
def test_json_beside_an_image_gives_captions(tmp_path: Path, content: str, expected: tuple[str, ...]) -> None:
    write(tmp_path, a__jpg="", a__json=content)
    assert captions(tmp_path) == {"a.jpg": expected}


def test_an_empty_caption_file_is_not_heard_beside_another(tmp_path: Path) -> None:
    write(tmp_path, a__png="", a__txt="", a__caption="a star")
    assert captions(tmp_path) == {"a.png": ("a star",)}


def test_json_speaks_only_where_no_text_file_does(tmp_path: Path) -> None:
    write(
        tmp_path, a__jpg="", a__json='{"caption": "json"}', a__txt="text", b__jpg="", b__json='{"caption": "a\\u0000"}'
    )
    notes: Counter[str] = Counter()
    found = {item.location.name: item.captions for item in read(tmp_path, notes) if isinstance(item, Candidate)}
    assert found == {"a.jpg": ("text",), "b.jpg": ("a",)}
    assert notes == {NOTE_CLEANED: 1}


def test_json_without_a_caption_is_none_and_damaged_json_is_named(tmp_path: Path) -> None:
    write(tmp_path, a__jpg="", a__json='{"url": "x"}', b__jpg="", b__json="{", c__jpg="", c__json="[" * 100_000)
    damaged = "no caption: the JSON file beside it is damaged"
    assert reasons(tmp_path) == {"a.jpg": NO_CAPTION, "b.jpg": damaged, "c.jpg": damaged}


def test_captions_without_images_and_unsupported_formats_are_counted(tmp_path: Path) -> None:
    write(tmp_path, a__png="", a__txt="x", lost__txt="x", photo__heic="", photo__txt="x", notes__md="", data__json="{}")
    assert reasons(tmp_path) == {"lost.txt": NO_IMAGE_FOR_CAPTION, "photo.heic": "format not supported: .heic"}


def test_hidden_files_and_model_folders_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, a__png="", a__txt="x", model__tessera__yaml="", model__sample__png="")
    for hidden in (".a.png", "._a.png", ".cache/b.png", "__MACOSX/b.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).touch()
    assert [item.location.file for item in read(tmp_path) if isinstance(item, Candidate)] == ["a.png"]
    assert reasons(tmp_path) == {}


def test_metadata_of_a_subfolder_speaks_of_that_folder(tmp_path: Path) -> None:
    write(tmp_path, a__png="", a__txt="outside", train__a__png="")
    write(tmp_path, train__metadata__csv="file_name,text\na.png,inside\n")
    assert captions(tmp_path) == {"a.png": ("outside",), "train/a.png": ("inside",)}


def test_metadata_goes_before_text_files_which_fill_its_gaps(tmp_path: Path) -> None:
    write(tmp_path, a__png="", a__txt="file", b__png="", b__txt="file", c__png="")
    rows = [{"file_name": "a.png", "text": "row"}, {"file_name": "c.png"}]
    write(tmp_path, metadata__jsonl="\n".join(map(json.dumps, rows)))
    assert captions(tmp_path) == {"a.png": ("row",), "b.png": ("file",)}
    assert reasons(tmp_path) == {"c.png": NO_CAPTION}


def test_all_rows_about_an_image_count_wherever_they_stand(tmp_path: Path) -> None:
    write(tmp_path, a__png="", sub__b__png="")
    write(tmp_path, metadata__csv="file_name,text\na.png,one\nsub/b.png,b\na.png,two\n./sub/../a.png,one\n")
    write(tmp_path, sub__metadata__jsonl='{"file_name": "../a.png", "text": "three"}')
    assert captions(tmp_path) == {"a.png": ("one", "two", "three"), "sub/b.png": ("b",)}


def test_rows_may_name_what_the_walk_passes_by(tmp_path: Path) -> None:
    write(tmp_path, hidden__a__png="", b__bin="", c__bin="")
    (tmp_path / "hidden").rename(tmp_path / ".hidden")
    write(tmp_path, metadata__csv="file_name,text\n.hidden/a.png,hidden\nb.bin,without suffix\n")
    write(tmp_path, sub__metadata__jsonl='{"file_name": "../c.bin", "text": ""}')
    assert captions(tmp_path) == {".hidden/a.png": ("hidden",), "b.bin": ("without suffix",), "c.bin": ("",)}


def test_links_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write(root, a__png="", b__png="", b__txt="x")
    write(tmp_path, secret__png="", secret__txt="secret")
    (root / "a.txt").symlink_to(tmp_path / "secret.txt")
    (root / "linked").symlink_to(tmp_path)
    (root / "loop").symlink_to(root)
    notes: Counter[str] = Counter()
    found = read(root, notes)
    assert [item.location.file for item in found if isinstance(item, Candidate)] == ["b.png"]
    assert reasons(root) == {"a.png": "points outside the folder"}
    assert notes == {"linked folder not entered": 2}


def test_links_inside_the_folder_and_absolute_names_inside_it_are_fine(tmp_path: Path) -> None:
    write(tmp_path, a__png="", sub__b__png="")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    rows = [{"file_name": "link.png", "text": "x"}, {"file_name": str(tmp_path / "sub" / "b.png"), "text": "y"}]
    write(tmp_path, metadata__jsonl="\n".join(map(json.dumps, rows)))
    assert captions(tmp_path) == {"link.png": ("x",), "sub/b.png": ("y",)}


def test_what_cannot_be_read_in_place_is_passed_over_with_a_note(tmp_path: Path) -> None:
    write(tmp_path, a__png="", a__txt="x", photos__zip="", more__gz="", shards__00001__png="")
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000.parquet").write_text("img2dataset's table of a folder")
    notes: Counter[str] = Counter()
    assert len(read(tmp_path, notes)) == 2
    assert notes == {NOTE_PACKED: 2, NOTE_BESIDE_SHARD: 1}


def test_the_survey_follows_every_file_that_counts(tmp_path: Path) -> None:
    write(tmp_path, a__png="", a__txt="x", b__png="", b__json="{}", notes__md="")
    first = survey_folder(tmp_path).listing
    write(tmp_path, notes__md="more", other__json="{}", rejects__jsonl="")
    assert survey_folder(tmp_path).listing == first
    listings = {first}
    for file in (
        {"a__txt": "longer"},
        {"b__json": "{ }"},
        {"sub__c__png": ""},
        {"metadata__csv": "file_name,text\n"},
        {"photo__heic": ""},
        {"lost__txt": ""},
        {"more__parquet": ""},
    ):
        write(tmp_path, **file)
        listings.add(survey_folder(tmp_path).listing)
    (tmp_path / "a.png").rename(tmp_path / "d.png")
    listings.add(survey_folder(tmp_path).listing)
    assert len(listings) == 9


def test_the_survey_counts_images_where_it_can(tmp_path: Path) -> None:
    write(tmp_path, notes__md="")
    assert survey_folder(tmp_path).is_empty
    write(tmp_path, a__png="", a__txt="x", sub__b__png="")
    survey = survey_folder(tmp_path)
    assert (survey.num_images, survey.is_empty, survey.tables) == (2, False, ())
    write(tmp_path, sub__00000__tar="", metadata__tsv="")
    survey = survey_folder(tmp_path)
    assert (survey.num_images, survey.tables) == (None, ("metadata.tsv",))
