"""Token shards: what is written is read, damage is named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tessera.data.shards import ShardIndex, TokenShards, batches, write_shards
from tessera.errors import UserError

INDEX = ShardIndex(
    num_samples=5,
    grid_height=2,
    grid_width=3,
    codebook_size=60_000,
    image_height=16,
    image_width=24,
    corpus_name="test",
    corpus_fingerprint="c",
    dvae_sha256="d",
    tokenizer_sha256="t",
    text_len=8,
)
CODES = np.arange(30).reshape(5, 2, 3) * 1999
CAPTIONS = [("a star",), ("", "two rings"), ("ein Bär",), ("",), ("星",)]


def write(directory: Path) -> None:
    write_shards(directory, codes=[CODES[:2], CODES[2:]], captions=CAPTIONS, index=INDEX)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    shards = TokenShards(tmp_path)
    assert shards.index == INDEX
    assert np.array_equal(shards.codes.reshape(5, 2, 3), CODES)
    assert [shards.captions(i) for i in range(len(shards))] == CAPTIONS


def test_nothing_but_blank_captions_is_legal(tmp_path: Path) -> None:
    index = replace(INDEX, num_samples=1)
    write_shards(tmp_path, codes=[CODES[:1]], captions=[("",)], index=index)
    assert TokenShards(tmp_path).captions(0) == ("",)


def test_truncated_codes_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "codes.u16"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"codes.u16 has 58 bytes where the index says 60: encode again"):
        TokenShards(tmp_path)


def test_missing_shards_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make them with `tessera encode`"):
        TokenShards(tmp_path)


def test_a_codebook_beyond_16_bits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most 65536; got 65537"):
        write_shards(tmp_path, codes=[], captions=[], index=replace(INDEX, codebook_size=65_537))


def test_batches_cover_everything_once() -> None:
    assert [list(batch) for batch in batches(5, 2)] == [[0, 1], [2, 3], [4]]
