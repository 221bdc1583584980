"""Tiny training runs that the reliability benchmark kills, each in a process of its own forked from one parent.

Forking saves the ten seconds that importing torch and Lightning takes. It is safe as long as the parent has computed
nothing: thread pools do not outlive a fork. For the same reason a child begins like a fresh process, with whatever a
library keeps for the life of a process still unset.
"""

import contextlib
import os
import select
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
import torch.utils.tensorboard

import dvae.train
import transformer.train
from dvae.model import DiscreteVAEConfig
from tessera.data.config import DataConfig
from tessera.data.shards import ShardIndex, ShardWriter
from tessera.model_folder import ModelFolder, write_part, write_tokenizer
from tessera.text_tokenizer import TextTokenizer
from tessera.training import checkpoint
from tessera.training.optim import OptimizerConfig
from tessera.training.run import TrainerConfig
from transformer.model import PriorConfig

Stage = Literal["prior", "dvae"]

STEPS = 40
STEPS_PER_SAVE = 5
CHECKPOINTS = "run/checkpoints"  # below the folder of a run

_SAMPLES = 64
_SLOW_WRITE_SECONDS, _SLOW_CALL_SECONDS = 0.0005, 0.03  # a save then takes half a second instead of 20 ms
_MOST_SECONDS = 300.0


class Job(NamedTuple):
    """What is trained."""

    stage: Stage
    num_workers: int
    accumulate: int

    def __str__(self) -> str:
        return f"{self.stage}, {self.num_workers} workers, batches in {self.accumulate} parts"


class Kill(NamedTuple):
    """When a run is killed."""

    seconds: float
    """after its start, or after the save has begun"""
    save: int | None = None
    """which save, from 0, is slowed down and aimed at; None for any moment"""


class Attempt(NamedTuple):
    """What became of one process.

    Attributes:
        losses: of every part of every step that it made, in hexadecimal, by step and part.
        sha256: of the exported part; None if it did not come to that.
        seconds: from the fork to the end.
        was_killed: by us.
        was_saving: when it was killed, a save had begun and not ended.
        failure: what it printed, if it ended otherwise.
    """

    losses: dict[tuple[int, int], str]
    sha256: str | None
    seconds: float
    was_killed: bool
    was_saving: bool
    failure: str


def prepare(inputs: Path) -> None:
    """Writes what the prior is trained on: a model folder with a tokenizer, and token shards."""
    captions = [(f"a red star number {number}", "a star beside a blue ring") for number in range(_SAMPLES)]
    write_part(inputs / "model", "dvae", config={}, tensors={"weight": torch.zeros(1)})
    texts = [text for both in captions for text in both]
    write_tokenizer(inputs / "model", TextTokenizer.train(texts, vocab_size=320).proto)
    folder = ModelFolder.open(inputs / "model", parts=["dvae"])
    index = ShardIndex(
        num_samples=_SAMPLES,
        grid_height=3,
        grid_width=3,
        codebook_size=16,
        image_height=24,
        image_width=24,
        corpus_name="random codes",
        corpus_fingerprint="0",
        dvae_sha256=folder.part_sha256("dvae"),
        tokenizer_sha256=folder.tokenizer_sha256,
        text_len=12,
    )
    with ShardWriter(inputs / "shards", index) as writer:
        writer.append(np.random.default_rng(0).integers(0, 16, (_SAMPLES, 1, 3, 3)), captions)


def attempt(job: Job, inputs: Path, run: Path, kill: Kill | None = None) -> Attempt:
    """Starts or resumes a run in a child process, and kills it or lets it finish.

    Args:
        job: what to train.
        inputs: where `prepare` wrote.
        run: the run's folder; whatever is there is resumed.
        kill: when to kill; None lets it finish.
    """
    reading, writing = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _in_child(job, inputs, run, slow_save=None if kill is None else kill.save, notes=writing)
    os.close(writing)
    notes = b""
    deadline = began + (kill.seconds if kill is not None and kill.save is None else _MOST_SECONDS)
    was_killed = False
    with open(reading, "rb", buffering=0) as pipe:
        while True:
            if select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                read = pipe.read(65536)
                notes += read
                if not read or b"\ndone " in notes:
                    break
                if kill is not None and kill.save is not None and b"slow\n" in read:
                    deadline = time.monotonic() + kill.seconds
            else:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                was_killed = True
                # Its loading processes hold the pipe as well, and end seconds after it.
                notes += _drained(pipe)
                break
    status = 0 if was_killed else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return _told(notes, seconds=time.monotonic() - began, was_killed=was_killed, status=status, run=run)


def _drained(pipe: Any) -> bytes:
    notes = b""
    while select.select([pipe], [], [], 0)[0] and (read := pipe.read(65536)):
        notes += read
    return notes


