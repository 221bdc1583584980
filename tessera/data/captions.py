"""Captions: any text in, one clean line out; and the files that hold them, one caption a line."""

import codecs
import os
import unicodedata
from typing import NamedTuple

from tessera.data.images import read_file

CAPTION_SUFFIXES = (".txt", ".caption")
MAX_CHARACTERS = 1_000
MAX_FILE_BYTES = 2**20

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
    content = read_file(path, first_bytes=MAX_FILE_BYTES + 1)
    notes = []
    if len(content) > MAX_FILE_BYTES:
        # Behind a line, or at least a word, so that no character is torn.
        ends = (content.rfind(separator, 0, MAX_FILE_BYTES) for separator in (b"\n", b" "))
        content = content[: next((end for end in ends if end > 0), MAX_FILE_BYTES)]
        notes.append(NOTE_LONG_FILE)
    text, decoding_notes = decode_text(content)
    notes += decoding_notes
    captions: dict[str, None] = {}  # a set that keeps its order
    for line in text.splitlines():
        cleaned = clean_and_note(line)
        notes += cleaned.notes
        if cleaned.text:
            captions[cleaned.text] = None
    return CaptionFile(tuple(captions) or ("",), tuple(notes))


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
