"""Checkpoints damaged in every way that disks and copies damage files: each is found, and the older one used."""

import multiprocessing
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.record import Row
from benchmarks.reliability_training import CHECKPOINTS, Attempt, Job, attempt, prepare
from tessera.training.checkpoint import AtomicCheckpointIO, CheckpointError, checkpoints, newest_valid

_JOB = Job("prior", 0, 1)
_SECTOR_BYTES = 512


def truncated(whole: bytes, chance: random.Random) -> bytes:
    """Cut off anywhere, as by a full disk or a copy that was stopped."""
    return whole[: chance.randrange(len(whole))]


def one_bit_flipped(whole: bytes, chance: random.Random) -> bytes:
    """The least damage that there is."""
    position = chance.randrange(len(whole))
    return whole[:position] + bytes([whole[position] ^ 1 << chance.randrange(8)]) + whole[position + 1 :]


def sectors_zeroed(whole: bytes, chance: random.Random) -> bytes:
    """What a file system leaves of blocks that had not reached the disk."""
    start = chance.randrange(len(whole)) // _SECTOR_BYTES * _SECTOR_BYTES
    end = min(len(whole), start + _SECTOR_BYTES * chance.randint(1, 16))
    return whole[:start] + bytes(end - start) + whole[end:]


def sectors_of_elsewhere(whole: bytes, chance: random.Random) -> bytes:
    """Part of the file in the place of another part."""
    sectors = len(whole) // _SECTOR_BYTES
    start, source = (chance.randrange(sectors) * _SECTOR_BYTES for _ in range(2))
    return whole[:start] + whole[source : source + _SECTOR_BYTES] + whole[start + _SECTOR_BYTES :]


def bytes_appended(whole: bytes, chance: random.Random) -> bytes:
    """Longer than it was written."""
    return whole + chance.randbytes(chance.randint(1, 4096))


_DAMAGES: tuple[tuple[Callable[[bytes, random.Random], bytes], float], ...] = (
    (truncated, 0.3),
    (one_bit_flipped, 0.4),
    (sectors_zeroed, 0.1),
    (sectors_of_elsewhere, 0.1),
    (bytes_appended, 0.1),
)


def measure(*, quick: bool) -> tuple[list[Row], dict[str, Any]]:
    """Damages the newest of two checkpoints 500 times, 100 if it has to be quick."""
    count, runs = (100, 1) if quick else (500, 5)
    found, used = Counter(), 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
            pool.submit(prepare, folder).result()
            undisturbed = pool.submit(attempt, _JOB, folder, folder / "run").result()
            if undisturbed.failure:
                raise RuntimeError(undisturbed.failure)
            older, newer = checkpoints(folder / "run" / CHECKPOINTS)
            whole, chance = newer.read_bytes(), random.Random(0)
            reasons: Counter[str] = Counter()
            cases = [damage for damage, share in _DAMAGES for _ in range(round(share * count))]
            for damage in cases:
                newer.write_bytes(_changed(whole, damage, chance))
                valid, damaged = newest_valid(newer.parent)
                used += valid == older
                found[damage.__name__] += [path for path, _ in damaged] == [newer] and _is_refused(newer)
                reasons.update(reason.split(":")[0].lstrip("0123456789, ") for _, reason in damaged)
            resumed = 0
            for damage, _ in _DAMAGES[:runs]:
                newer.write_bytes(_changed(whole, damage, chance))
                (folder / "run" / "run" / "finished.json").unlink()
                again = pool.submit(attempt, _JOB, folder, folder / "run").result()
                resumed += _went_on_from(again, older) and again.sha256 == undisturbed.sha256
    every = len(cases)
    rows = [
        Row("damaged checkpoints found and refused", found.total(), f"of {every}", "", None, every),
        Row("older checkpoint used in their place", used, f"of {every}", "", None, every),
        Row("runs resumed past a damaged one to the same weights", resumed, f"of {runs}", "", None, runs),
    ]
    kinds = Counter(damage.__name__ for damage in cases)
    raw = {"checkpoint bytes": len(whole), "cases": kinds, "found": found, "reasons given": reasons}
    return rows, raw


def _changed(whole: bytes, damage: Callable[[bytes, random.Random], bytes], chance: random.Random) -> bytes:
    """The damaged file; another draw where zeros replaced zeros."""
    while (harmed := damage(whole, chance)) == whole:
        pass
    return harmed


def _is_refused(path: Path) -> bool:
    try:
        AtomicCheckpointIO().load_checkpoint(path)
    except CheckpointError:
        return True
    return False


def _went_on_from(resumed: Attempt, checkpoint: Path) -> bool:
    return bool(resumed.losses) and min(resumed.losses)[0] == int(checkpoint.stem.removeprefix("step-"))
