"""Parquet files that hold the images themselves, a row for each: Hugging Face's form and img2dataset's.

    image: struct<bytes, path>, text: string       Hugging Face
    jpg: binary, caption: string                    img2dataset

Captions are strings or lists of strings in a column text, caption, captions or prompt. The least that can be read is a
row group, so images in random order are read fast where row groups are small: 100 images, as both programs write them.
"""

import os
import stat
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

from tessera.data.candidates import Candidate, Location, Reject
from tessera.data.captions import caption_columns, clean_captions, row_captions
from tessera.data.images import ImageError
from tessera.data.reading import resolve_inside
from tessera.errors import UserError

# Names of a binary column that holds images, and of the one to take where several columns do.
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "photo", "image_bytes")
MAX_ROW_GROUP_BYTES = 512 * 2**20
CACHE_BYTES = 256 * 2**20
SLOW_ROW_GROUP_BYTES = 64 * 2**20

NO_CAPTION = "no caption: expected a column text, caption, captions or prompt with a value"
NO_IMAGE = "no image bytes in this row"
NO_COLUMN = "no column of images: expected a struct with bytes, or a binary column image, jpg, png or webp"
NOTE_SEVERAL = "several columns of images in a Parquet file: the first one read"
NOTE_SLOW = (
    f"Parquet row group above {SLOW_ROW_GROUP_BYTES // 2**20} MiB: slow in random order, row_group_size=100 is better"
)

_ROWS_AT_ONCE = 64
_MAX_ROW_GROUPS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class _Table:
    """What is known of a file before its rows are read."""

    path: Path
    metadata: Any
    column: str
    """Of the images."""
    leaf: str
    """The column of their bytes as Parquet counts it: "jpg", or "image.bytes" inside of a struct."""
    starts: tuple[int, ...]
    """First row of each row group, and the number of rows."""
    sizes: tuple[int, ...]
    """Bytes of each row group before compression, as the footer says. What it says of single columns is not asked for:
    where that is damaged, pyarrow 26 ends the process."""

    def batches(self, group: int, columns: list[str]) -> Iterator[Any]:
        """A row group's rows, a few at a time.

        Raises:
            ImageError: the file is damaged from here on.
        """
        # The buffer lets pyarrow read on as rows are asked for, and not the whole row group at once. The file is opened
        # for each row group, because threads may not share pyarrow's file objects.
        with (
            _damage_as_image_error() as pyarrow,
            pyarrow.parquet.ParquetFile(self.path, metadata=self.metadata, buffer_size=2**20) as file,
        ):
            missing = self.starts[group + 1] - self.starts[group]
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
                missing -= batch.num_rows
                if missing >= 0:
                    yield batch
            if missing:
                raise ImageError("damaged: a row group of more or fewer rows than the footer says")


def has_images(path: Path) -> bool:
    """Whether a file has a column of images; one that cannot be read has none.

    Raises:
        UserError: pyarrow is not installed.
    """
    try:
        return bool(_image_columns(_read_metadata(path)))
    except ImageError:
        return False


def read_parquet(root: Path, file: str, notes: Counter[str]) -> Iterator[Candidate | Reject]:
    """Reads the captions, and of the images whether they are there.

    Args:
        root: a resolved folder.
        file: path of the Parquet file below it, with forward slashes.
        notes: counts what was changed.

    Yields:
        Every row, as a candidate or a reject. A file that cannot be read to its end is one reject more.

    Raises:
        UserError: pyarrow is not installed.
    """
    try:
        table = _describe(resolve_inside(root, file))
        if len(_image_columns(table.metadata)) > 1:
            notes[NOTE_SEVERAL] += 1
        for group in range(table.metadata.num_row_groups):
            yield from _read_row_group(table, group, file, notes)
    except ImageError as error:
        yield Reject(file, str(error))


