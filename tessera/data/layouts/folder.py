"""Folders: captions beside the images or in tables, and whatever else is found that holds captioned images.

    photos/cat.jpg  photos/cat.txt            captions beside the image (.txt or .caption), one a line
    photos/cat.jpg  photos/cat.json           {"caption": "a cat"}, or text or prompt; read where there is no text file
    photos/metadata.jsonl                     see `tessera.data.layouts.metadata`
    coco/annotations/captions_val2017.json    see `tessera.data.layouts.coco`
    shards/00000.tar  data/train.parquet  saved/dataset_info.json     archives, tables and data sets that hold images

A folder is walked twice, so that nothing is kept of it but the names in the folder at hand: once for names, sizes and
times, by which a later ingest knows that nothing has changed, and once for the captions. Nothing is decoded here.
"""

import hashlib
import json
import os
import posixpath
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tessera.data.candidates import NO_IMAGE_FOR_CAPTION, Candidate, Location, Reject
from tessera.data.captions import (
    CAPTION_SUFFIXES,
    captions_of,
    clean_captions,
    join_captions,
    read_caption_file,
    row_captions,
)
from tessera.data.images import IMAGE_SUFFIXES, UNSUPPORTED_SUFFIXES, ImageError, read_file
from tessera.data.layouts.caption_table import CaptionTable
from tessera.data.layouts.coco import is_coco, read_coco
from tessera.data.layouts.hugging_face import is_saved_dataset, read_dataset
from tessera.data.layouts.metadata import METADATA_NAMES, read_metadata
from tessera.data.layouts.parquet import NO_COLUMN, read_parquet
from tessera.data.layouts.tar import read_tar
from tessera.data.reading import resolve_inside

PACKED_SUFFIXES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")

NO_CAPTION = "no caption: expected x.txt, x.caption, x.json or a metadata row"
NOTE_PACKED = "compressed archive passed over: unpack it, or store images in plain .tar"
NOTE_NO_IMAGES_INSIDE = "Parquet file without images passed over"
NOTE_BESIDE_SHARD = "Parquet file beside the shard of the same name passed over"


class Survey(NamedTuple):
    """What the first walk has found."""

    listing: str
    """sha256 over names, sizes and times of the files that count: of all for which `read_folder` yields something"""
    num_images: int | None
    """image files; None where archives or tables hold images, too, that nobody has counted"""
    tables: tuple[str, ...]
    """files that name images elsewhere, below the root"""
    is_empty: bool
    """whether nothing was found that could hold an image or a caption"""


@dataclass(frozen=True, kw_only=True)
class _Folder:
    """The names in one folder that count."""

    path: str
    """below the root, with forward slashes; "" for the root itself"""
    images: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    captions: dict[str, None] = field(default_factory=dict)  # a set that keeps its order
    json: dict[str, None] = field(default_factory=dict)
    metadata: list[str] = field(default_factory=list)
    holders: list[str] = field(default_factory=list)
    """archives and tables that may hold images themselves"""
    passed_over: list[str] = field(default_factory=list)
    """notes, one for each file"""
    data_set: list[str] = field(default_factory=list)
    """all files, where this is a data set that Hugging Face's library has saved"""

    def below(self, name: str) -> str:
        """Path of a file in this folder below the root."""
        return posixpath.join(self.path, name)


def survey_folder(root: Path) -> Survey:
    """Walks a folder without reading captions or images.

    Args:
        root: a resolved folder.
    """
    digest = hashlib.sha256(str(root).encode("utf-8", "surrogatepass"))
    tables: list[str] = []
    num_images, has_holders, is_empty = 0, False, True
    for folder in _walk(root, Counter()):
        beside = _beside_images(folder)
        annotations = [name for name in folder.json if name not in beside and is_coco(root / folder.below(name))]
        counted = [*folder.images, *folder.captions, *(name for name in folder.json if name in beside)]
        counted += [*folder.metadata, *annotations, *folder.holders, *folder.data_set, *folder.unsupported]
        digest.update(listing_of(root, map(folder.below, counted)).encode())
        tables += [folder.below(name) for name in (*folder.metadata, *annotations)]
        num_images += len(folder.images)
        has_holders |= bool(folder.holders or folder.data_set)
        is_empty &= not counted
    return Survey(digest.hexdigest(), None if has_holders else num_images, tuple(tables), is_empty)


def read_folder(root: Path, survey: Survey, notes: Counter[str]) -> Iterator[Candidate | Reject]:
    """Pairs the images below a folder with captions.

    Hidden files, `__MACOSX` and model folders inside are passed over, and links to folders are not entered.

    Args:
        root: a resolved folder.
        survey: what `survey_folder` has returned for it.
        notes: counts what was changed or passed over.

    Yields:
        Every image, and every caption that has none, once: as a candidate or as a reject.
    """
    with CaptionTable() as table:
        for file in survey.tables:
            read = read_metadata if posixpath.basename(file).lower() in METADATA_NAMES else read_coco
            yield from table.fill(read(root, file, notes))
        for folder in _walk(root, notes):
            notes.update(folder.passed_over)
            if folder.data_set:
                yield from _read_saved(root, folder, notes)
                continue
            yield from (
                Reject(folder.below(name), f"format not supported: {_suffix(name)}") for name in folder.unsupported
            )
            used: set[str] = {file for name in folder.unsupported for file in _named_after(name, folder.captions)}
            for name in folder.images:
                beside = _named_after(name, folder.captions)
                used.update(beside)
                given = table.take(folder.below(name)) if survey.tables else None
                yield _candidate(root, folder, name, given or (), beside, notes)
            yield from (
                Reject(folder.below(name), NO_IMAGE_FOR_CAPTION) for name in folder.captions if name not in used
            )
            for name in folder.holders:
                yield from _read_holder(root, folder.below(name), notes)
        # Images that rows name and the walk has passed by: those of hidden folders, or without a suffix of images.
        for image in table.not_taken():
            captions = table.take(image)
            yield Candidate(Location(image), captions) if captions else Reject(image, NO_CAPTION)


