"""Token shards: what is written is read, an interrupted writer is continued, damage is named."""

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tessera.data.shards import ShardIndex, ShardWriter, TokenShards, batches
from tessera.errors import UserError

INDEX = ShardIndex(
    num_samples=5,
    grid_height=2,
    grid_width=3,
    codebook_size=60_000,
    codebook_levels=(300, 200),
    image_height=16,
    image_width=24,
    crops=2,
    crop_scale=0.8,
    corpus_name="test",
    corpus_fingerprint="c",
    dvae_sha256="d",
    tokenizer_sha256="t",
    text_len=8,
)
CODES = np.arange(60).reshape(5, 2, 2, 3) * 999
CAPTIONS = [("a star",), ("", "two rings"), ("ein Bär",), ("",), ("星",)]
FILES = ("codes.u16", "captions.utf8", "offsets.i64")


def write(directory: Path, *, index: ShardIndex = INDEX, stop_before: int = 5) -> int:
    """Writes sample by sample until `stop_before`, and returns with which sample it began."""
    with ShardWriter(directory, index) as writer:
        first = writer.complete
        for number in range(first, 5):
            if number == stop_before:
                raise KeyboardInterrupt
            writer.append(CODES[number : number + 1], CAPTIONS[number : number + 1])
    return first


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "new", INDEX) as writer:
        writer.append(CODES[:2], CAPTIONS[:2])
        writer.append(CODES[2:], CAPTIONS[2:])
    shards = TokenShards(tmp_path / "new")
    assert shards.index == INDEX
    assert shards.codes.shape == (5, 2, 6) and np.array_equal(shards.codes.reshape(CODES.shape), CODES)
    assert [shards.captions(i) for i in range(len(shards))] == CAPTIONS
    assert set(content(tmp_path / "new")) == {"index.json", *FILES}


def test_other_processes_map_the_files_themselves(tmp_path: Path) -> None:
    many = 500
    with ShardWriter(tmp_path, replace(INDEX, num_samples=many)) as writer:
        for _ in range(many // 5):
            writer.append(CODES, CAPTIONS)
    sent = pickle.dumps(TokenShards(tmp_path))
    assert len(sent) < 1000 < many * INDEX.bytes_per_sample
    received = pickle.loads(sent)
    assert np.array_equal(received.codes[-5:].reshape(CODES.shape), CODES) and received.captions(many - 1) == ("星",)


def test_nothing_but_blank_captions_is_legal(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, replace(INDEX, num_samples=1)) as writer:
        writer.append(CODES[:1], [("",)])
    assert TokenShards(tmp_path).captions(0) == ("",)


@pytest.mark.parametrize("stop", range(6))
def test_an_interrupted_writer_is_continued_to_the_same_bytes(stop: int, tmp_path: Path) -> None:
    write(tmp_path / "whole")
    if stop < 5:
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "parts", stop_before=stop)
        with pytest.raises(UserError, match="unfinished token shards: run the same `tessera encode` once more"):
            TokenShards(tmp_path / "parts")
    assert write(tmp_path / "parts") == stop % 5
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_a_killed_writer_is_continued_from_its_last_journal(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    with ShardWriter(tmp_path / "live", INDEX, save_every_seconds=3600) as writer:
        writer.append(CODES[:2], CAPTIONS[:2])
        writer.save()
        writer.append(CODES[2:], CAPTIONS[2:])
        shutil.copytree(tmp_path / "live", tmp_path / "killed")
    for name in FILES:  # samples that the journal does not count may have reached the disk in part
        with (tmp_path / "killed" / name).open("ab") as file:
            file.write(b"torn" * 100)
    assert write(tmp_path / "killed") == 2
    assert content(tmp_path / "killed") == content(tmp_path / "whole") == content(tmp_path / "live")


def test_every_few_seconds_there_is_a_journal(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, INDEX, save_every_seconds=0) as writer:
        writer.append(CODES[:3], CAPTIONS[:3])
        assert json.loads((tmp_path / "journal.json").read_text())["complete"] == 3
        writer.append(CODES[3:], CAPTIONS[3:])


@pytest.mark.parametrize("name", [*FILES, "journal.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "replaced"])
def test_what_an_interrupted_writer_left_is_not_trusted_when_damaged(name: str, damage: str, tmp_path: Path) -> None:
    write(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "parts", stop_before=3)
    path = tmp_path / "parts" / name
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.write_bytes(b"[]")
    assert write(tmp_path / "parts") == 0
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_other_shards_are_not_continued_but_replaced(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, stop_before=3)
    other = replace(INDEX, dvae_sha256="another")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, index=other, stop_before=2)
    assert write(tmp_path, index=other) == 2
    mapped = TokenShards(tmp_path).codes
    before = mapped.copy()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, stop_before=1)
    with pytest.raises(UserError, match="unfinished"):
        TokenShards(tmp_path)
    assert (mapped == before).all(), "who reads the old shards keeps them"


@pytest.mark.skipif(os.name != "posix", reason="folders are locked on POSIX systems only")
def test_a_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, INDEX) as writer:
        writer.append(CODES[:4], CAPTIONS[:4])
        with pytest.raises(UserError, match="another process is encoding into"), ShardWriter(tmp_path, INDEX):
            pass
        writer.append(CODES[4:], CAPTIONS[4:])
    assert np.array_equal(TokenShards(tmp_path).codes.reshape(CODES.shape), CODES)


def test_wrong_batches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected 5 samples, got 2"), ShardWriter(tmp_path, INDEX) as writer:
        with pytest.raises(ValueError, match=r"expected codes \[2, 2, 2, 3\] for 2 captions, got \[2, 2, 6\]"):
            writer.append(CODES[:2].reshape(2, 2, 6), CAPTIONS[:2])
        with pytest.raises(ValueError, match=r"expected codes \[1, 2, 2, 3\] for 1 captions, got \[2, 2, 2, 3\]"):
            writer.append(CODES[:2], CAPTIONS[:1])
        for wrong, got in ((-1, "-1 to 10989"), (60_000, "0 to 60000")):
            with pytest.raises(ValueError, match=rf"expected codes in \[0, 60000\), got {got}"):
                writer.append(np.where(CODES[:1] == 999, wrong, CODES[:1]), CAPTIONS[:1])
        writer.append(CODES[:2], CAPTIONS[:2])
        with pytest.raises(ValueError, match="expected 5 samples, got 7"):
            writer.append(CODES, CAPTIONS)


def test_truncated_codes_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "codes.u16"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"codes.u16 has 118 bytes where the index says 120: encode again"):
        TokenShards(tmp_path)


def test_missing_shards_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make them with `tessera encode`"):
        TokenShards(tmp_path)


def test_shards_of_an_earlier_format_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "index.json"
    path.write_text(path.read_text().replace('"format_version": 3', '"format_version": 2'))
    with pytest.raises(UserError, match="format version 2; this version reads 3: encode again"):
        TokenShards(tmp_path)


def test_a_codebook_beyond_16_bits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most 65536; got 65537"):
        ShardWriter(tmp_path, replace(INDEX, codebook_size=65_537))


def test_batches_cover_everything_once() -> None:
    assert [list(batch) for batch in batches(5, 2)] == [[0, 1], [2, 3], [4]]
