"""Checkpoints survive kills and full disks, and every kind of damage is found."""

import errno
import hashlib
import io
import itertools
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.training import checkpoint as module
from tessera.training.checkpoint import (
    FORMAT_KEY,
    AtomicCheckpointIO,
    CheckpointError,
    checkpoint_path,
    checkpoints,
    damage,
    newest_valid,
)


def state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    weights = {"weight": torch.randn(40, 50, generator=generator)}
    return {"state_dict": weights, "global_step": step, "callbacks": {"clock": {"seconds": step / 3}}}


def save(directory: Path, step: int, *, seed: int | None = None) -> Path:
    path = checkpoint_path(directory, step)
    AtomicCheckpointIO().save_checkpoint(state(step if seed is None else seed), path)
    return path


def assert_holds(path: Path | None, step: int) -> None:
    assert path is not None
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    expected = state(step)
    assert loaded["global_step"] == step
    assert all(torch.equal(loaded["state_dict"][key], expected["state_dict"][key]) for key in expected["state_dict"])


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    save(tmp_path, 100)
    assert names(tmp_path) == ["step-000000100.ckpt", "step-000000100.ckpt.sha256"]
    valid, damaged = newest_valid(tmp_path)
    assert_holds(valid, 100)
    assert damaged == []


def test_the_hash_is_that_of_the_file_as_sha256sum_reads_it(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (tmp_path / f"{path.name}.sha256").read_text().splitlines()[-1] == f"{sha256}  {path.name}"
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", f"{path.name}.sha256"], cwd=tmp_path, check=True)


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "absent") == (None, [])
    (tmp_path / "step-1.ckpt").touch()
    assert newest_valid(tmp_path) == (None, [])


def test_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000000003.ckpt", "step-000000004.ckpt"]
    assert len(names(tmp_path)) == 4, "with their hashes, and nothing else"


def test_damaged_ones_do_not_count_among_the_two_that_are_kept(tmp_path: Path) -> None:
    for step in (100, 200):
        save(tmp_path, step)
    cut(checkpoint_path(tmp_path, 200), 50)
    save(tmp_path, 150)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000000100.ckpt", "step-000000150.ckpt"]


def test_an_old_one_that_cannot_be_removed_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(io: AtomicCheckpointIO, path: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(AtomicCheckpointIO, "remove_checkpoint", busy)
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert len(checkpoints(tmp_path)) == 3
    assert "could not be removed" in caplog.text


def test_a_file_without_a_hash_is_neither_used_nor_removed(tmp_path: Path) -> None:
    foreign = checkpoint_path(tmp_path, 7)
    torch.save(state(7), foreign)
    assert newest_valid(tmp_path) == (None, [(foreign, "no sha256 is stored beside it")])
    for step in (8, 9, 10):
        save(tmp_path, step)
    assert foreign.exists()


def test_a_file_is_hashed_once_whoever_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    valid, _ = newest_valid(tmp_path)
    hashed: list[str] = []
    monkeypatch.setattr(module, "damage", lambda path: hashed.append(path.name))
    io = AtomicCheckpointIO(known_whole=valid)
    assert valid is not None
    io.load_checkpoint(valid)
    for step in (3, 4, 5):
        io.save_checkpoint(state(step), checkpoint_path(tmp_path, step))
    assert hashed == []
    AtomicCheckpointIO().load_checkpoint(checkpoint_path(tmp_path, 5))
    assert hashed == ["step-000000005.ckpt"]


def test_a_newer_format_is_refused_by_name_and_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(module, "FORMAT_VERSION", 2)
    newer = save(tmp_path, 2)
    monkeypatch.undo()
    for load in (newest_valid, lambda directory: AtomicCheckpointIO().load_checkpoint(newer)):
        with pytest.raises(
            CheckpointError, match=r"step-000000002\.ckpt is a checkpoint of format 2, .* reads format 1"
        ):
            load(tmp_path)


def test_what_is_saved_says_its_format_and_the_callers_dictionary_is_left_alone(tmp_path: Path) -> None:
    content = state(1)
    AtomicCheckpointIO().save_checkpoint(content, checkpoint_path(tmp_path, 1))
    assert FORMAT_KEY not in content
    assert torch.load(checkpoint_path(tmp_path, 1), weights_only=True)[FORMAT_KEY] == 1


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'sprung'}",)

    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "trap": Trap()}, checkpoint_path(tmp_path, 1))
    with pytest.raises(Exception, match="Weights only load failed"):
        AtomicCheckpointIO().load_checkpoint(checkpoint_path(tmp_path, 1))
    assert not (tmp_path / "sprung").exists()


