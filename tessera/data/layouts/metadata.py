"""Metadata files: a table of image names and captions, as in Hugging Face's imagefolder layout.

    photos/metadata.jsonl  (or .csv, .tsv, .parquet)      rows of file_name and text, for images in its folder and below

Other names of the two columns are guessed, and the guess is noted: also image_file_name and the like, by which rows of
several images name each of them; of two such columns nobody knows which one the caption speaks of. Rows are read one
after the other.
"""

import codecs
import csv
import io
import itertools
import json
import posixpath
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tessera.data.candidates import Candidate, Location, Reject
from tessera.data.captions import CAPTION_COLUMNS, NOTE_LATIN_1, captions_of, clean_captions, rows_of
from tessera.data.images import ImageError
from tessera.data.reading import resolve_inside
from tessera.errors import UserError

METADATA_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
METADATA_NAMES = tuple(f"metadata{suffix}" for suffix in METADATA_SUFFIXES)
FILE_COLUMNS = ("file_name", "filename", "image", "image_path", "filepath", "path")
FILE_SUFFIX = "_file_name"  # of columns that Hugging Face's imagefolder reads as file names, too

NO_IMAGE_FOR_ROW = "no image for metadata row"

_HINTS = {
    ",": "quote captions that hold commas",
    ";": "quote captions that hold semicolons",
    "\t": "captions must not hold tabs",
}
_MOST_LINE_BYTES = 16 * 2**20
_ROWS_AT_ONCE = 1024
_MOST_SHOWN_CHARACTERS = 100


class _Row(NamedTuple):
    place: str
    """for people: "metadata.csv:17"."""
    values: Mapping[str, Any] | str
    """by column, or what is wrong with the row"""


def read_metadata(root: Path, file: str, notes: Counter[str]) -> Iterator[Candidate | Reject]:
    """Reads a table: a candidate for every row that names an image file below the root, which may lie anywhere there.

    Args:
        root: a resolved folder.
        file: path of the table below it, with forward slashes.
        notes: counts what was changed or guessed.

    Yields:
        A candidate without captions where a row has none: they may be found beside the image. Several rows may speak of
        one image. A reject for every row that is damaged or names no image.

    Raises:
        UserError: a Parquet file, and pyarrow is not installed.
    """
    told: set[str] = set()  # one note for a column, not for each of its rows

    def note_guess(column: str, wanted: str) -> None:
        if column != wanted and column not in told:
            told.add(column)
            notes[f"column {column!r} of a metadata file taken as {wanted!r}"] += 1

    folder = posixpath.dirname(file)
    several = ""  # one reason for a table, however its rows differ: reasons are counted in memory
    for place, row in _rows(root, file, notes):
        if isinstance(row, str):
            yield Reject(place, row)
            continue
        others = _other_file_columns(row)
        if len(others) > 1:
            several = several or _which_of(others)
            yield Reject(place, several)
            continue
        column, name = _first(row, FILE_COLUMNS + others)
        if not isinstance(name, str) or not name:
            yield Reject(place, "metadata row without file_name")
            continue
        note_guess(column, FILE_COLUMNS[0])
        source = posixpath.normpath(posixpath.join(folder, name))
        try:
            found = resolve_inside(root, source)
        except ImageError as error:
            yield Reject(place, str(error))
            continue
        if not found.is_file():
            yield Reject(place, NO_IMAGE_FOR_ROW)
            continue
        if posixpath.isabs(source):
            source = found.relative_to(root).as_posix()
        column, value = _first(row, CAPTION_COLUMNS)
        captions = clean_captions(captions_of(value), notes)
        if captions:
            note_guess(column, CAPTION_COLUMNS[0])
        yield Candidate(Location(source), captions)


def _rows(root: Path, file: str, notes: Counter[str]) -> Iterator[_Row]:
    read: Callable[[Path, str, Counter[str]], Iterator[_Row]] = {
        ".jsonl": _json_rows,
        ".parquet": _parquet_rows,
    }.get(posixpath.splitext(file)[1].lower(), _csv_rows)
    try:
        path = resolve_inside(root, file)
        if not stat.S_ISREG(path.stat().st_mode):
            raise ImageError("not a regular file")
        yield from read(path, file, notes)
    except ImageError as error:
        yield _Row(file, str(error))
    except OSError as error:
        yield _Row(file, f"cannot be read: {error.strerror or error}")


