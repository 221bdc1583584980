import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.data.captions import (
    MAX_CHARACTERS,
    NOTE_CLEANED,
    NOTE_CUT,
    NOTE_LATIN_1,
    NOTE_LONG_FILE,
    caption_columns,
    captions_of,
    clean_and_note,
    clean_caption,
    clean_captions,
    join_captions,
    read_caption_file,
    row_captions,
)
from tessera.data.images import ImageError


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("", ""),
        (" \t\r\n ", ""),
        ("  a  red\tstar\n on white ", "a red star on white"),
        ("a\0b\x07c\x7f", "abc"),
        ("lone \ud83d half", "lone half"),
        ("torn \ud83d\ude00 pair", "torn 😀 pair"),
        ("e\u0301te\u0301", "été"),
        ("\ufeffmark", "mark"),
        ("日本語 العربية", "日本語 العربية"),
        ("family 👨‍👩‍👧", "family 👨‍👩‍👧"),
    ],
)
def test_captions_become_one_clean_line(text: str, clean: str) -> None:
    assert clean_caption(text) == clean


def test_a_long_caption_is_cut_after_a_word_and_noted() -> None:
    cleaned = clean_and_note("seven7 " * 1500)  # 10,500 characters
    assert cleaned.notes == (NOTE_CUT,)
    assert 990 < len(cleaned.text) <= MAX_CHARACTERS
    assert set(cleaned.text.split()) == {"seven7"}


def test_a_long_caption_without_words_is_cut_all_the_same() -> None:
    assert clean_caption("x" * 10_000) == "x" * MAX_CHARACTERS
    assert clean_caption("short " + "x" * 10_000) == "short " + "x" * (MAX_CHARACTERS - 6)


def test_a_caption_of_just_the_limit_is_left_alone() -> None:
    text = "ab " * 333 + "z"
    assert len(text) == MAX_CHARACTERS
    assert clean_and_note(text) == (text, ())


def test_removals_are_noted_and_white_space_is_not() -> None:
    assert clean_and_note("a\0b").notes == (NOTE_CLEANED,)
    assert clean_and_note("a \ud800b").notes == (NOTE_CLEANED,)
    assert clean_and_note(" a\t b\n").notes == ()
    assert clean_and_note("\ud83d\ude00").notes == ()


@given(st.text(st.characters(codec=None), max_size=3000))
def test_cleaning_gives_encodable_text_and_is_stable(text: str) -> None:
    clean = clean_caption(text)
    clean.encode("utf-8")
    assert len(clean) <= MAX_CHARACTERS
    assert clean == " ".join(clean.split())
    assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in clean)
    assert clean_caption(clean) == clean


def test_a_file_holds_one_caption_a_line(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfa red star\r\n\r\n  a  star \na red star\n")
    assert read_caption_file(file) == (("a red star", "a star"), ())


@pytest.mark.parametrize("content", [b"", b"\n \r\n\t", b"\0"])
def test_a_blank_file_is_one_empty_caption(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert read_caption_file(tmp_path / "a.txt").captions == ("",)


def test_files_of_other_encodings_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("Café\nüber".encode("latin-1"))
    assert read_caption_file(file) == (("Café", "über"), (NOTE_LATIN_1,))
    file.write_bytes("Café".encode("utf-16"))
    assert read_caption_file(file) == (("Café",), ())


def test_of_an_enormous_file_the_beginning_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("ein grüner Ring\n" * 200_000, encoding="utf-8")
    assert read_caption_file(file) == (("ein grüner Ring",), (NOTE_LONG_FILE,))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot be read"):
        read_caption_file(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        ("a star", ("a star",)),
        ("", ("",)),
        (["one", 2, None, "three"], ("one", "three")),
        ('["one", "two"]', ("one", "two")),
        ("[bracketed] words", ("[bracketed] words",)),
        ("[1, 2]", ("[1, 2]",)),
        (None, ()),
        (7, ()),
        ({"caption": "nested"}, ()),
        ("[" * 100_000, ("[" * 100_000,)),
    ],
)
def test_a_field_holds_one_caption_or_several(value: Any, captions: tuple[str, ...]) -> None:
    assert captions_of(value) == captions


def test_a_row_gives_the_captions_of_its_first_column_that_has_any() -> None:
    assert row_captions({"prompt": "last", " Caption ": "first", "text": None, "title": "never"}) == ["first"]
    assert row_captions({"captions": json.dumps(["one", "two"]), "width": 8}) == ["one", "two"]
    assert row_captions({"text": ""}) == [""]
    assert row_captions({"title": "never"}) == []
    assert caption_columns(["image", "Prompt", "TEXT", "texts"]) == ["Prompt", "TEXT"]


def test_an_empty_caption_is_left_out_beside_another() -> None:
    assert join_captions(["", "a", "", "b", "a"]) == ("a", "b")
    assert join_captions(["", ""]) == ("",)
    assert join_captions([]) == ()


def test_captions_of_one_image_are_cleaned_counted_and_stated_once() -> None:
    notes: Counter[str] = Counter()
    assert clean_captions([" a  star", "", "a\0 star", "b"], notes) == ("a star", "b")
    assert notes == {NOTE_CLEANED: 1}
    assert clean_captions(["", " "], notes) == ("",)
    assert clean_captions([], notes) == ()
