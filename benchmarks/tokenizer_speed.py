"""Speeds in benchmarks/tokenizer.py: step times in alternating slices, so that what disturbs one side disturbs both."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from benchmarks.tokenizer_corpora import Pictures
from benchmarks.tokenizer_jobs import PEER_WORKER, Job, JobError, Place, ours_config, peer_job
from dvae.encode import EncodeConfig, encode
from tessera.data.corpus import read_views
from tessera.data.views import Views
from tessera.plain_yaml import write_yaml

PRECISIONS: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
_WARM_UP_STEPS = 3
_ENCODE_RUNS = 3
_READ_AT_ONCE = 128


class _Process:
    """A worker that trains as many steps as it is asked for."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self.process, self.log = process, log

    def seconds(self, steps: int) -> float:
        """Lets it run so many steps."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise JobError(f"a process of the step times ended, see {self.log}")
        return float(answer)


def step_seconds(
    job: Job,
    ours: Mapping[str, Any],
    peer: Mapping[str, Any],
    pictures: Pictures,
    place: Place,
    *,
    rounds: int,
    slice_seconds: float,
) -> dict[str, list[float]]:
    """Seconds per step of both sides on equal batches, in fp32 and in bf16, in turns of a few seconds each.

    Args:
        job: names the folder, and the corpus and seed of the pictures.
        ours: settings of `run_ours`, whose batch size must be the peer's.
        peer: settings of `run_peer`; not used where the peer is not installed.
        pictures: the corpus.
        place: where and how.
        rounds: turns of every process.
        slice_seconds: length of a turn.

    Returns:
        "ours fp32", "ours bf16", "peer fp32" and "peer bf16" -> one value per round.

    Raises:
        JobError: if a process fails.
    """
    folder = place.work / "steps" / job.name
    folder.mkdir(parents=True, exist_ok=True)
    commands: dict[str, list[str]] = {}
    for precision in PRECISIONS:
        config = ours_config(job, {**ours, "trainer": {**ours["trainer"], "precision": precision}}, pictures)
        path = folder / f"ours-{precision}.yaml"
        # a run of a million steps: checkpoints belong to its cost as little as its end does
        write_yaml(path, {**config, "trainer": {**config["trainer"], "checkpoint_every_seconds": 1e9}})
        commands[f"ours {precision}"] = [sys.executable, "-m", "benchmarks.peers.tessera_vae", str(path)]
    if place.peer_python is not None:
        for precision in PRECISIONS:
            path = folder / f"peer-{precision}.json"
            path.write_text(json.dumps(peer_job(folder, job, {**peer, "precision": precision}, pictures)))
            command = [str(place.peer_python), "-W", "ignore", str(PEER_WORKER), "slices", str(path)]
            commands[f"peer {precision}"] = command
    with ExitStack() as stack:
        processes = {name: _start(command, stack, place, log=folder / "log.txt") for name, command in commands.items()}
        steps = {}
        for name, process in processes.items():
            process.seconds(_WARM_UP_STEPS)
            steps[name] = max(1, round(slice_seconds / process.seconds(1)))
        measured: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, process in processes.items():
                measured[name].append(process.seconds(steps[name]) / steps[name])
    return measured


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return median(one / other for one, other in zip(numerators, denominators, strict=True))


class EncodeRate(NamedTuple):
    """How fast image files become codes."""

    images_per_second: float
    """median of three runs"""
    waiting_share: float
    """of the time, in which the model had no pictures although threads read them ahead; of the median run"""
    decoding_share: float
    """what reading and decoding the same files takes without a model, as a share of the median run's time"""


def encode_rate(model: Path, pictures: Pictures, *, scratch: Path) -> EncodeRate:
    """Times `tessera encode` with the dVAE of a model folder on the PNG files of a corpus.

    Args:
        model: model folder; receives a text tokenizer.
        pictures: the corpus.
        scratch: folder that receives the shards.
    """
    data = replace(pictures.data, cache_dir=None)  # decoded pictures of an earlier run would be found there
    corpus = data.open("train")
    began = time.monotonic()
    with closing(read_views(corpus, Views(), batch_size=_READ_AT_ONCE)) as batches:
        images = sum(len(batch) for batch in batches)
    decoding_seconds = (time.monotonic() - began) / images
    runs = []
    for number in range(_ENCODE_RUNS):
        shards = scratch / f"shards-{number}"
        shutil.rmtree(shards, ignore_errors=True)
        result = encode(EncodeConfig(data=data, out=str(model), shards=str(shards), device="cpu"))
        rate = result["images_per_second"]
        runs.append(EncodeRate(rate, result["waiting_share"], decoding_seconds * rate))
    return sorted(runs)[len(runs) // 2]


def _start(command: Sequence[str], stack: ExitStack, place: Place, *, log: Path) -> _Process:
    file = stack.enter_context(log.open("a"))
    process = stack.enter_context(
        subprocess.Popen(
            command, env=place.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
        )
    )
    return _Process(process, log)