def _json_rows(path: Path, file: str, notes: Counter[str]) -> Iterator[_Row]:
    for number, line in enumerate(_lines(path, notes), start=1):
        if line.strip():
            place = f"{file}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                yield _Row(place, "metadata row is not JSON")
                continue
            yield _Row(place, row if isinstance(row, dict) else "metadata row is not an object")


def _csv_rows(path: Path, file: str, notes: Counter[str]) -> Iterator[_Row]:
    lines = _lines(path, notes)
    header = next(lines, "")
    is_tsv = file.lower().endswith(".tsv")
    # Spreadsheets of many countries write semicolons.
    delimiter = "\t" if is_tsv else max(",;\t", key=header.count)
    # In tables of tabs a quote is mostly a part of the text, and must not swallow the rows behind it.
    quoting = csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL
    reader = csv.DictReader(itertools.chain([header], lines), delimiter=delimiter, quoting=quoting)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield _Row(f"{file}:{reader.reader.line_num}", f"metadata row is not CSV: {error}")
            continue
        place = f"{file}:{reader.reader.line_num}"
        if any(row.pop(None, ())):
            yield _Row(place, f"metadata row with more fields than the header: {_HINTS[delimiter]}")
            continue
        if is_tsv:
            row = {_unquoted(name): _unquoted(value or "") for name, value in row.items()}
        # A table of text has no other way to say that there is no value.
        yield _Row(place, {name: value or None for name, value in row.items()})


def _unquoted(value: str) -> str:
    """A field of a line that other programs have written in quotes, because it holds some."""
    inside = value[1:-1]
    is_quoted = len(value) > 1 and value[0] == value[-1] == '"' and '"' not in inside.replace('""', "")
    return inside.replace('""', '"') if is_quoted else value


def _parquet_rows(path: Path, file: str, notes: Counter[str]) -> Iterator[_Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError('Parquet files need pyarrow: pip install "tessera[parquet]"') from error
    numbers = itertools.count()
    try:
        with parquet.ParquetFile(path) as table:
            names = [name for name in table.schema_arrow.names if _is_used(_key(name))]
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=names):
                yield from (_Row(f"{file} row {next(numbers)}", row) for row in rows_of(batch))
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: names of columns that are not UTF-8
        yield _Row(file, f"damaged: {' '.join(str(error).split())[:100]}")


def _lines(path: Path, notes: Counter[str]) -> Iterator[str]:
    """Lines with their ends of a text file: UTF-8, or UTF-16 with a byte order mark, else Latin-1."""
    with path.open("rb") as file:
        is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        file.seek(0)
        if is_utf16:
            with io.TextIOWrapper(file, encoding="utf-16", errors="replace", newline="\n") as text:
                yield from iter(lambda: text.readline(_MOST_LINE_BYTES), "")
            return
        is_latin_1 = False
        for line in iter(lambda: file.readline(_MOST_LINE_BYTES), b""):
            try:
                yield line.removeprefix(codecs.BOM_UTF8).decode()
            except UnicodeDecodeError:
                if not is_latin_1:
                    notes[NOTE_LATIN_1] += 1
                is_latin_1 = True
                yield line.decode("latin-1")


def _other_file_columns(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of a row that end like `image_file_name`, with a value or without; none beside a known column."""
    keys = [_key(name) for name in row if isinstance(name, str)]
    is_known = any(key in FILE_COLUMNS for key in keys)
    return () if is_known else tuple(key for key in keys if key.endswith(FILE_SUFFIX))


def _which_of(columns: tuple[str, ...]) -> str:
    # Without a colon: what stands behind one is not in the summary.
    shown = " and ".join(map(repr, columns))[:_MOST_SHOWN_CHARACTERS]
    return f"metadata row without file_name but with {shown}, rename the one to read to file_name"


def _is_used(key: str) -> bool:
    return key in FILE_COLUMNS or key in CAPTION_COLUMNS or key.endswith(FILE_SUFFIX)


def _first(row: Mapping[str, Any], columns: tuple[str, ...]) -> tuple[str, Any]:
    """The first of these columns that has a value, as it is spelled, however it is capitalized, and the value."""
    spelled = {_key(name): name for name, value in row.items() if isinstance(name, str) and value is not None}
    name = next((spelled[column] for column in columns if column in spelled), "")
    return name, row.get(name)


def _key(column: str) -> str:
    return column.strip().lower()
