import json
from pathlib import Path

import pytest

from tessera.data.images import ImageError
from tessera.data.sources import (
    NO_CAPTION,
    NO_IMAGE_FOR_CAPTION,
    NO_IMAGE_FOR_ROW,
    OUTSIDE,
    find_sources,
    resolve_inside,
)


def write(root: Path, **files: str) -> None:
    """Writes text files; double underscores in names stand for slashes and dots: a__b__png is a/b.png."""
    for name, content in files.items():
        *folders, stem, suffix = name.split("__")
        path = root.joinpath(*folders, f"{stem}.{suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


def captions(root: Path) -> dict[str, tuple[str, ...]]:
    return dict(find_sources(root).candidates)


def reasons(root: Path) -> dict[str, str]:
    return dict(find_sources(root).rejects)


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


def test_two_images_may_share_a_caption_file(tmp_path: Path) -> None:
    write(tmp_path, a__png="", a__jpg="", a__txt="twins")
    assert captions(tmp_path) == {"a.jpg": ("twins",), "a.png": ("twins",)}


def test_blank_captions_are_legal_and_missing_ones_are_not(tmp_path: Path) -> None:
    write(tmp_path, a__png="", a__txt="", b__png="")
    assert captions(tmp_path) == {"a.png": ("",)}
    assert reasons(tmp_path) == {"b.png": NO_CAPTION}


def test_captions_without_images_and_unsupported_formats_are_counted(tmp_path: Path) -> None:
    write(tmp_path, a__png="", a__txt="x", lost__txt="x", photo__heic="", photo__txt="x", notes__md="", data__json="")
    assert reasons(tmp_path) == {"lost.txt": NO_IMAGE_FOR_CAPTION, "photo.heic": "format not supported: .heic"}


def test_hidden_files_and_model_folders_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, a__png="", a__txt="x", model__tessera__yaml="", model__sample__png="")
    for hidden in (".a.png", "._a.png", ".cache/b.png", "__MACOSX/b.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).touch()
    found = find_sources(tmp_path)
    assert [candidate.source for candidate in found.candidates] == ["a.png"] and not found.rejects


def test_jsonl_metadata_gives_captions(tmp_path: Path) -> None:
    rows = [
        {"file_name": "a.png", "text": "first", "extra": 1},
        {"file_name": "sub/b.png", "caption": ["one", "two", 3]},
        {"file_name": "c.png", "prompt": ""},
        {"file_name": "./sub/../a.png", "TEXT": "second"},
        {"file_name": "d.png", "text": None, "caption": "the next column"},
    ]
    write(tmp_path, a__png="", sub__b__png="", c__png="", d__png="")
    write(tmp_path, metadata__jsonl="\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n")
    assert captions(tmp_path) == {
        "a.png": ("first", "second"),
        "c.png": ("",),
        "d.png": ("the next column",),
        "sub/b.png": ("one", "two"),
    }
    assert reasons(tmp_path) == {}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_metadata_gives_captions(tmp_path: Path, delimiter: str) -> None:
    lines = [
        ["File_Name", "width", "Prompt"],
        ["a.png", "8", '"a star, ""red""; on\nwhite"'],
        ["b.png", "8", '"[""one"", ""two""]"'],
        ["c.png", "8", "[bracketed"],
    ]
    write(tmp_path, a__png="", b__png="", c__png="", metadata__csv="\r\n".join(map(delimiter.join, lines)))
    assert captions(tmp_path) == {
        "a.png": ('a star, "red"; on white',),
        "b.png": ("one", "two"),
        "c.png": ("[bracketed",),
    }


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


def test_rows_that_name_no_image_are_rejected_by_line(tmp_path: Path) -> None:
    lines = [
        "not json",
        "[1, 2]",
        '{"text": "who?"}',
        '{"file_name": 7, "text": "x"}',
        '{"file_name": "gone.png", "text": "x"}',
        '{"file_name": "nul\\u0000.png", "text": "x"}',
        '{"file_name": "half\\ud800.png", "text": "x"}',
        "[" * 100_000,
    ]
    write(tmp_path, metadata__jsonl="\n".join(lines))
    found = reasons(tmp_path)
    assert list(found) == [f"metadata.jsonl:{line}" for line in range(1, 9)]
    values = list(found.values())
    assert values[:5] == [
        "metadata row is not JSON",
        "metadata row is not an object",
        "metadata row without file_name",
        "metadata row without file_name",
        NO_IMAGE_FOR_ROW,
    ]
    assert values[7] == "metadata row is not JSON"


def test_a_damaged_csv_row_does_not_hide_the_next_ones(tmp_path: Path) -> None:
    write(tmp_path, a__png="", metadata__csv=f"file_name,text\nb.png,{'x' * 200_000}\na.png,fine\n")
    assert captions(tmp_path) == {"a.png": ("fine",)}
    assert "not CSV" in reasons(tmp_path)["metadata.csv:2"]


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "{absolute}", "link.png", "linked/secret.png"])
def test_metadata_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    root = tmp_path / "data"
    root.mkdir()
    write(tmp_path, secret__png="")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "linked").symlink_to(tmp_path)
    name = name.format(absolute=tmp_path / "secret.png")
    write(root, metadata__jsonl=json.dumps({"file_name": name, "text": "x"}))
    found = find_sources(root)
    assert not found.candidates
    assert dict(found.rejects)["metadata.jsonl:1"] == OUTSIDE


def test_links_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write(root, a__png="", b__png="", b__txt="x")
    write(tmp_path, secret__png="", secret__txt="secret")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "link.txt").write_text("x")
    (root / "a.txt").symlink_to(tmp_path / "secret.txt")
    (root / "linked").symlink_to(tmp_path)
    (root / "loop").symlink_to(root)
    found = find_sources(root)
    assert [candidate.source for candidate in found.candidates] == ["b.png"]
    assert dict(found.rejects) == {"a.png": OUTSIDE, "link.png": OUTSIDE}
    assert found.notes["linked folder not entered"] == 2


def test_links_inside_the_folder_and_absolute_names_inside_it_are_fine(tmp_path: Path) -> None:
    write(tmp_path, a__png="", sub__b__png="")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    rows = [{"file_name": "link.png", "text": "x"}, {"file_name": str(tmp_path / "sub" / "b.png"), "text": "y"}]
    write(tmp_path, metadata__jsonl="\n".join(map(json.dumps, rows)))
    assert captions(tmp_path) == {"link.png": ("x",), "sub/b.png": ("y",)}


def test_a_metadata_file_stands_for_the_images_that_it_names(tmp_path: Path) -> None:
    write(tmp_path, a__png="", b__png="", b__txt="x", mine__csv="file_name,text\na.png,hello\n")
    found = find_sources(tmp_path / "mine.csv")
    assert dict(found.candidates) == {"a.png": ("hello",)} and not found.rejects


def test_the_listing_follows_every_file_that_counts(tmp_path: Path) -> None:
    write(tmp_path, a__png="", a__txt="x", notes__md="")
    first = find_sources(tmp_path).listing
    write(tmp_path, notes__md="more")
    assert find_sources(tmp_path).listing == first
    write(tmp_path, a__txt="longer")
    assert find_sources(tmp_path).listing != first


def test_resolving_refuses_what_lies_outside(tmp_path: Path) -> None:
    assert resolve_inside(tmp_path.resolve(), "a/b.png") == tmp_path.resolve() / "a" / "b.png"
    for source in ("../x", "/etc/hostname", "a/../../x"):
        with pytest.raises(ImageError, match=OUTSIDE):
            resolve_inside(tmp_path.resolve(), source)
