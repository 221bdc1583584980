"""COCO captions: one JSON file that lists images and, apart from them, annotations of about five captions for each.

    coco/annotations/captions_train2017.json     {"images": [{"id": 9, "file_name": "000000000009.jpg"}, ...],
                                                  "annotations": [{"image_id": 9, "caption": "Closeup of bins"}, ...]}
    coco/train2017/000000000009.jpg

Lin et al., Microsoft COCO (2014); Chen et al., Microsoft COCO Captions (2015).
"""

import json
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tessera.data.candidates import NO_IMAGE_FOR_CAPTION, Candidate, Location, Reject
from tessera.data.captions import captions_of, clean_captions, decode_text
from tessera.data.images import ImageError, read_file
from tessera.data.reading import OUTSIDE, resolve_inside

NOT_COCO = "not COCO captions: expected an object with lists of images and annotations"
NOTE_NO_CAPTION = "COCO annotation without caption passed over"

_SNIFFED_BYTES = 2**16
_TRIED_NAMES = 16
# All that is kept of a file that also says where each image came from and who may use it.
_USED_KEYS = frozenset(("images", "annotations", "id", "file_name", "image_id", "caption"))
_BETWEEN = re.compile(r"[\s,:]*")


def is_coco(path: Path) -> bool:
    """Whether a JSON file holds COCO captions, as far as its first and last 64 KiB tell."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return False
        with path.open("rb") as file:
            head = file.read(_SNIFFED_BYTES)
            file.seek(max(0, status.st_size - _SNIFFED_BYTES))
            tail = file.read(_SNIFFED_BYTES)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return False
    # Boxes and key points of the same images lie in files of the same form, with annotations behind the images.
    return b'"caption"' in head + tail and _begins_like_coco(decode_text(head)[0].lstrip())


def read_coco(root: Path, file: str, notes: Counter[str]) -> Iterator[Candidate | Reject]:
    """Joins the images with their captions.

    The images may lie in the folder of the JSON file or the one above, there also in train2017 (of
    captions_train2017.json), images/train2017 or images; the first place that has one of them is taken.

    Args:
        root: a resolved folder.
        file: path of the JSON file below it, with forward slashes.
        notes: counts what was changed, and says where the images were found.

    Yields:
        A candidate for every image, without captions where there are none: they may be found beside the image. A reject
        for every caption that has no image.
    """
    try:
        content = _load(resolve_inside(root, file))
    except ImageError as error:
        yield Reject(file, str(error))
        return
    captions: dict[Any, list[str]] = {}
    names: dict[Any, str] = {}
    for number, image in enumerate(content["images"]):
        match image:
            case {"id": int() | str() as identity, "file_name": str(name)} if name:
                if identity not in captions:
                    names[identity], captions[identity] = name, []
                else:
                    yield Reject(f"{file}: images[{number}]", f"duplicate id: {identity}"[:100])
            case _:
                yield Reject(f"{file}: images[{number}]", "image without id or file_name")
    for number, annotation in enumerate(content["annotations"]):
        match annotation:
            case {"image_id": int() | str() as identity, "caption": str() | [*_] as caption} if identity in captions:
                captions[identity] += captions_of(caption)
            case {"caption": str() | [*_]}:
                yield Reject(f"{file}: annotations[{number}]", NO_IMAGE_FOR_CAPTION)
            case _:
                notes[NOTE_NO_CAPTION] += 1
    folder = _find_images(root, file, list(names.values())[:_TRIED_NAMES])
    if folder is None:
        yield Reject(file, _nowhere(root, file, list(names.values())))
        return
    notes[f"images of {posixpath.basename(file)} found in {folder or '.'}"] += 1
    for identity, name in names.items():
        source = posixpath.normpath(posixpath.join(folder, name))
        if source.startswith(("/", "../")) or source == "..":
            yield Reject(f"{file}: {name[:100]!r}", OUTSIDE)
        else:
            yield Candidate(Location(source), clean_captions(captions[identity], notes))


def _begins_like_coco(beginning: str) -> bool:
    """Whether an object's first list of images or annotations has a first entry of the right form."""
    decoder = json.JSONDecoder()
    position = 1
    try:
        while beginning.startswith("{"):
            key, position = decoder.raw_decode(beginning, _skip(beginning, position))
            position = _skip(beginning, position)
            if key in ("images", "annotations"):
                first, _ = decoder.raw_decode(beginning, _skip(beginning, position + 1))
                wanted = {"id", "file_name"} if key == "images" else {"image_id", "caption"}
                return isinstance(first, dict) and wanted <= first.keys()
            _, position = decoder.raw_decode(beginning, position)
    except (ValueError, IndexError, RecursionError):
        pass
    return False


def _skip(text: str, position: int) -> int:
    found = _BETWEEN.match(text, position)
    return found.end() if found else position


def _load(path: Path) -> dict[str, list[Any]]:
    text = decode_text(read_file(path))[0]
    try:
        content = json.loads(text, object_pairs_hook=_used_pairs)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"not JSON: {' '.join(str(error).split())[:80]}") from error
    except MemoryError as error:
        raise ImageError("not enough memory to read it") from error
    match content:
        case {"images": [*_], "annotations": [*_]}:
            return content
    raise ImageError(NOT_COCO)


def _used_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in pairs if key in _USED_KEYS}


def _find_images(root: Path, file: str, names: list[str]) -> str | None:
    """The first folder below the root in which one of the images lies."""
    for folder in _folders(file):
        for name in names:
            try:
                if resolve_inside(root, posixpath.join(folder, name)).is_file():
                    return folder
            except (ImageError, OSError):  # OSError: a name longer than the file system has
                continue
    return None


def _folders(file: str) -> list[str]:
    """Where images may lie, below the root."""
    own = posixpath.dirname(file)
    name = posixpath.splitext(posixpath.basename(file))[0].removeprefix("captions_")
    places = [own, posixpath.dirname(own)]
    below = (posixpath.join(place, part) for part in (name, f"images/{name}", "images") for place in places)
    return list(dict.fromkeys((*places, *below)))


def _nowhere(root: Path, file: str, names: list[str]) -> str:
    if not names:
        return NOT_COCO
    if (
        not posixpath.dirname(file)
        and _find_images(root.parent, f"{root.name}/{file}", names[:_TRIED_NAMES]) is not None
    ):
        return f"images lie outside of the folder: ingest {root.parent} instead"
    places = ", ".join(folder or "." for folder in _folders(file))
    return f"images not found: {names[0][:100]!r} in none of {places}"
