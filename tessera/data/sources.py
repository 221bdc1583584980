"""Which images a folder holds and what is said about each: files side by side, or Hugging Face's imagefolder metadata.

    photos/cat.jpg  photos/cat.txt            captions beside the image (.txt or .caption), one a line
    photos/metadata.jsonl  (or .csv)          rows of file_name and text | caption | prompt, for its folder and below

Nothing is decoded here. Every image, and every caption that has none, comes out once: as a candidate or as a reject.
"""

import csv
import hashlib
import io
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tessera.data.captions import CAPTION_SUFFIXES, clean_and_note, decode_text, read_caption_file
from tessera.data.images import ImageError, read_file

IMAGE_SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
UNSUPPORTED_SUFFIXES = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".ico", ".tga", ".exr", ".dng")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
FILE_COLUMNS = ("file_name", "filename", "image", "path")
CAPTION_COLUMNS = ("text", "caption", "prompt")

NO_CAPTION = "no caption: expected x.txt, x.caption or a metadata row"
NO_IMAGE_FOR_CAPTION = "no image for caption"
NO_IMAGE_FOR_ROW = "no image for metadata row"
OUTSIDE = "points outside the folder"


class Reject(NamedTuple):
    """Something that was seen and is not used; the reason's kind is the text before its first colon."""

    source: str
    reason: str


class Candidate(NamedTuple):
    """An image file with its captions, not yet opened."""

    source: str  # path below the root, with forward slashes
    captions: tuple[str, ...]


class Sources(NamedTuple):
    """What a folder or a metadata file holds."""

    root: Path
    candidates: tuple[Candidate, ...]
    rejects: tuple[Reject, ...]
    notes: Counter[str]
    listing: str  # sha256 over names, sizes and times of all the files that count


class _Files(NamedTuple):
    images: dict[str, None]  # a set that keeps its order
    unsupported: list[str]
    captions: dict[str, None]
    metadata: list[str]


def find_sources(path: Path) -> Sources:
    """Pairs images with captions below a folder, or those that one metadata file names.

    Hidden files, `__MACOSX` and model folders inside are passed over. Links to files outside of the folder are refused.

    Args:
        path: an existing folder, or a .jsonl or .csv file with a row per image.
    """
    notes: Counter[str] = Counter()
    if path.is_dir():
        root = path.resolve()
        files = _walk(root, notes)
    else:
        root = path.parent.resolve()
        files = _Files({}, [], {}, [path.name])
    rejects = [Reject(source, f"format not supported: {_suffix(source)}") for source in files.unsupported]

    captions_from_rows: dict[str, list[str]] = {}
    for metadata in files.metadata:
        rejects += _read_metadata(root, metadata, captions_from_rows, notes)
    images = {**files.images, **dict.fromkeys(captions_from_rows)}

    candidates = []
    used_captions = {file for source in files.unsupported for file in _caption_files(source, files.captions)}
    for source in sorted(images):
        beside = _caption_files(source, files.captions)
        used_captions.update(beside)
        captions = list(captions_from_rows.get(source, ()))
        try:
            for file in beside if not captions else ():
                found = read_caption_file(resolve_inside(root, file))
                captions += found.captions
                notes.update(found.notes)
            resolve_inside(root, source)
        except ImageError as error:
            rejects.append(Reject(source, str(error)))
            continue
        if captions:
            candidates.append(Candidate(source, tuple(dict.fromkeys(captions))))
        else:
            rejects.append(Reject(source, NO_CAPTION))
    rejects += [Reject(file, NO_IMAGE_FOR_CAPTION) for file in sorted(files.captions.keys() - used_captions)]
    listing = _listing(root, [*images, *files.captions, *files.metadata])
    return Sources(root, tuple(candidates), tuple(rejects), notes, listing)


def resolve_inside(root: Path, source: str) -> Path:
    """The file that a relative name means, links followed.

    Args:
        root: a resolved folder.
        source: name relative to it, with forward slashes.

    Raises:
        ImageError: it lies outside of the folder.
    """
    try:
        target = (root / source).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name, a loop of links
        raise ImageError(f"cannot be read: {error}") from error
    if not target.is_relative_to(root):
        raise ImageError(OUTSIDE)
    return target


