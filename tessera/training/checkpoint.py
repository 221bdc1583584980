"""Crash-safe checkpoints: hashed while they are written, synced, renamed; found and loaded only if they are whole.

    step-000000100.ckpt  step-000000100.ckpt.sha256

Lightning's own writer builds the file in the default temporary directory and moves it, which is a copy across file
systems: a kill at the wrong moment leaves a torn file under the final name, and nothing tells it from a whole one.
Here the hash reaches the disk before the checkpoint gets its name, so that whatever bears the name can be checked. A
kill between the two leaves a hash without a checkpoint, which the next save removes. `sha256sum -c` reads the hashes.
"""

import hashlib
import logging
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from lightning.pytorch.plugins.io import CheckpointIO

import tessera
from tessera.atomic_write import atomic_write
from tessera.errors import UserError

FORMAT_VERSION = 1
FORMAT_KEY = "tessera_checkpoint"
KEPT = 2

_logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{9})\.ckpt")
_HASH_SUFFIX = ".sha256"
_RECORD = re.compile(r"# (\d+) bytes\n([0-9a-f]{64})  (.+)\n")  # sha256sum passes over the comment


class CheckpointError(UserError):
    """A checkpoint that could not be written, or that cannot be loaded."""


class Damaged(NamedTuple):
    """A checkpoint that was passed over.

    Attributes:
        path: the file.
        reason: what is wrong with it, in words that go after its name.
    """

    path: Path
    reason: str


class AtomicCheckpointIO(CheckpointIO):
    """Saves beside the target and renames, keeps the newest `KEPT` whole checkpoints, loads tensors and plain types.

    A save that fails or is killed leaves the older checkpoints as they were: they are removed only when the new one is
    in place.

    Args:
        known_whole: a checkpoint that was checked already, such as `newest_valid` returned; it is not hashed again.
    """

    def __init__(self, known_whole: Path | None = None) -> None:
        self._whole = set() if known_whole is None else {known_whole}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target.parent)
            replaced = _records(target) if target.exists() else ()
            with atomic_write(target) as temporary:
                record = _write({**checkpoint, FORMAT_KEY: FORMAT_VERSION}, temporary, target.name)
                # A step that is saved again has two hashes until the new file has replaced the old one.
                _write_records(target, (record, *replaced))
            if replaced:
                _write_records(target, (record,))
        except OSError as error:
            raise CheckpointError(_failure(target, error)) from error
        self._whole.add(target)
        try:
            self._remove_old(target.parent)
        except OSError as error:  # no reason to stop training
            _logger.warning("old checkpoints in %s could not be removed: %s", target.parent, error)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(path)
        if not self._is_whole(path):
            raise CheckpointError(f"{path} is damaged, {damage(path)}; delete it to resume from an older one")
        checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        _check_format(path, checkpoint)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
        _hash_file(Path(path)).unlink(missing_ok=True)

    def _is_whole(self, path: Path) -> bool:
        """Whether a file is as it was saved; each is hashed once, for the largest take a minute to read."""
        if path not in self._whole and damage(path) is None:
            self._whole.add(path)
        return path in self._whole

    def _remove_old(self, directory: Path) -> None:
        kept = 0
        for path in reversed(checkpoints(directory)):
            if kept < KEPT and self._is_whole(path):
                kept += 1
            elif _records(path):  # what has no hash was not written here
                self.remove_checkpoint(path)


def checkpoint_path(directory: Path, step: int) -> Path:
    """The file name of the checkpoint after `step` optimizer steps."""
    return directory / f"step-{step:09d}.ckpt"


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    return sorted(path for path in directory.glob("step-*.ckpt") if _NAME.fullmatch(path.name))


