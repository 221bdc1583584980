"""Crash-safe checkpoints: written beside the target, synced, renamed; loadable with `weights_only=True`.

Lightning's own writer builds the file in the default temporary directory and moves it, which is a copy across file
systems: a kill at the wrong moment leaves a torn file under the final name.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

_NAME = re.compile(r"step-(\d{9})\.ckpt")
KEPT = 2


class AtomicCheckpointIO(CheckpointIO):
    """Saves through a temporary file in the same directory, keeps the newest `KEPT`, loads tensors and plain types."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".partial")
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        for old in checkpoints(target.parent)[:-KEPT]:
            old.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


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


def newest_readable(directory: Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint that can be read, and the unreadable newer ones that were passed over."""
    damaged: list[Path] = []
    for path in reversed(checkpoints(directory)):
        try:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception:  # torch raises a dozen types for damaged archives
            damaged.append(path)
        else:
            return path, damaged
    return None, damaged
