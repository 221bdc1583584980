"""How benchmarks/sampling.py measures: every contestant in a process of its own, idle while another one is timed.

Turns are short and go there and back (A B C, C B A), so that what disturbs one disturbs all; a ratio is the median of
the ratios within a round. Peak memory is what Linux keeps as a process's high-water mark, less what it was when
everything had been imported.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.sampling_contestants import Cell, Contestant, Shape

_ROOT = Path(__file__).parents[1]
_PEER_SCRIPTS = {"dalle-pytorch": "dalle_pytorch_prior.py", "llama": "llama_prior.py"}


class WorkerError(RuntimeError):
    """A contestant's process ended; the message is the last line that it left."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how contestants run."""

    threads: int
    """of each process"""
    peer_python: Path | None
    """interpreter of the peers' environment; None where it is not installed"""
    scratch: Path
    """folder for jobs, logs and compiled imports"""
    shape: Shape
    """of every model"""

    @property
    def environment(self) -> dict[str, str]:
        count = str(self.threads)
        # no contestant may find a GPU
        found = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "CUDA_VISIBLE_DEVICES": ""}
        if found.pop("PYTHONDONTWRITEBYTECODE", ""):
            # else the peers would compile their imports anew in each process, ten seconds every time
            found["PYTHONPYCACHEPREFIX"] = str(self.scratch / "pycache")
        return found


class Pace(NamedTuple):
    """How long it is measured."""

    rounds: int
    """turns of every contestant"""
    slow_rounds: int
    """turns of a slow one, spread over the rounds"""
    slice_seconds: float
    """about the length of a turn"""


class Worker:
    """One contestant's process.

    Args:
        contestant: who.
        cell: what it does.
        place: where and how.
        stack: ends the process.
    """

    def __init__(self, contestant: Contestant, cell: Cell, place: Place, stack: ExitStack) -> None:
        self.contestant = contestant
        job = {
            "shape": place.shape._asdict(),
            "threads": place.threads,
            **cell.job,
            **contestant.settings,
        }
        handle, path = tempfile.mkstemp(suffix=".json", dir=place.scratch)
        os.close(handle)
        Path(path).write_text(json.dumps(job))
        self._log = Path(path).with_suffix(".log")
        if contestant.side == "ours":
            command = [sys.executable, "-m", "benchmarks.peers.tessera_prior", path]
        else:
            script = _ROOT / "benchmarks" / "peers" / _PEER_SCRIPTS[contestant.side]
            command = [str(place.peer_python), "-W", "ignore", str(script), path]
        self._process = stack.enter_context(
            subprocess.Popen(
                command,
                cwd=_ROOT,
                env=place.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stack.enter_context(self._log.open("w")),
                text=True,
            )
        )
        self.version, self.parameters, self.calls = "", 0, 1
        self._import_bytes: int | None = None

    def wait_for_imports(self) -> None:
        """Reads what the worker is."""
        self.version = self._answer().partition(",")[0]
        self._import_bytes = self._high_water_bytes()

    def begin(self) -> None:
        """Lets it build its model."""
        self.parameters = int(self._ask("begin"))

    def warm_up(self, slice_seconds: float) -> None:
        """Lets it do its first call, and finds out how many make a turn of about so many seconds."""
        if self.contestant.is_slow:  # it warms up by itself, with less than a whole call
            return
        self.turn()
        self.calls = max(1, round(slice_seconds / self.turn()))

    def turn(self) -> float:
        """Lets it work, and returns the seconds per call."""
        return float(self._ask(str(self.calls))) / self.calls

    def peak_bytes(self) -> int | None:
        """The most memory that it held beyond its imports so far; None where the system does not tell."""
        peak = self._high_water_bytes()
        return None if peak is None or self._import_bytes is None else peak - self._import_bytes

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._end() from error
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._end()
        return line.strip()

    def _end(self) -> WorkerError:
        lines = self._log.read_text().strip().splitlines() or ["it ended without a word"]
        return WorkerError(lines[-1])

    def _high_water_bytes(self) -> int | None:
        # not the resource module's figure, which a process inherits from the one that started it
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            return None
        marks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
        return 1024 * int(marks[0]) if marks else None


def measure(cell: Cell, contestants: Sequence[Contestant], place: Place, pace: Pace) -> dict[str, Any]:
    """Times contestants in turns.

    Args:
        cell: what they do.
        contestants: those of the cell that take part.
        place: where and how.
        pace: how long.

    Returns:
        batch; "contestants": name -> version, parameters, rounds (numbers of those that it was timed in), seconds (per
        call, in those rounds) and peak_bytes; "left_out": name -> reason.
    """
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        workers = [Worker(contestant, cell, place, stack) for contestant in contestants]

        def all_do(action: Callable[[Worker], None]) -> None:
            """Whoever fails takes no part from then on."""
            for worker in list(workers):
                try:
                    action(worker)
                except WorkerError as error:
                    left_out[worker.contestant.name] = str(error)
                    workers.remove(worker)

        all_do(Worker.wait_for_imports)
        all_do(Worker.begin)
        all_do(lambda worker: worker.warm_up(pace.slice_seconds))
        timed: dict[str, dict[int, float]] = {worker.contestant.name: {} for worker in workers}

        def take_turn(number: int, worker: Worker) -> None:
            if not worker.contestant.is_slow or number in slow_rounds(pace):
                timed[worker.contestant.name][number] = worker.turn()

        for number in range(pace.rounds):
            all_do(partial(take_turn, number))
            workers.reverse()
        found = {
            worker.contestant.name: {
                "version": worker.version,
                "parameters": worker.parameters,
                "rounds": list(timed[worker.contestant.name]),
                "seconds": list(timed[worker.contestant.name].values()),
                "peak_bytes": worker.peak_bytes(),
            }
            for worker in workers
        }
    return {"batch": cell.batch, "contestants": found, "left_out": left_out}


def slow_rounds(pace: Pace) -> set[int]:
    """The rounds in which slow contestants are timed: first, last and evenly between, or the middle one alone."""
    if pace.slow_rounds == 1:
        return {pace.rounds // 2}
    return {round(turn * (pace.rounds - 1) / (pace.slow_rounds - 1)) for turn in range(pace.slow_rounds)}


def median_ratio(numerators: Mapping[str, Any], denominators: Mapping[str, Any]) -> float:
    """The median of the ratios of two contestants' seconds over the rounds in which both were timed."""
    above = dict(zip(numerators["rounds"], numerators["seconds"], strict=True))
    below = dict(zip(denominators["rounds"], denominators["seconds"], strict=True))
    return median(above[number] / below[number] for number in above if number in below)
