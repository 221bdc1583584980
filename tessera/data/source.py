"""What a path holds: which layout its captioned images are kept in, and how they are read one after the other."""

import hashlib
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tessera.data.candidates import Candidate, Reject
from tessera.data.images import IMAGE_SUFFIXES
from tessera.data.layouts.caption_table import one_per_image
from tessera.data.layouts.coco import is_coco, read_coco
from tessera.data.layouts.folder import NO_CAPTION, files_below, listing_of, read_folder, survey_folder
from tessera.data.layouts.hugging_face import dataset_fingerprint, read_dataset
from tessera.data.layouts.metadata import METADATA_SUFFIXES, read_metadata
from tessera.data.layouts.parquet import has_images, read_parquet
from tessera.data.layouts.tar import read_tar
from tessera.data.manifest import MANIFEST_NAME
from tessera.data.reading import HUB_PREFIX
from tessera.errors import UserError

EXPECTED = (
    "a folder of captioned images, a .tar, .parquet, .json (COCO), .jsonl, .csv or .tsv file, a manifest, or hf:NAME"
)

Notes = Counter[str]
ReadTable = Callable[[Path, str, Notes], Iterator[Candidate | Reject]]


class Source(NamedTuple):
    """Captioned images that nobody has looked at."""

    name: str
    root: Path
    """resolved; what is read lies below it"""
    listing: str
    """sha256 over names, sizes and times, or the fingerprint of a data set on the hub: equal listings, equal images"""
    num_images: int | None
    """at most so many candidates; None where nobody knows before they have been read"""
    read: Callable[[Notes], Iterator[Candidate | Reject]]
    """goes through all of them, the same ones in the same order each time, and counts notes"""


def find_source(path: str) -> Source:
    """Decides the layout of a path.

    Args:
        path: a folder, a file, or "hf:NAME_OR_PATH[:SPLIT]".

    Raises:
        UserError: nothing is there, or nothing that could hold images; or the data set cannot be loaded.
    """
    if path.startswith(HUB_PREFIX):
        return _hub_source(path)
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"{path} does not exist: expected {EXPECTED}")
    return _folder_source(place) if place.is_dir() else _file_source(place)


def _folder_source(folder: Path) -> Source:
    root = folder.resolve()
    survey = survey_folder(root)
    if survey.is_empty and (folder / MANIFEST_NAME).is_file():
        raise UserError(f"{folder} holds a manifest and no images: give {folder / MANIFEST_NAME}")
    if survey.is_empty:
        raise UserError(
            f"no images in {folder}: expected {', '.join(suffix[1:] for suffix in IMAGE_SUFFIXES)} files, "
            "each with its caption in x.txt, x.caption or x.json, or in a row of metadata.jsonl, .csv, .tsv or "
            ".parquet; or plain .tar archives, Parquet files with images, COCO annotations"
        )
    return Source(root.name, root, survey.listing, survey.num_images, partial(read_folder, root, survey))


def _file_source(path: Path) -> Source:
    root, name, suffix = path.parent.resolve(), path.name, path.suffix.lower()
    if suffix == ".tar":
        return Source(root.name, root, _listing(root, [name]), None, partial(read_tar, root, name))
    if suffix == ".parquet" and has_images(path):
        return Source(root.name, root, _listing(root, [name]), None, partial(read_parquet, root, name))
    if suffix == ".json" and is_coco(path):
        # Annotations usually lie in a folder of their own beside those of the images.
        images, own = _images_of(root.parent, posixpath.join(root.name, name), read_coco), posixpath.join(root.name, "")
        if images and all(image.startswith(own) for image in images):
            return _table_source(root, name, read_coco, [image.removeprefix(own) for image in images])
        return _table_source(root.parent, posixpath.join(root.name, name), read_coco, images)
    if suffix in METADATA_SUFFIXES:
        return _table_source(root, name, read_metadata, _images_of(root, name, read_metadata))
    raise UserError(f"{path} is not {EXPECTED}")


def _images_of(root: Path, name: str, read: ReadTable) -> list[str]:
    items = read(root, name, Counter())
    return list(dict.fromkeys(item.location.file for item in items if isinstance(item, Candidate)))


def _table_source(root: Path, name: str, read: ReadTable, images: list[str]) -> Source:
    """A file that names images elsewhere: theirs are the sizes and times that count."""

    def joined(notes: Notes) -> Iterator[Candidate | Reject]:
        return one_per_image(read(root, name, notes), no_caption=NO_CAPTION)

    return Source(root.name, root, _listing(root, [name, *images]), len(images), joined)


def _hub_source(spec: str) -> Source:
    name = os.path.expanduser(spec.removeprefix(HUB_PREFIX))
    spec = f"{HUB_PREFIX}{name}"
    folder = next((Path(place) for place in (name, name.rpartition(":")[0]) if place and Path(place).is_dir()), None)
    state = listing_of(folder, files_below(folder)) if folder else dataset_fingerprint(spec)
    listing = hashlib.sha256(f"{spec}\0{state}".encode("utf-8", "surrogatepass")).hexdigest()
    return Source(Path(name).name, Path(os.sep), listing, None, partial(read_dataset, spec))


def _listing(root: Path, files: list[str]) -> str:
    return hashlib.sha256(f"{root}\0{listing_of(root, files)}".encode("utf-8", "surrogatepass")).hexdigest()