def checkpoint_step(path: Path) -> int:
    """The number of optimizer steps that a checkpoint's name states."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"not a checkpoint of ours: {path.name}")
    return int(match.group(1))


def newest_valid(directory: Path) -> tuple[Path | None, list[Damaged]]:
    """Finds the checkpoint to resume from: the newest that is as it was saved.

    Args:
        directory: where the checkpoints are; may be absent.

    Returns:
        The checkpoint or None, and the newer ones that were passed over.

    Raises:
        CheckpointError: if it was saved in a newer format; to pass over it would throw away steps that are well.
    """
    damaged: list[Damaged] = []
    for path in reversed(checkpoints(directory)):
        reason = damage(path)
        if reason is None:
            _check_format(path, torch.load(path, map_location="cpu", weights_only=True, mmap=True))
            return path, damaged
        damaged.append(Damaged(path, reason))
    return None, damaged


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None if it is as it was saved; reads all of it."""
    try:
        records = _records(path)
        if not records:
            return "no sha256 is stored beside it"
        num_bytes = path.stat().st_size
        if all(record.num_bytes != num_bytes for record in records):
            saved = records[0].num_bytes
            if num_bytes < saved:
                return f"truncated: {num_bytes:,} of {saved:,} bytes"
            return f"{num_bytes - saved:,} bytes longer than it was saved"
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return None if any(record.sha256 == sha256 for record in records) else "its sha256 differs from the stored one"


class _Record(NamedTuple):
    """What the hash file says of a checkpoint."""

    num_bytes: int
    sha256: str
    name: str


class _HashedFile:
    """A file that knows the hash of what was written to it; torch writes checkpoints from front to back."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0
        self.error: BaseException | None = None

    def write(self, data: memoryview) -> int:
        try:
            self.file.write(data)
        except BaseException as error:
            self.error = self.error or error
            raise
        self.sha256.update(data)
        self.num_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _write(checkpoint: dict[str, Any], path: Path, name: str) -> _Record:
    with path.open("wb") as opened:
        file = _HashedFile(opened)
        try:
            torch.save(checkpoint, file)  # type: ignore[arg-type]
        except RuntimeError:
            # After a failed write torch writes the end of its archive nonetheless, and complains of its position.
            if file.error is not None:
                raise file.error from None
            raise
    return _Record(file.num_bytes, file.sha256.hexdigest(), name)


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + _HASH_SUFFIX)


def _write_records(path: Path, records: Iterable[_Record]) -> None:
    lines = "".join(f"# {record.num_bytes} bytes\n{record.sha256}  {record.name}\n" for record in records)
    with atomic_write(_hash_file(path)) as temporary:
        temporary.write_text(lines)


def _records(path: Path) -> tuple[_Record, ...]:
    """The hashes stored for a checkpoint; none if the hash file is missing or damaged."""
    try:
        text = _hash_file(path).read_text(encoding="ascii")
    except (FileNotFoundError, UnicodeDecodeError):
        return ()
    records = (_Record(int(num_bytes), sha256, name) for num_bytes, sha256, name in _RECORD.findall(text))
    return tuple(record for record in records if record.name == path.name)


def _remove_leftovers(directory: Path) -> None:
    """Removes what a writer that was killed left: temporary files, and a hash whose checkpoint never got its name."""
    for temporary in directory.glob(".step-*.tmp"):
        temporary.unlink(missing_ok=True)
    for hash_file in directory.glob(f"step-*.ckpt{_HASH_SUFFIX}"):
        if not hash_file.with_suffix("").exists():
            hash_file.unlink()


def _check_format(path: Path, checkpoint: dict[str, Any]) -> None:
    version = checkpoint.get(FORMAT_KEY)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is a checkpoint of format {version}, this tessera ({tessera.__version__}) reads format "
            f"{FORMAT_VERSION}: resume with the tessera that wrote it, or delete it"
        )


def _failure(target: Path, error: OSError) -> str:
    folder = target.parent
    free = f", {_mebibytes(shutil.disk_usage(folder).free)} are free there" if folder.is_dir() else ""
    older = next((path for path in reversed(checkpoints(folder)) if damage(path) is None), None)
    if older is None:
        kept = "there is no older checkpoint"
    else:
        kept = (
            f"the older checkpoint {older.name} ({_mebibytes(older.stat().st_size)}) is intact: put that right and run "
            f"the same command again to go on from it"
        )
    return f"could not write {target}: {error.strerror or error}{free}; {kept}"


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
