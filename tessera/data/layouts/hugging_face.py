"""Data sets of Hugging Face's `datasets`: folders that its `save_to_disk` has written, and what `load_dataset` finds.

    hf:saved/pokemon    hf:saved/pokemon:validation    hf:someone/captioned-photos:train

The column of images is known by its type, that of captions by its name; images are read as they were stored. A row may
name a file instead of holding it: that is read from the folder of the data set and from the library's own caches only,
because whoever made the data set has written the name.
"""

import os
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tessera.data.candidates import Candidate, Location, Reject
from tessera.data.captions import CAPTION_COLUMNS, caption_columns, clean_captions, row_captions
from tessera.data.images import ImageError, read_file
from tessera.data.layouts.parquet import NO_CAPTION
from tessera.data.reading import HUB_PREFIX, OUTSIDE
from tessera.errors import UserError

DEFAULT_SPLIT = "train"

NO_IMAGE = "no image in this row"
NO_COLUMN = "no column of images: expected one of the type datasets.Image"

_ROWS_AT_ONCE = 64


class _Spec(NamedTuple):
    name: str
    """of a data set on the hub, or an absolute path"""
    split: str
    """empty where none was asked for"""

    def __str__(self) -> str:
        return f"{self.name}:{self.split}" if self.split else self.name