def cut(path: Path, num_bytes: int) -> None:
    with path.open("rb+") as file:
        file.truncate(num_bytes)


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def append(path: Path, extra: bytes) -> None:
    with path.open("ab") as file:
        file.write(extra)


def zero(path: Path, start: int, length: int) -> None:
    data = bytearray(path.read_bytes())
    data[start : start + length] = bytes(len(data[start : start + length]))
    path.write_bytes(data)


def damages(num_bytes: int) -> Iterator[Callable[[Path], None]]:
    chance = random.Random(0)
    for position in (0, 1, num_bytes // 2, num_bytes - 1, *(chance.randrange(num_bytes) for _ in range(30))):
        yield lambda path, position=position: cut(path, position)
    for part in range(60):  # one bit in every sixtieth of the file
        position = part * num_bytes // 60 + chance.randrange(num_bytes // 60)
        yield lambda path, position=position: flip(path, position, chance.randrange(8))
    for start in (0, num_bytes // 3, num_bytes - 64):
        yield lambda path, start=start: zero(path, start, 64)
    for extra in (b"\0", b"PK\5\6", bytes(512)):
        yield lambda path, extra=extra: append(path, extra)


def test_every_damage_is_found_and_the_older_checkpoint_used(tmp_path: Path) -> None:
    older, newer = save(tmp_path, 100), save(tmp_path, 200)
    whole = newer.read_bytes()
    found = 0
    for number, harm in enumerate(damages(len(whole))):
        harm(newer)
        if newer.read_bytes() == whole:
            continue  # zeros were there before
        valid, damaged = newest_valid(tmp_path)
        assert valid == older, f"damage {number}"
        assert [path for path, _ in damaged] == [newer]
        with pytest.raises(CheckpointError, match=r"step-000000200\.ckpt is damaged"):
            AtomicCheckpointIO().load_checkpoint(newer)
        newer.write_bytes(whole)
        found += 1
    assert found >= 95
    assert newest_valid(tmp_path) == (newer, [])


def test_the_reason_is_told(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    num_bytes = path.stat().st_size
    append(path, b"123")
    assert damage(path) == "3 bytes longer than it was saved"
    cut(path, 1000)
    assert damage(path) == f"truncated: 1,000 of {num_bytes:,} bytes"
    path = save(tmp_path, 100)
    flip(path, 500, 3)
    assert damage(path) == "its sha256 differs from the stored one"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"# 5 bytes\nabc  step-000000100.ckpt\n"])
def test_a_damaged_hash_does_not_vouch_for_a_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = save(tmp_path, 100)
    (tmp_path / f"{path.name}.sha256").write_bytes(content)
    assert damage(path) == "no sha256 is stored beside it"


def test_the_hash_of_another_checkpoint_does_not_vouch_for_it(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    other = save(tmp_path, 200)
    shutil.copy(tmp_path / f"{other.name}.sha256", tmp_path / f"{path.name}.sha256")
    shutil.copy(other, path)
    assert damage(path) == "no sha256 is stored beside it"


class Full(io.BytesIO):
    """A file on a disk that has no room after so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        super().__init__()
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def test_a_full_disk_is_one_line_and_the_older_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = save(tmp_path, 100)
    num_bytes = older.stat().st_size
    chance = random.Random(0)
    for room in (0, 100, num_bytes - 1, *(chance.randrange(num_bytes) for _ in range(20))):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError) as raised:
            hashed = module._HashedFile
            patch.setattr(module, "_HashedFile", lambda file, room=room, hashed=hashed: hashed(Full(file, room)))
            save(tmp_path, 200)
        message = str(raised.value)
        assert f"could not write {tmp_path / 'step-000000200.ckpt'}: No space left on device, " in message
        assert "MiB are free there; the older checkpoint step-000000100.ckpt" in message and "\n" not in message
        assert names(tmp_path) == [older.name, f"{older.name}.sha256"], "nothing is left lying about"
        assert newest_valid(tmp_path) == (older, [])


def test_a_full_disk_at_the_first_save_says_that_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="there is no older checkpoint"):
        save(tmp_path, 200)


def test_a_file_size_limit_of_the_system_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    """The kernel itself cuts the write short."""
    older = save(tmp_path, 100)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(CheckpointError, match=r"File too large.*step-000000100\.ckpt .* is intact"):
            save(tmp_path, 200)

    assert in_a_child(limited) == 0
    assert newest_valid(tmp_path) == (older, [])
    assert names(tmp_path) == [older.name, f"{older.name}.sha256"]


def test_an_error_that_is_not_the_disks_is_not_called_one(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"hook": lambda: None}, checkpoint_path(tmp_path, 1))
    assert names(tmp_path) == []


def test_an_interrupt_during_the_write_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Full):
        def write(self, data: Any) -> int:
            try:
                return super().write(data)
            except OSError:
                raise KeyboardInterrupt from None

    hashed = module._HashedFile
    monkeypatch.setattr(module, "_HashedFile", lambda file: hashed(Interrupted(file, 5000)))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1)


def in_a_child(action: Callable[[], None]) -> int:
    """Runs it in a forked process and returns the exit status, 1 for an exception."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


KILLED = 77


def die_at(call: int) -> None:
    """From now on, dies before the call of that number among those that change what is on the disk."""
    calls = 0

    def counted(function: Callable[..., Any], *, every: int = 1) -> Callable[..., Any]:
        own = itertools.count()

        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += next(own) % every == 0
            if calls == call:
                os._exit(KILLED)
            return function(*arguments, **options)

        return wrapper

    for name in ("fsync", "replace"):
        setattr(os, name, counted(getattr(os, name)))
    for name in ("touch", "chmod", "unlink", "write_text"):
        setattr(Path, name, counted(getattr(Path, name)))
    module._HashedFile.write = counted(module._HashedFile.write, every=8)  # type: ignore[method-assign]


@pytest.mark.parametrize("step", [30, 20], ids=["a new step", "a step that is saved again"])
def test_a_kill_at_any_stage_of_a_save_leaves_a_whole_newest(tmp_path: Path, step: int) -> None:
    before = tmp_path / "before"
    for earlier in (10, 20):
        save(before, earlier)
    for stage in range(1, 100):
        directory = tmp_path / str(stage)
        shutil.copytree(before, directory)

        def killed(directory: Path = directory, stage: int = stage) -> None:
            die_at(stage)
            save(directory, step, seed=step + 1)

        status = in_a_child(killed)
        valid, damaged = newest_valid(directory)
        assert damaged == [], f"killed at stage {stage}"
        assert valid in (checkpoint_path(directory, 20), checkpoint_path(directory, step))
        assert valid is not None
        assert_holds(valid, 20 if valid.read_bytes() == (before / "step-000000020.ckpt").read_bytes() else step + 1)
        assert len(checkpoints(directory)) >= 2, "an old one goes only when the new one is in place"
        if status == 0:
            break
        assert status == KILLED
    assert stage > 20


def test_the_save_after_a_kill_removes_what_it_left(tmp_path: Path) -> None:
    for stage in (5, 12):

        def killed(stage: int = stage) -> None:
            die_at(stage)
            save(tmp_path, stage)

        assert in_a_child(killed) == KILLED
        assert names(tmp_path), "it was killed before it had left anything"
    save(tmp_path, 40)
    assert names(tmp_path) == ["step-000000040.ckpt", "step-000000040.ckpt.sha256"]
