"""Training runs killed by SIGKILL at random moments, many during a save, and resumed until they are done.

Every part of every step that any process of a run made must have the loss that an undisturbed run has there, bit for
bit, and the exported weights its sha256. Runs are of both kinds (a prior with dropout of merges and captions, a Gumbel
dVAE with noise and mirrored pictures), with 0, 2 and 4 loading processes and with accumulated gradients.
"""

import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

from benchmarks.record import Row
from benchmarks.reliability_training import STEPS, STEPS_PER_SAVE, Attempt, Job, Kill, Stage, attempt, prepare

_WORKERS = (0, 2, 4)
_MOST_KILLS = 3  # of one run
_SAVING_SHARE = 0.6  # of the kills are aimed at a save
_SLOW_SAVE_SECONDS = 1.0
_MOST_ATTEMPTS = 12


class Outcome(NamedTuple):
    """What became of one run.

    Attributes:
        job: what was trained.
        kills: steps made before each kill, with a minus sign where it came during a save.
        wrong: how it differs from the undisturbed run; "" where it does not.
    """

    job: Job
    kills: list[int]
    wrong: str


def measure(*, quick: bool) -> tuple[list[Row], dict[str, Any]]:
    """Kills and resumes 100 runs, 12 if it has to be quick; returns the rows and what lies behind them."""
    count, least_saving = (12, 4) if quick else (100, 30)
    lanes = 3 * (os.cpu_count() or 1)  # they wait for the disk most of the time
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # A pool that forks: see benchmarks.reliability_training.
        with ProcessPoolExecutor(lanes, mp_context=multiprocessing.get_context("fork")) as pool:
            pool.submit(_prepare, folder).result()
            kinds = [(stage, parts) for parts in (1, 2) for stage in get_args(Stage)]
            jobs = [Job(stage, workers, parts) for stage, parts in kinds for workers in _WORKERS]
            undisturbed = dict(zip(jobs, pool.map(partial(_undisturbed, folder), jobs), strict=True))
            for job, whole in undisturbed.items():
                print(f"{job}: {whole.seconds:.1f} s undisturbed{whole.failure}", file=sys.stderr, flush=True)
            outcomes = []
            for outcome in pool.map(partial(_killed, folder, undisturbed), range(count)):
                outcomes.append(outcome)
                told = f"run {len(outcomes)}, {outcome.job}: killed at {outcome.kills}, {outcome.wrong or 'equal'}"
                print(told, file=sys.stderr, flush=True)
    alike = 0
    for stage, parts in kinds:
        runs = [undisturbed[Job(stage, workers, parts)] for workers in _WORKERS]
        alike += all((run.sha256, run.losses) == (runs[0].sha256, runs[0].losses) for run in runs)
    right = sum(not outcome.wrong for outcome in outcomes)
    kills = [step for outcome in outcomes for step in outcome.kills]
    saving = sum(step < 0 for step in kills)
    rows = [
        Row("runs killed and resumed to the same losses and weights", right, f"of {count} runs", "", None, count),
        Row("kills during a save", saving, f"of {len(kills)} kills", "", None, least_saving),
        Row("kinds of runs alike with 0, 2 and 4 loading processes", alike, f"of {len(kinds)}", "", None, len(kinds)),
    ]
    raw = {
        "steps": STEPS,
        "steps between saves": STEPS_PER_SAVE,
        "runs of each kind": Counter(str(outcome.job) for outcome in outcomes),
        "kills (steps made before; negative during a save)": [outcome.kills for outcome in outcomes],
        "differing": [f"{outcome.job}: {outcome.wrong}" for outcome in outcomes if outcome.wrong],
    }
    return rows, raw


def _prepare(folder: Path) -> None:
    prepare(folder / "inputs")


def _undisturbed(folder: Path, job: Job) -> Attempt:
    with tempfile.TemporaryDirectory(dir=folder) as run:
        return attempt(job, folder / "inputs", Path(run))


def _killed(folder: Path, undisturbed: Mapping[Job, Attempt], number: int) -> Outcome:
    jobs = list(undisturbed)
    job = jobs[number % len(jobs)]
    whole = undisturbed[job]
    chance = random.Random(number)
    run = folder / f"run-{number}"
    attempts: list[Attempt] = []
    wanted = chance.randint(1, _MOST_KILLS)
    for _ in range(_MOST_ATTEMPTS):
        kill = _draw(chance, whole.seconds) if sum(made.was_killed for made in attempts) < wanted else None
        attempts.append(attempt(job, folder / "inputs", run, kill))
        if attempts[-1].failure:
            break
        if attempts[-1].sha256 is not None:
            if any(made.was_killed for made in attempts):
                break
            shutil.rmtree(run)  # it was done before its time had come
            attempts.clear()
    shutil.rmtree(run, ignore_errors=True)
    kills = [
        (-1 if made.was_saving else 1) * max((step + 1 for step, _ in made.losses), default=0)
        for made in attempts
        if made.was_killed
    ]
    return Outcome(job, kills, _difference(whole, attempts))


def _draw(chance: random.Random, seconds: float) -> Kill:
    if chance.random() < _SAVING_SHARE:
        return Kill(chance.uniform(0, _SLOW_SAVE_SECONDS), save=chance.randrange(STEPS // STEPS_PER_SAVE))
    return Kill(chance.uniform(0, seconds))


def _difference(whole: Attempt, attempts: list[Attempt]) -> str:
    seen = set()
    for made in attempts:
        if made.failure:
            return made.failure
        for place, loss in made.losses.items():
            if whole.losses.get(place) != loss:
                return f"the loss of step {place[0]} is {float.fromhex(loss)!r} in process {attempts.index(made)}"
            seen.add(place)
    if seen != set(whole.losses):
        return f"{len(set(whole.losses) - seen)} steps were never made"
    return "" if attempts[-1].sha256 == whole.sha256 else "other weights"