class _Opened(NamedTuple):
    rows: Any
    """one split, which gives Arrow tables: nothing is decoded"""
    images: Any
    """the same, of the column of images only"""
    caption_columns: list[str]
    folders: tuple[Path, ...]
    """where files may lie that rows name"""
    fingerprint: str
    """of the split as it was loaded"""
    notes: tuple[str, ...]
    """what was guessed or passed over"""


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` has written a folder, be it of one split or of several."""
    if (folder / "dataset_dict.json").is_file():
        return True
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def read_dataset(spec: str, notes: Counter[str]) -> Iterator[Candidate | Reject]:
    """Reads the captions, and of the images whether they are there.

    Args:
        spec: "NAME_OR_PATH" or "NAME_OR_PATH:SPLIT", behind "hf:" or without it. If no split is named, it is train, or
            else the first.
        notes: counts what was changed, and says what was guessed.

    Yields:
        Every row: as a candidate, whose `location.file` begins with "hf:", or as a reject. A saved data set that is
        damaged is one reject more.

    Raises:
        UserError: `datasets` is not installed, or there is no such data set or split.
    """
    parsed = _parse(spec)
    row = 0
    try:
        opened = _open(parsed)
        notes.update(opened.notes)
        for batch in _batches(opened):
            images = batch.column(opened.images.column_names[0])
            for image, values in zip(images, batch.select(opened.caption_columns).to_pylist(), strict=True):
                place = f"{parsed} row {row}"
                try:
                    _find(opened, image)
                    captions = clean_captions(row_captions(values), notes)
                    location = Location(f"{HUB_PREFIX}{parsed}", row=row)
                    yield Candidate(location, captions) if captions else Reject(place, NO_CAPTION)
                except ImageError as error:
                    yield Reject(place, str(error))
                row += 1
    except ImageError as error:
        yield Reject(str(parsed), str(error))


def read_image(spec: str, row: int) -> bytes:
    """Reads the bytes of one image file; threads may do so side by side.

    Args:
        spec: as for `read_dataset`.
        row: from 0.

    Raises:
        ImageError: the row holds no image, or the data set is damaged.
        UserError: `datasets` is not installed, or there is no such data set or split.
    """
    opened = _open(_parse(spec))
    if not 0 <= row < len(opened.images):
        raise ImageError(f"no row {row}: the data set has {len(opened.images)}")
    try:
        image = opened.images[row].column(0)[0]
    except Exception as error:
        raise _damaged(error) from error
    found = _find(opened, image)
    return found if isinstance(found, bytes) else read_file(found)


def dataset_fingerprint(spec: str) -> str:
    """What changes with the content of a data set, be it on the hub or in a folder; the data set is opened for it.

    Args:
        spec: as for `read_dataset`.

    Returns:
        The library's fingerprint of the split and its number of rows. Of a data set that is damaged or holds no images
        it is the reason, which `read_dataset` will tell.

    Raises:
        UserError: `datasets` is not installed, or there is no such data set or split.
    """
    try:
        opened = _open(_parse(spec))
    except ImageError as error:
        return str(error)
    return f"{opened.fingerprint} {len(opened.rows)}"


def _parse(spec: str) -> _Spec:
    spec = spec.removeprefix(HUB_PREFIX)
    # A path may hold a colon of its own, and so may a split: train[:100].
    colons = [place for place, letter in enumerate(spec) if letter == ":"]
    for end in (len(spec), *reversed(colons)):
        path = Path(os.path.expanduser(spec[:end]))
        if end and path.exists():
            return _Spec(str(path.resolve()), spec[end + 1 :])
    name, _, split = spec.partition(":")
    return _Spec(name, split)


def _open(spec: _Spec) -> _Opened:
    """Opens a data set, or gives the one that is open already, unless it has been written anew since."""
    times = []
    for name in ("dataset_dict.json", "state.json", "dataset_info.json"):
        try:
            times.append(os.stat(os.path.join(spec.name, name)).st_mtime_ns)
        except (OSError, ValueError):
            times.append(0)
    return _open_once(spec, tuple(times))


@lru_cache(maxsize=8)
def _open_once(spec: _Spec, times: tuple[int, ...]) -> _Opened:
    """The times are for the cache."""
    try:
        import datasets
        from huggingface_hub import constants as hub
    except ImportError as error:
        raise UserError('data sets of Hugging Face need `datasets`: pip install "tessera[hf]"') from error
    notes = []
    loaded = _load(datasets, spec)
    if isinstance(loaded, dict):  # a DatasetDict is one
        taken = spec.split or (DEFAULT_SPLIT if DEFAULT_SPLIT in loaded else next(iter(loaded), ""))
        if taken not in loaded:
            raise UserError(f"{spec.name} has no split {taken!r}: expected {', '.join(loaded) or 'one at all'}")
        notes += [f"split {name!r} of a data set passed over" for name in loaded if name != taken]
        loaded = loaded[taken]
    columns = [name for name, feature in loaded.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise ImageError(NO_COLUMN)
    notes += [f"column {name!r} of images passed over" for name in columns[1:]]
    by_rank = sorted(caption_columns(loaded.column_names), key=lambda name: CAPTION_COLUMNS.index(name.strip().lower()))
    names = [name for name in by_rank if name not in columns]
    if names:
        notes.append(f"captions taken from column {names[0]!r}")
    rows = loaded.with_format("arrow")
    folders = (Path(spec.name),) if os.path.isabs(spec.name) else ()
    # Tables lie in the first; loose files of a repository in the second, as links to what lies there as well.
    caches = (Path(cache).resolve() for cache in (datasets.config.HF_DATASETS_CACHE, hub.HF_HUB_CACHE))
    images = rows.select_columns(columns[:1])
    return _Opened(rows, images, names, (*folders, *caches), loaded._fingerprint, tuple(notes))


def _load(datasets: ModuleType, spec: _Spec) -> Any:
    """A split, or several by name."""
    if not is_saved_dataset(Path(spec.name)):
        try:
            return datasets.load_dataset(spec.name, split=spec.split or None)
        except Exception as error:  # of the hub, the network, the disk, and of every format
            raise UserError(f"cannot load data set {spec}: {_first_line(error)}") from error
    try:
        loaded = datasets.load_from_disk(spec.name)
    except Exception as error:
        raise _damaged(error) from error
    if spec.split and not isinstance(loaded, dict) and spec.split != str(loaded.split):
        raise UserError(
            f"{spec.name} has no split {spec.split!r}: it was saved as {loaded.split or 'one without name'}"
        )
    return loaded


def _batches(opened: _Opened) -> Iterator[Any]:
    columns = [*opened.images.column_names, *opened.caption_columns]
    try:
        yield from opened.rows.select_columns(columns).iter(batch_size=_ROWS_AT_ONCE)
    except Exception as error:
        raise _damaged(error) from error


def _find(opened: _Opened, image: Any) -> bytes | Path:
    """The bytes of an image as Arrow holds it, or the file that it names."""
    value = image.as_py() or {}
    if value.get("bytes") is not None:
        return value["bytes"]
    if not value.get("path"):
        raise ImageError(NO_IMAGE)
    try:
        file = Path(value["path"]).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name, a loop of links
        raise ImageError(f"cannot be read: {error}") from error
    if not any(file.is_relative_to(folder) for folder in opened.folders):
        raise ImageError(f"{OUTSIDE} of the data set: {value['path'][:100]!r}")
    return file


def _damaged(error: Exception) -> ImageError:
    return ImageError(f"damaged: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__