def read_image(path: Path, row: int) -> bytes:
    """Reads the bytes of one image file; threads may do so side by side.

    The row groups that were read last are kept, up to 256 MiB of them.

    Args:
        path: the Parquet file.
        row: from 0.

    Raises:
        ImageError: the file or its row group cannot be read, or the row holds no image.
        UserError: pyarrow is not installed.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    table = _describe_once(os.fspath(path), identity)
    if not 0 <= row < table.starts[-1]:
        raise ImageError(f"no row {row}: the file has {table.starts[-1]}")
    group = bisect_right(table.starts, row) - 1
    images = _row_groups_of(os.getpid()).images(identity, table, group)
    image = images[row - table.starts[group]].as_py()
    if image is None:
        raise ImageError(NO_IMAGE)
    return image


class _Entry:
    """The images of a row group, or why there are none, once that is known."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.images: Any = None
        self.error: ImageError | None = None
        self.num_bytes = 0  # as counted in the cache

    def read(self, table: _Table, group: int) -> None:
        try:
            self.images = _read_images(table, group)
        except ImageError as error:
            # Kept as well: a row group that is damaged at its end is not to be read for each of its rows.
            self.error = error


class _RowGroups:
    """The images of the row groups that were asked for last; each is read once, however many threads ask for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[int, ...], _Entry] = OrderedDict()
        self._num_bytes = 0

    def images(self, identity: tuple[int, ...], table: _Table, group: int) -> Any:
        key = (*identity, group)
        with self._lock:
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
        with entry.lock:
            if entry.images is None and entry.error is None:
                entry.read(table, group)
                self._make_room(key, entry)
        if entry.error is not None:
            raise ImageError(str(entry.error))
        return entry.images

    def _make_room(self, key: tuple[int, ...], entry: _Entry) -> None:
        with self._lock:
            # Others may have driven it out while it was read.
            if entry.images is not None and self._entries.get(key) is entry:
                entry.num_bytes = entry.images.nbytes
                self._num_bytes += entry.num_bytes
            while len(self._entries) > 1 and (self._num_bytes > CACHE_BYTES or len(self._entries) > _MAX_ROW_GROUPS):
                self._num_bytes -= self._entries.popitem(last=False)[1].num_bytes


@lru_cache(maxsize=1)
def _row_groups_of(process: int) -> _RowGroups:
    """A process that was forked begins anew: a thread of its parent may have held a lock."""
    return _RowGroups()


@lru_cache(maxsize=64)
def _describe_once(path: str, identity: tuple[int, ...]) -> _Table:
    """The identity is for the cache: a file that has been replaced is described again."""
    return _describe(Path(path))


def _describe(path: Path) -> _Table:
    metadata = _read_metadata(path)
    columns = _image_columns(metadata)
    if not columns:
        raise ImageError(NO_COLUMN)
    column, leaf = next(iter(columns.items()))
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    if any(group.num_rows < 0 for group in groups):
        raise ImageError("damaged: a row group of fewer than no rows")
    return _Table(
        path=path,
        metadata=metadata,
        column=column,
        leaf=leaf,
        starts=tuple(accumulate((group.num_rows for group in groups), initial=0)),
        sizes=tuple(group.total_byte_size for group in groups),
    )


def _read_metadata(path: Path) -> Any:
    with _damage_as_image_error() as pyarrow:
        # pyarrow would wait at a pipe for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ImageError("not a regular file")
        return pyarrow.parquet.read_metadata(path)


def _image_columns(metadata: Any) -> dict[str, str]:
    """Columns of images, the likeliest first, each with the name under which Parquet keeps its bytes."""
    with _damage_as_image_error() as pyarrow:
        found = {}
        for field in metadata.schema.to_arrow_schema():
            if pyarrow.types.is_struct(field.type):
                if any(child.name == "bytes" and _is_binary(pyarrow, child.type) for child in field.type):
                    found[field.name] = f"{field.name}.bytes"
            elif _is_binary(pyarrow, field.type) and field.name.lower() in IMAGE_COLUMNS:
                found[field.name] = field.name
    ranks = {name: rank for rank, name in enumerate(IMAGE_COLUMNS)}
    return dict(sorted(found.items(), key=lambda item: ranks.get(item[0].lower(), len(ranks))))


def _is_binary(pyarrow: ModuleType, kind: Any) -> bool:
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _read_row_group(table: _Table, group: int, file: str, notes: Counter[str]) -> Iterator[Candidate | Reject]:
    too_large = _too_large(table.sizes[group])
    if too_large is None and table.sizes[group] > SLOW_ROW_GROUP_BYTES:
        notes[NOTE_SLOW] += 1
    names = caption_columns(table.metadata.schema.to_arrow_schema().names)
    row = table.starts[group]
    for batch in table.batches(group, names if too_large else [*names, table.column]):
        missing = {} if too_large else _missing_images(batch, table.column)
        for number, values in enumerate(_values(batch.select(names))):
            location = Location(file, row=row)
            row += 1
            reason = too_large or missing.get(number)
            captions: tuple[str, ...] = ()
            if isinstance(values, str):
                reason = reason or values
            elif reason is None:
                captions = clean_captions(row_captions(values), notes)
            yield Candidate(location, captions) if captions else Reject(location.name, reason or NO_CAPTION)


def _values(captions: Any) -> list[dict[str, Any] | str]:
    """The rows of a batch, or what is wrong with a row."""
    try:
        return captions.to_pylist()
    except UnicodeDecodeError:
        if captions.num_rows == 1:
            return ["damaged: a caption that is not UTF-8"]
        return [value for number in range(captions.num_rows) for value in _values(captions.slice(number, 1))]


def _missing_images(batch: Any, column: str) -> dict[int, str]:
    """Why rows of a batch have no image, by their number."""
    missing = {}
    for number, value in enumerate(batch.column(column)):
        if not value.is_valid:
            missing[number] = NO_IMAGE
        elif hasattr(value, "keys") and not value["bytes"].is_valid:
            path = value["path"].as_py() if "path" in value else None
            missing[number] = f"{NO_IMAGE}: only the path {path[:100]!r}" if isinstance(path, str) else NO_IMAGE
    return missing


def _read_images(table: _Table, group: int) -> Any:
    """The bytes of all images of a row group, as an array that knows which are missing."""
    _check_size(table.sizes[group])
    with _damage_as_image_error() as pyarrow:
        pieces = []
        num_bytes = 0
        for batch in table.batches(group, [table.leaf]):
            column = batch.column(0)
            is_struct = pyarrow.types.is_struct(column.type)
            pieces.append(pyarrow.compute.struct_field(column, "bytes") if is_struct else column)
            num_bytes += pieces[-1].nbytes
            _check_size(num_bytes)  # the footer may be wrong about what comes out of compressed pages
        return pyarrow.chunked_array(pieces)


def _check_size(num_bytes: int) -> None:
    if reason := _too_large(num_bytes):
        raise ImageError(reason)


def _too_large(num_bytes: int) -> str | None:
    """Why a row group cannot be read into memory; a single image is therefore never too large."""
    if num_bytes <= MAX_ROW_GROUP_BYTES:
        return None
    return (
        f"row group too large: {num_bytes / 2**20:.0f} MiB, at most {MAX_ROW_GROUP_BYTES // 2**20}; "
        "write the file with row_group_size=100"
    )


@contextmanager
def _damage_as_image_error() -> Iterator[ModuleType]:
    """Gives pyarrow, whose exceptions over a damaged file are of many kinds."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise UserError('Parquet files need pyarrow: pip install "tessera[parquet]"') from error
    try:
        yield pyarrow
    except ImageError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise ImageError(f"cannot be read: {error.strerror}") from error
        raise ImageError(f"damaged: {' '.join(str(error).split())[:100]}") from error