def _walk(root: Path, notes: Counter[str]) -> _Files:
    files = _Files({}, [], {}, [])
    # Links to folders are not entered: they may lead outside, or in a circle.
    for folder, folders, names in os.walk(root, onerror=lambda _: notes.update(["folder cannot be read"])):
        if "tessera.yaml" in names:  # a model folder: its pictures are products
            folders.clear()
            continue
        notes.update("linked folder not entered" for name in folders if os.path.islink(os.path.join(folder, name)))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        below = Path(folder).relative_to(root).as_posix()
        for name in sorted(names):
            source = name if below == "." else f"{below}/{name}"
            suffix = _suffix(name)
            if name.startswith("."):
                continue
            if suffix in IMAGE_SUFFIXES:
                files.images[source] = None
            elif suffix in UNSUPPORTED_SUFFIXES:
                files.unsupported.append(source)
            elif suffix in CAPTION_SUFFIXES:
                files.captions[source] = None
            elif name in METADATA_NAMES:
                files.metadata.append(source)
    return files


def _caption_files(source: str, captions: Mapping[str, None]) -> list[str]:
    """x.txt, x.caption and also x.png.txt of x.png, as they are spelled."""
    stems = (posixpath.splitext(source)[0], source)
    names = (stem + spelled for stem in stems for suffix in CAPTION_SUFFIXES for spelled in (suffix, suffix.upper()))
    return [name for name in names if name in captions]


def _read_metadata(root: Path, metadata: str, captions: dict[str, list[str]], notes: Counter[str]) -> list[Reject]:
    """Adds the captions of a metadata file to those already found; returns the rows that name no usable image."""
    try:
        text, decoding_notes = decode_text(read_file(resolve_inside(root, metadata)))
    except ImageError as error:
        return [Reject(metadata, str(error))]
    notes.update(decoding_notes)
    rejects = []
    for line, row in _csv_rows(text) if _suffix(metadata) == ".csv" else _json_rows(text):
        place = f"{metadata}:{line}"
        if isinstance(row, str):
            rejects.append(Reject(place, row))
            continue
        name = _first(row, FILE_COLUMNS)
        if not isinstance(name, str) or not name:
            rejects.append(Reject(place, "metadata row without file_name"))
            continue
        source = posixpath.normpath(posixpath.join(posixpath.dirname(metadata), name))
        try:
            found = resolve_inside(root, source)
        except ImageError as error:
            rejects.append(Reject(place, str(error)))
            continue
        if not found.is_file():
            rejects.append(Reject(place, NO_IMAGE_FOR_ROW))
            continue
        if posixpath.isabs(source):
            source = found.relative_to(root).as_posix()
        known = captions.setdefault(source, [])
        for caption in _row_captions(row):
            cleaned = clean_and_note(caption)
            known.append(cleaned.text)
            notes.update(cleaned.notes)
    return rejects


def _json_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number, row or what is wrong with it)."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                yield number, "metadata row is not JSON"
                continue
            yield number, row if isinstance(row, dict) else "metadata row is not an object"


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)  # spreadsheets of many countries write semicolons
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    while True:
        try:
            row: dict[str, Any] = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.reader.line_num, f"metadata row is not CSV: {error}"
            continue
        yield reader.reader.line_num, row


def _first(row: Mapping[str, Any], columns: tuple[str, ...]) -> Any:
    """The first of these columns that has a value, however its name is capitalized."""
    by_name = {name.strip().lower(): value for name, value in row.items() if isinstance(name, str)}
    return next((by_name[column] for column in columns if by_name.get(column) is not None), None)


def _row_captions(row: Mapping[str, Any]) -> list[str]:
    """Captions of a row: one string, a list of strings, or a list of strings written as JSON in one field."""
    value = _first(row, CAPTION_COLUMNS)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = None
        # A caption may itself begin with a bracket.
        if isinstance(parsed, list) and all(isinstance(caption, str) for caption in parsed):
            value = parsed
    if isinstance(value, str):
        return [value]
    return [caption for caption in value if isinstance(caption, str)] if isinstance(value, list) else []


def _listing(root: Path, sources: list[str]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        try:
            status = os.stat(root / source)
            line = f"{source}\0{status.st_size}\0{status.st_mtime_ns}\n"
        except (OSError, ValueError):
            line = f"{source}\0missing\n"
        digest.update(line.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()
