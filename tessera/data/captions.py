"""Captions: any text in, one clean line out; and where they are found: in files, one a line, and in rows of tables."""

import codecs
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tessera.data.images import read_file

CAPTION_SUFFIXES = (".txt", ".caption")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
MAX_CHARACTERS = 1_000
MAX_FILE_BYTES = 2**20

NOT_UTF_8 = "damaged: text that is not UTF-8"
NOTE_CUT = f"caption cut at {MAX_CHARACTERS:,} characters"
NOTE_CLEANED = "control characters or lone surrogates removed from a caption"
NOTE_LATIN_1 = "text file is not UTF-8: read as Latin-1"
NOTE_LONG_FILE = "caption file longer than 1 MiB: only its beginning read"


class CleanedCaption(NamedTuple):
    """A caption fit for training, and what had to be changed beyond white space."""

    text: str
    notes: tuple[str, ...]


class CaptionFile(NamedTuple):
    """The captions of one file, at least one (which may be empty), and what had to be changed."""

    captions: tuple[str, ...]
    notes: tuple[str, ...]


def clean_caption(text: str) -> str:
    """Returns the caption as one line of at most 1,000 characters.

    Unicode NFC; control characters and lone surrogates removed; runs of white space become one blank; longer text is
    cut after a word. The empty caption is legal and stays empty.
    """
    return clean_and_note(text).text


def clean_and_note(text: str) -> CleanedCaption:
    """`clean_caption`, with notes for whoever counts what was changed."""
    notes = []
    if not text.isprintable():
        # Through UTF-16 the two halves of a character that some JSON writers escape apart meet again.
        joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        text = "".join(character for character in joined if character.isspace() or not _is_rubbish(character))
        if len(text) < len(joined):
            notes.append(NOTE_CLEANED)
    line = " ".join(unicodedata.normalize("NFC", text).split())
    if len(line) > MAX_CHARACTERS:
        line = _cut(line)
        notes.append(NOTE_CUT)
    return CleanedCaption(line, tuple(notes))


def read_caption_file(path: str | os.PathLike[str]) -> CaptionFile:
    """Reads a text file with one caption a line; blank lines are skipped, a blank file is one empty caption.

    Raises:
        ImageError: the file cannot be read.
    """
    return parse_caption_file(read_file(path, first_bytes=MAX_FILE_BYTES + 1))


def parse_caption_file(content: bytes) -> CaptionFile:
    """What `read_caption_file` does with a file's bytes, of which more than 1 MiB + 1 need not be given."""
    notes = []
    if len(content) > MAX_FILE_BYTES:
        # Behind a line, or at least a word, so that no character is torn.
        ends = (content.rfind(separator, 0, MAX_FILE_BYTES) for separator in (b"\n", b" "))
        content = content[: next((end for end in ends if end > 0), MAX_FILE_BYTES)]
        notes.append(NOTE_LONG_FILE)
    text, decoding_notes = decode_text(content)
    notes += decoding_notes
    cleaned = [clean_and_note(line) for line in text.splitlines()]
    notes += [note for caption in cleaned for note in caption.notes]
    return CaptionFile(join_captions(caption.text for caption in cleaned) or ("",), tuple(notes))


def row_captions(row: Mapping[str, Any]) -> list[str]:
    """The captions in the row of a table, as they are written there; [] where no column of captions has a value.

    The first of the columns text, caption, captions and prompt that has a value, however its name is capitalized.
    """
    by_name = {name.strip().lower(): value for name, value in row.items() if isinstance(name, str)}
    value = next((by_name[column] for column in CAPTION_COLUMNS if by_name.get(column) is not None), None)
    return list(captions_of(value))


def captions_of(value: Any) -> tuple[str, ...]:
    """The captions in a field: one string, a list of strings, or a list of strings written as JSON in one string."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = None
        # A caption may itself begin with a bracket.
        if isinstance(parsed, list) and all(isinstance(caption, str) for caption in parsed):
            value = parsed
    if isinstance(value, str):
        return (value,)
    return tuple(caption for caption in value if isinstance(caption, str)) if isinstance(value, list) else ()


def rows_of(batch: Any) -> list[dict[str, Any] | str]:
    """The rows of a batch of Arrow, or in the place of a row what is wrong with it: text that is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [NOT_UTF_8]
        return [row for number in range(batch.num_rows) for row in rows_of(batch.slice(number, 1))]


def caption_columns(names: Iterable[str]) -> list[str]:
    """Those columns of a table, as they are spelled, in which `row_captions` looks."""
    return [name for name in names if name.strip().lower() in CAPTION_COLUMNS]


def clean_captions(captions: Iterable[str], notes: Counter[str]) -> tuple[str, ...]:
    """Cleans the captions of one image and leaves out blank and repeated ones.

    Args:
        captions: as they were found.
        notes: counts what was changed.

    Returns:
        At least one caption, which is empty if all are; () only if there were none.
    """
    cleaned = [clean_and_note(caption) for caption in captions]
    notes.update(note for caption in cleaned for note in caption.notes)
    return join_captions(caption.text for caption in cleaned)


def join_captions(captions: Iterable[str]) -> tuple[str, ...]:
    """Clean captions of one image from several places: each once, and an empty one only if there is no other."""
    kept = dict.fromkeys(captions)  # a set that keeps its order
    if len(kept) > 1:
        kept.pop("", None)
    return tuple(kept)


def decode_text(content: bytes) -> tuple[str, tuple[str, ...]]:
    """Decodes a text file of unknown origin: UTF-8 or UTF-16 with a byte order mark, else Latin-1 with a note."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace"), ()
    try:
        return content.decode("utf-8-sig"), ()
    except UnicodeDecodeError:
        return content.decode("latin-1"), (NOTE_LATIN_1,)


def _is_rubbish(character: str) -> bool:
    """Control characters, surrogates, and the byte order mark that editors leave inside joined files."""
    return unicodedata.category(character) in ("Cc", "Cs") or character == "\ufeff"


def _cut(line: str) -> str:
    """The first 1,000 characters of a longer line, back to the end of a word unless that would lose half of them."""
    end = line.rfind(" ", MAX_CHARACTERS // 2, MAX_CHARACTERS + 1)
    return line[: end if end > 0 else MAX_CHARACTERS]
