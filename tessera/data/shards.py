"""Token shards: what the prior trains on. Codes as a uint16 memory map, captions as UTF-8, an index with the hashes.

    shards/  index.json  codes.u16 [N, V, h * w]  captions.utf8  offsets.i64 [N + 1]

V counts the views of a picture (see `tessera.data.views`). Captions are kept as text and tokenized in training, because
BPE dropout splits them differently every time. While shards are being written, journal.json stands in for index.json.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from tessera.atomic_write import atomic_write
from tessera.errors import UserError
from tessera.folder_lock import locked

# N samples, V views of each, h w code grid.

FORMAT_VERSION = 3
MAX_CODEBOOK_SIZE = 2**16
_CAPTION_SEPARATOR = "\n"  # captions are one line each
_INDEX, _JOURNAL = "index.json", "journal.json"
_CODES, _CAPTIONS, _OFFSETS = "codes.u16", "captions.utf8", "offsets.i64"
_OFFSET_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What the shards hold and what they were made with: equal indexes, equal shards."""

    format_version: int = FORMAT_VERSION
    num_samples: int
    grid_height: int
    grid_width: int
    codebook_size: int
    codebook_levels: tuple[int, ...] = ()
    image_height: int
    image_width: int
    crops: int = 1
    """V, views of each sample: the picture as it is, then crops of it"""
    crop_scale: float = 1.0
    flip: bool = False
    crop_seed: int = 0
    corpus_name: str
    corpus_fingerprint: str
    dvae_sha256: str
    tokenizer_sha256: str
    text_len: int

    @property
    def bytes_per_sample(self) -> int:
        """What the codes of one sample take on the disk."""
        return self.crops * self.grid_height * self.grid_width * 2