def _told(notes: bytes, *, seconds: float, was_killed: bool, status: int, run: Path) -> Attempt:
    losses: dict[tuple[int, int], str] = {}
    sha256, is_saving = None, False
    for line in notes.decode().splitlines():
        kind, *values = line.split()
        if kind == "loss":
            losses[int(values[0]), int(values[1])] = values[2]
        elif kind == "done":
            sha256 = values[0]
        else:
            is_saving = kind in ("save", "slow")
    failed = sha256 is None and not was_killed
    log = (run / "log.txt").read_text(errors="replace")[-2000:] if failed and (run / "log.txt").exists() else ""
    failure = f"exit code {status}: {log}" if failed else ""
    return Attempt(losses, sha256, seconds, was_killed, was_killed and is_saving, failure)


def _in_child(job: Job, inputs: Path, run: Path, *, slow_save: int | None, notes: int) -> NoReturn:
    status = 1
    try:
        run.mkdir(parents=True, exist_ok=True)
        log = os.open(run / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)

        def note(text: str) -> None:
            os.write(notes, f"{text}\n".encode())  # whole or not at all, so short it is

        _tell_losses(note)
        _tell_saves(note, slow_save)
        note(f"done {_train(job, inputs, run)}")
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def _train(job: Job, inputs: Path, run: Path) -> str:
    """Runs the stage's own command; returns the sha256 of what it exports."""
    trainer = TrainerConfig(
        max_steps=STEPS,
        batch_size=8,
        device="cpu",
        precision="fp32",
        num_workers=job.num_workers,
        accumulate=job.accumulate,
        checkpoint_every_steps=STEPS_PER_SAVE,
        validate_every_steps=15,
    )
    optim = OptimizerConfig(ema_horizon=0.3)
    out, run_dir = str(run / "model"), str(run / "run")
    if job.stage == "prior":
        if not (run / "model").exists():
            shutil.copytree(inputs / "model", run / "copy")
            (run / "copy").rename(run / "model")
        config = transformer.train.TrainConfig(
            shards=str(inputs / "shards"),
            model=PriorConfig(dim=32, depth=2, heads=2),
            trainer=trainer,
            optim=optim,
            validation_share=0.2,
            out=out,
            run_dir=run_dir,
        )
        return transformer.train.train(config)["sha256"]
    model = DiscreteVAEConfig(widths=(8, 16), blocks=(0, 1), levels=(4, 4), quantizer="gumbel", codebook_size=16)
    data = DataConfig(path="scenes", limit=_SAMPLES, image_size=(16, 16))
    return dvae.train.train(
        dvae.train.TrainConfig(
            data=data, model=model, trainer=trainer, optim=optim, flip=True, out=out, run_dir=run_dir
        )
    )["sha256"]


def _tell_losses(note: Callable[[str], None]) -> None:
    from dvae.lit import DiscreteVAELit
    from transformer.lit import PriorLit

    made: dict[int, int] = {}  # parts of each step

    def telling(training_step: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapper(module: Any, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = training_step(module, batch, batch_idx)
            step = module.global_step
            part = made[step] = made.get(step, -1) + 1
            note(f"loss {step} {part} {float(loss.detach()).hex()}")
            return loss

        return wrapper

    for kind in (DiscreteVAELit, PriorLit):
        kind.training_step = telling(kind.training_step)  # type: ignore[method-assign]


def _tell_saves(note: Callable[[str], None], slow_save: int | None) -> None:
    save = checkpoint.AtomicCheckpointIO.save_checkpoint
    count = 0

    def telling(*arguments: Any, **options: Any) -> None:
        nonlocal count
        is_slow = count == slow_save
        count += 1
        note("slow" if is_slow else "save")
        with _slowed() if is_slow else contextlib.nullcontext():
            save(*arguments, **options)
        note("saved")

    checkpoint.AtomicCheckpointIO.save_checkpoint = telling  # type: ignore[method-assign]


@contextlib.contextmanager
def _slowed() -> Iterator[None]:
    """Writing, syncing, renaming and removing files take long, before and after they take effect."""

    def slow(owner: Any, name: str, seconds: float) -> Callable[[], None]:
        fast = getattr(owner, name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            time.sleep(seconds)
            result = fast(*arguments, **options)
            time.sleep(seconds)
            return result

        setattr(owner, name, wrapper)
        return lambda: setattr(owner, name, fast)

    restore = [
        slow(checkpoint._HashedFile, "write", _SLOW_WRITE_SECONDS),
        *(slow(os, name, _SLOW_CALL_SECONDS) for name in ("fsync", "replace")),
        slow(Path, "unlink", _SLOW_CALL_SECONDS),
    ]
    try:
        yield
    finally:
        for back in restore:
            back()
