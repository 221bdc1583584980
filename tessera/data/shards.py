"""Token shards: what the prior trains on. Codes as a uint16 memory map, captions as UTF-8, an index with the hashes.

    shards/  index.json  codes.u16 [N, h * w]  captions.utf8  offsets.i64 [N + 1]

Captions are kept as text and tokenized in training, because BPE dropout splits them differently every time.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tessera.atomic_write import atomic_write
from tessera.errors import UserError

FORMAT_VERSION = 2
MAX_CODEBOOK_SIZE = 2**16
_CAPTION_SEPARATOR = "\n"  # captions are one line each


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What the shards hold and what they were made with."""

    format_version: int = FORMAT_VERSION
    num_samples: int
    grid_height: int
    grid_width: int
    codebook_size: int
    codebook_levels: tuple[int, ...] = ()
    image_height: int
    image_width: int
    corpus_name: str
    corpus_fingerprint: str
    dvae_sha256: str
    tokenizer_sha256: str
    text_len: int


class TokenShards:
    """Reads what `write_shards` wrote.

    Args:
        directory: the folder.

    Raises:
        UserError: if files are missing, of another format version, or of the wrong size.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / "index.json"
        if not path.exists():
            raise UserError(f"{directory} holds no token shards: make them with `tessera encode`")
        fields = json.loads(path.read_text())
        if fields.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {fields.get('format_version')}; this version reads {FORMAT_VERSION}: "
                f"encode again with `tessera encode`"
            )
        levels = tuple(fields.pop("codebook_levels", ()))
        self.index = ShardIndex(**fields, codebook_levels=levels)
        tokens = self.index.grid_height * self.index.grid_width
        expected = self.index.num_samples * tokens * 2
        codes_path = directory / "codes.u16"
        actual = codes_path.stat().st_size if codes_path.exists() else 0
        if actual != expected:
            raise UserError(f"{codes_path} has {actual} bytes where the index says {expected}: encode again")
        self.codes: NDArray[np.uint16] = np.memmap(
            codes_path, dtype="<u2", mode="r", shape=(self.index.num_samples, tokens)
        )
        for name in ("offsets.i64", "captions.utf8"):
            if not (directory / name).exists():
                raise UserError(f"{directory / name} is missing: encode again with `tessera encode`")
        self._offsets = np.fromfile(directory / "offsets.i64", dtype="<i8")
        self._captions = np.memmap(directory / "captions.utf8", dtype=np.uint8, mode="r")
        if len(self._offsets) != self.index.num_samples + 1 or self._offsets[-1] > len(self._captions):
            raise UserError(f"the captions in {directory} are truncated: encode again with `tessera encode`")

    def __len__(self) -> int:
        return self.index.num_samples

    def captions(self, index: int) -> tuple[str, ...]:
        """All captions of one sample."""
        start, end = self._offsets[index], self._offsets[index + 1]
        return tuple(self._captions[start:end].tobytes().decode().split(_CAPTION_SEPARATOR))


def write_shards(
    directory: Path, *, codes: Iterable[NDArray[np.int64]], captions: Iterable[tuple[str, ...]], index: ShardIndex
) -> None:
    """Writes token shards; the index comes last, so that an interrupted write is not mistaken for a whole one.

    Args:
        directory: made if absent.
        codes: batches of int64 [n, h, w] or [n, h * w], in the order of the samples.
        captions: one tuple per sample.
        index: what the index file will say.

    Raises:
        UserError: if the codebook does not fit 16 bits.
    """
    if index.codebook_size > MAX_CODEBOOK_SIZE:
        raise UserError(f"token shards hold codebooks of at most {MAX_CODEBOOK_SIZE}; got {index.codebook_size}")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "index.json").unlink(missing_ok=True)
    with atomic_write(directory / "codes.u16") as temporary, temporary.open("wb") as file:
        for batch in codes:
            file.write(batch.astype("<u2").tobytes())
    lines = [_CAPTION_SEPARATOR.join(texts).encode() for texts in captions]
    offsets = np.concatenate([[0], np.cumsum([len(line) for line in lines])]).astype("<i8")
    with atomic_write(directory / "captions.utf8") as temporary:
        # an empty file cannot be mapped
        temporary.write_bytes(b"".join(lines) or b"\n")
    with atomic_write(directory / "offsets.i64") as temporary:
        temporary.write_bytes(offsets.tobytes())
    with atomic_write(directory / "index.json") as temporary:
        temporary.write_text(json.dumps(asdict(index), indent=1))


def batches(count: int, size: int) -> Iterator[range]:
    """Consecutive ranges of at most `size` that cover 0 .. count - 1."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