def listing_of(root: Path, files: Iterable[str]) -> str:
    """sha256 over names, sizes and times of files below a root."""
    digest = hashlib.sha256()
    for file in files:
        try:
            status = os.stat(root / file)
            line = f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n"
        except (OSError, ValueError):
            line = f"{file}\0missing\n"
        digest.update(line.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def files_below(folder: Path) -> list[str]:
    """All files of a folder, hidden ones too, relative to it and sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _walk(root: Path, notes: Counter[str]) -> Iterator[_Folder]:
    # Links to folders are not entered: they may lead outside, or in a circle.
    for folder, folders, names in os.walk(root, onerror=lambda _: notes.update(["folder cannot be read"])):
        if "tessera.yaml" in names:  # a model folder: its pictures are products
            folders.clear()
            continue
        below = Path(folder).relative_to(root).as_posix()
        path = "" if below == "." else below
        if not {"state.json", "dataset_dict.json"}.isdisjoint(names) and is_saved_dataset(Path(folder)):
            folders.clear()
            yield _Folder(path=path, data_set=files_below(Path(folder)))
            continue
        notes.update("linked folder not entered" for name in folders if os.path.islink(os.path.join(folder, name)))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        yield _sorted_out(path, sorted(names), {*names, *folders})


def _sorted_out(path: str, names: list[str], neighbors: set[str]) -> _Folder:
    found = _Folder(path=path)
    for name in names:
        stem, suffix = posixpath.splitext(name)[0], _suffix(name)
        if name.startswith("."):
            continue
        if suffix in IMAGE_SUFFIXES:
            found.images.append(name)
        elif suffix in UNSUPPORTED_SUFFIXES:
            found.unsupported.append(name)
        elif suffix in CAPTION_SUFFIXES:
            found.captions[name] = None
        elif suffix == ".json":
            found.json[name] = None
        elif suffix == ".parquet" and (f"{stem}.tar" in neighbors or (stem.isdigit() and stem in neighbors)):
            found.passed_over.append(NOTE_BESIDE_SHARD)  # img2dataset's table of what lies in the shard or folder
        elif name.lower() in METADATA_NAMES:
            found.metadata.append(name)
        elif suffix in (".tar", ".parquet"):
            found.holders.append(name)
        elif suffix in PACKED_SUFFIXES:
            found.passed_over.append(NOTE_PACKED)
    return found


def _candidate(
    root: Path, folder: _Folder, name: str, captions: tuple[str, ...], beside: list[str], notes: Counter[str]
) -> Candidate | Reject:
    """An image with the captions that a table gave it, else those of the text files beside it, else of JSON files."""
    image = folder.below(name)
    try:
        if not captions:
            found = [read_caption_file(resolve_inside(root, folder.below(file))) for file in beside]
            notes.update(note for file in found for note in file.notes)
            captions = join_captions(caption for file in found for caption in file.captions)
        if not captions:
            files = _named_after(name, folder.json, suffixes=(".json",))
            found_in_json = [text for file in files for text in _json_captions(root, folder.below(file))]
            captions = clean_captions(found_in_json, notes)
    except ImageError as error:
        return Reject(image, str(error))
    return Candidate(Location(image), captions) if captions else Reject(image, NO_CAPTION)


def _json_captions(root: Path, file: str) -> list[str]:
    try:
        content = json.loads(read_file(resolve_inside(root, file)))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError("no caption: the JSON file beside it is damaged") from error
    return row_captions(content) if isinstance(content, dict) else list(captions_of(content))


def _read_holder(root: Path, file: str, notes: Counter[str]) -> Iterator[Candidate | Reject]:
    if _suffix(file) == ".tar":
        yield from read_tar(root, file, notes)
        return
    for item in read_parquet(root, file, notes):
        if isinstance(item, Reject) and item.reason == NO_COLUMN:
            notes[NOTE_NO_IMAGES_INSIDE] += 1  # a table of something else
        else:
            yield item


def _read_saved(root: Path, folder: _Folder, notes: Counter[str]) -> Iterator[Candidate | Reject]:
    """A saved data set, each row by the data set's place below the root, so that both may move."""
    for item in read_dataset(str(root / folder.path), notes):
        if isinstance(item, Reject):
            yield item._replace(source=item.source.removeprefix(f"{root}{os.sep}"))
        else:
            yield Candidate(item.location._replace(file=folder.path or "."), item.captions)


def _beside_images(folder: _Folder) -> set[str]:
    """The JSON files that are named after an image of their folder."""
    return {file for name in folder.images for file in _named_after(name, folder.json, suffixes=(".json",))}


def _named_after(name: str, files: Collection[str], *, suffixes: tuple[str, ...] = CAPTION_SUFFIXES) -> list[str]:
    """x.txt, x.caption and also x.png.txt of x.png, as they are spelled."""
    stems = (posixpath.splitext(name)[0], name)
    names = (stem + spelled for stem in stems for suffix in suffixes for spelled in (suffix, suffix.upper()))
    return [file for file in names if file in files]


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()