class TokenShards:
    """Reads what a `ShardWriter` wrote.

    Args:
        directory: the folder.

    Raises:
        UserError: if files are missing, of another format version, or of the wrong size.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / _INDEX
        if not path.exists():
            if (directory / _JOURNAL).exists():
                raise UserError(f"{directory} holds unfinished token shards: run the same `tessera encode` once more")
            raise UserError(f"{directory} holds no token shards: make them with `tessera encode`")
        fields = json.loads(path.read_text())
        if fields.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {fields.get('format_version')}; this version reads {FORMAT_VERSION}: "
                f"encode again with `tessera encode`"
            )
        levels = tuple(fields.pop("codebook_levels", ()))
        self.index = ShardIndex(**fields, codebook_levels=levels)
        expected = self.index.num_samples * self.index.bytes_per_sample
        codes_path = directory / _CODES
        actual = codes_path.stat().st_size if codes_path.exists() else 0
        if actual != expected:
            raise UserError(f"{codes_path} has {actual} bytes where the index says {expected}: encode again")
        shape = (self.index.num_samples, self.index.crops, self.index.grid_height * self.index.grid_width)
        self.codes: NDArray[np.uint16] = np.memmap(codes_path, dtype="<u2", mode="r", shape=shape)
        """[N, V, h * w]; view 0 is the picture as it is"""
        for name in (_OFFSETS, _CAPTIONS):
            if not (directory / name).exists():
                raise UserError(f"{directory / name} is missing: encode again with `tessera encode`")
        self._offsets = np.fromfile(directory / _OFFSETS, dtype="<i8")
        # Still mapped, but a slice of a memmap takes several times as long as one of an array.
        self._captions = np.asarray(np.memmap(directory / _CAPTIONS, dtype=np.uint8, mode="r"))
        if len(self._offsets) != self.index.num_samples + 1 or self._offsets[-1] > len(self._captions):
            raise UserError(f"the captions in {directory} are truncated: encode again with `tessera encode`")

    def __len__(self) -> int:
        return self.index.num_samples

    def __reduce__(self) -> tuple[Any, ...]:
        # Loader processes map the files again; what is mapped would be sent to each of them.
        return TokenShards, (self.directory,)

    def captions(self, index: int) -> tuple[str, ...]:
        """All captions of one sample."""
        start, end = self._offsets[index], self._offsets[index + 1]
        return tuple(self._captions[start:end].tobytes().decode().split(_CAPTION_SEPARATOR))


class _Sizes(NamedTuple):
    """Bytes of the files that belong to complete samples."""

    codes: int
    captions: int
    offsets: int


class ShardWriter:
    """Writes token shards batch by batch, and goes on where an interrupted writer of the same shards has stopped.

    The journal says how many samples have reached the disk whole. It is written every few seconds and when the block is
    left by an error or by Ctrl-C; what lies behind them in the files is cut off by the next writer. Shards of another
    index that lie in the folder are replaced.

    Args:
        directory: made if absent.
        index: what the index file will say.
        save_every_seconds: time between two journals, which is what a killed process can lose.

    Raises:
        UserError: if the codebook does not fit 16 bits; on entering, if another process writes to the folder.

    Example:
        with ShardWriter(Path("runs/shards"), index) as writer:
            for start in range(writer.complete, index.num_samples, 128):
                writer.append(codes[start : start + 128], captions[start : start + 128])
    """

    def __init__(self, directory: Path, index: ShardIndex, *, save_every_seconds: float = 5.0) -> None:
        if index.codebook_size > MAX_CODEBOOK_SIZE:
            raise UserError(f"token shards hold codebooks of at most {MAX_CODEBOOK_SIZE}; got {index.codebook_size}")
        self.directory, self.index, self.save_every_seconds = directory, index, save_every_seconds
        self.complete = 0
        """samples that are written; the next batch begins with this one"""
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as resources:
            try:
                resources.enter_context(locked(self.directory, wait=False))
            except BlockingIOError as error:
                raise UserError(
                    f"another process is encoding into {self.directory}: wait for it, or choose another folder"
                ) from error
            self.complete, sizes = self._recover()
            (self.directory / _INDEX).unlink(missing_ok=True)
            if not self.complete:
                (self.directory / _JOURNAL).unlink(missing_ok=True)
            self._codes = resources.enter_context(self._open(_CODES, sizes.codes))
            self._captions = resources.enter_context(self._open(_CAPTIONS, sizes.captions))
            self._offsets = resources.enter_context(self._open(_OFFSETS, sizes.offsets))
            if not self.complete:
                self._offsets.write(bytes(_OFFSET_BYTES))
            self._end = sizes.captions
            self._resources = resources.pop_all()
        self._saved_at = time.monotonic()
        return self

    def append(self, codes: NDArray[np.integer], captions: Sequence[tuple[str, ...]]) -> None:
        """Writes the next n samples.

        Args:
            codes: [n, V, h, w], each in [0, codebook size).
            captions: one tuple per sample.

        Raises:
            ValueError: for another shape, codes out of range, or more samples than the index says.
        """
        index = self.index
        expected = (len(captions), index.crops, index.grid_height, index.grid_width)
        if codes.shape != expected:
            raise ValueError(f"expected codes {list(expected)} for {len(captions)} captions, got {list(codes.shape)}")
        if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < index.codebook_size:
            raise ValueError(
                f"expected codes in [0, {index.codebook_size}), got {int(codes.min())} to {int(codes.max())}"
            )
        if self.complete + len(codes) > index.num_samples:
            raise ValueError(f"expected {index.num_samples} samples, got {self.complete + len(codes)}")
        lines = [_CAPTION_SEPARATOR.join(texts).encode() for texts in captions]
        ends = self._end + np.cumsum([len(line) for line in lines], dtype="<i8")
        self._codes.write(codes.astype("<u2").tobytes())
        self._captions.write(b"".join(lines))
        self._offsets.write(ends.tobytes())
        self._end = int(ends[-1]) if len(ends) else self._end
        self.complete += len(codes)
        if time.monotonic() - self._saved_at >= self.save_every_seconds:
            self.save()

    def save(self) -> None:
        """Makes sure that what was written outlives the process and the machine."""
        for file in (self._codes, self._captions, self._offsets):
            file.flush()
            os.fsync(file.fileno())
        with atomic_write(self.directory / _JOURNAL) as temporary:
            temporary.write_text(json.dumps({"complete": self.complete, "index": asdict(self.index)}, indent=1))
        self._saved_at = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._resources:
            if kind is None and self.complete == self.index.num_samples and not self._end:
                self._captions.write(b"\n")  # an empty file cannot be mapped
            self.save()
            if kind is not None:
                return
            if self.complete != self.index.num_samples:
                raise ValueError(f"expected {self.index.num_samples} samples, got {self.complete}")
            with atomic_write(self.directory / _INDEX) as temporary:
                temporary.write_text(json.dumps(asdict(self.index), indent=1))
            (self.directory / _JOURNAL).unlink()

    def _recover(self) -> tuple[int, _Sizes]:
        """Samples that an earlier writer of these shards completed, and their bytes; none if anything is in doubt."""
        nothing = 0, _Sizes(0, 0, 0)
        try:
            journal = json.loads((self.directory / _JOURNAL).read_text())
            if journal["index"] != _plain(self.index):
                return nothing
            complete = int(journal["complete"])
            if not 0 < complete <= self.index.num_samples:
                return nothing
            offsets_bytes = (complete + 1) * _OFFSET_BYTES
            offsets = (self.directory / _OFFSETS).read_bytes()[:offsets_bytes]
            sizes = _Sizes(
                complete * self.index.bytes_per_sample,
                int(np.frombuffer(offsets[-_OFFSET_BYTES:], dtype="<i8")[0]),
                offsets_bytes,
            )
            actual = _Sizes(*((self.directory / name).stat().st_size for name in (_CODES, _CAPTIONS, _OFFSETS)))
        except (OSError, ValueError, KeyError, IndexError, TypeError):  # missing or damaged
            return nothing
        is_there = all(0 <= size <= found for size, found in zip(sizes, actual, strict=True))
        return (complete, sizes) if is_there else nothing

    def _open(self, name: str, size: int) -> BinaryIO:
        path = self.directory / name
        if not size:
            path.unlink(missing_ok=True)  # a new file, for a reader may have mapped the old one
        file = path.open("r+b" if size else "w+b")
        file.truncate(size)
        file.seek(size)
        return file


def batches(count: int, size: int) -> Iterator[range]:
    """Consecutive ranges of at most `size` that cover 0 .. count - 1."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def _plain(index: ShardIndex) -> Any:
    """The index as it is read back from JSON."""
    return json.loads(json.dumps(asdict(index)))
