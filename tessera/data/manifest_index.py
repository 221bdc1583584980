"""The index of a manifest: where each record begins and to which split it belongs, in a file that is mapped, not read.

    manifest.index  magic, size and time of manifest.jsonl, N | byte offsets [N + 1] | split keys [N] | splits [N]

It holds nothing that manifest.jsonl does not say: where it is missing or does not fit, it is made again.
"""

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tessera.atomic_write import atomic_write

# N records.

INDEX_NAME = "manifest.index"
TRAIN, VALIDATION = 0, 1
_HEADER = struct.Struct("<8sqqq")
_MAGIC = b"tessera2"


class Index(NamedTuple):
    """What must be known of a record before its line is read."""

    offsets: NDArray[np.int64]
    """[N + 1], the first byte of each line, and the end of the last"""
    keys: NDArray[np.float64]
    """[N], see `tessera.data.manifest.split_key`"""
    splits: NDArray[np.uint8]
    """[N], TRAIN or VALIDATION"""

    @classmethod
    def of(cls, offsets: Iterable[int], keys: Iterable[float], splits: Iterable[int]) -> "Index":
        """An index in memory."""
        return cls(np.fromiter(offsets, "<i8"), np.fromiter(keys, "<f8"), np.fromiter(splits, "u1"))


def write_index(index: Index, lines: Path, directory: Path) -> None:
    """Writes the index of a file of lines; it appears whole or not at all.

    Args:
        index: of these lines.
        lines: the file, which must not change any more, though it may be renamed.
        directory: receives the index.
    """
    status = lines.stat()
    with atomic_write(directory / INDEX_NAME) as temporary, temporary.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, status.st_size, status.st_mtime_ns, len(index.keys)))
        for array in index:
            file.write(np.ascontiguousarray(array).data)


def map_index(lines: Path) -> Index | None:
    """The index beside a file of lines, as a memory map; None if there is none that fits it."""
    path = lines.with_name(INDEX_NAME)
    try:
        status = lines.stat()
        with path.open("rb") as file:
            magic, size, time, count = _HEADER.unpack(file.read(_HEADER.size))
            whole = _HEADER.size + 8 * (count + 1) + 8 * count + count
            is_whole = os.fstat(file.fileno()).st_size == whole
            if (magic, size, time) != (_MAGIC, status.st_size, status.st_mtime_ns) or not is_whole:
                return None
            # A plain array: taking single numbers out of a memmap costs a new object each time.
            content = np.memmap(file, dtype=np.uint8, mode="r").view(np.ndarray)
    except (OSError, ValueError, struct.error):  # missing, empty or cut short
        return None
    start = _HEADER.size
    offsets, keys, splits = np.split(content[start:], [8 * (count + 1), 8 * (2 * count + 1)])
    return Index(offsets.view("<i8"), keys.view("<f8"), splits)
