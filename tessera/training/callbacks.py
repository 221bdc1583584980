"""What happens around a training step: the clock and schedule, saving, interruption."""

import random
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import distributed

from tessera.training.checkpoint import checkpoint_path
from tessera.training.optim import MuonAdamW, OptimizerConfig, rate_at
from tessera.training.processes import gather, largest


class ProgressClock(Callback):
    """Sets `module.progress` in [0, 1] and the learning rate before every step, and stops at the end of the budget.

    Progress is the larger of steps done / max_steps and seconds spent / budget. With a budget, a machine that turns out
    slower than planned still completes the decay of the learning rate, in fewer steps; without one, progress depends on
    the step alone and training is repeatable.

    Args:
        config: the schedule.
        max_steps: optimizer steps at which progress is 1.
        budget_seconds: training time at which progress is 1; None for no limit.
    """

    def __init__(self, config: OptimizerConfig, *, max_steps: int, budget_seconds: float | None) -> None:
        self.config = config
        self.max_steps = max_steps
        self.budget_seconds = budget_seconds
        self.expected_steps = float(max_steps)
        """optimizer steps in all, as far as can be told: fewer than max_steps where the budget ends first"""
        self.seconds_before = 0.0
        self.started = time.monotonic()
        self._begun_step = -1

    @property
    def seconds(self) -> float:
        """Training time so far, in this process and in the ones it resumes."""
        return self.seconds_before + time.monotonic() - self.started

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds_before = state_dict["seconds"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = time.monotonic()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._begun_step:
            return  # another part of the same batch
        self._begun_step = trainer.global_step
        progress = trainer.global_step / self.max_steps
        if self.budget_seconds is not None:
            (seconds,) = largest(self.seconds)  # the same in all processes, or their weights would part
            spent = seconds / self.budget_seconds
            if trainer.global_step and spent > progress:
                self.expected_steps = trainer.global_step / spent
            progress = max(progress, spent)
        pl_module.progress = min(progress, 1.0)  # type: ignore[assignment]
        factor = rate_at(min(progress, 1.0), self.config)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.learning_rate * factor * group.get("rate", 1.0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.budget_seconds is None or trainer.global_step == self._begun_step:
            return
        (seconds,) = largest(self.seconds)
        if seconds >= self.budget_seconds:
            trainer.should_stop = True


class FullPrecisionUpdates(Callback):
    """Computes Muon's products in fp32, for trainings in fp32.

    A digit that rounding changes in the gradient, because several processes add it up in another order, may turn the
    last of the 8 digits of bf16 and change an update by 0.4%; in fp32 it stays as small as it was.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, MuonAdamW):
                optimizer.product_dtype = torch.float32


class RandomState(Callback):
    """Carries the state of every random generator of every process through a checkpoint.

    Where a run goes on with more processes than before, the further ones have generators seeded anew.
    """

    def state_dict(self) -> dict[str, Any]:
        return {"processes": gather(_generators())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = state_dict["processes"]
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        if rank < len(states):
            _set_generators(states[rank])


def _generators() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    return {
        "python": [version, list(words), gauss],
        "numpy": [
            torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            int(numpy_state["state"]["pos"]),
            int(numpy_state["has_gauss"]),
            float(numpy_state["gauss"]),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_generators(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    key, *rest = state["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class Saver(Callback):
    """Saves a checkpoint every so many seconds, and when the user interrupts.

    The first Ctrl-C (or SIGTERM) finishes the step, saves and stops; a second one stops at once. Of several processes
    any one may be interrupted, and all save and stop after the same step.

    Args:
        directory: where the checkpoints go.
        every_seconds: time between two of them.
        every_steps: steps between two of them, in addition; None for time alone.
    """

    def __init__(self, directory: Path, *, every_seconds: float, every_steps: int | None = None) -> None:
        self.directory = directory
        self.every_seconds = every_seconds
        self.every_steps = every_steps
        self.interrupted = False
        self._saved_at = time.monotonic()
        self._saved_step = -1
        self._ended_step = -1
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_at = time.monotonic()
        self._ended_step = trainer.global_step
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._handlers[number] = signal.signal(number, self._request_stop)
            except ValueError:  # not the main thread: whoever embeds us handles signals
                break

    def _request_stop(self, number: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._ended_step:
            return  # a part of a batch: gradients that are still being summed are in no checkpoint
        self._ended_step = trainer.global_step
        late, interrupted = largest(time.monotonic() - self._saved_at, self.interrupted)
        due = late >= self.every_seconds
        due |= self.every_steps is not None and trainer.global_step % self.every_steps == 0
        if due or interrupted:
            self.save(trainer)
        if interrupted:
            self.interrupted = True
            trainer.limit_val_batches = 0  # or Lightning would validate before it stops
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_handlers()
        # It may have come during the last validation, to one of several processes.
        self.interrupted = bool(largest(self.interrupted)[0])
        self.save(trainer)  # what comes after training may fail, too

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def save(self, trainer: pl.Trainer) -> Path:
        """Saves the state after the steps made so far, unless it is saved already; returns the file."""
        path = checkpoint_path(self.directory, trainer.global_step)
        if trainer.global_step != self._saved_step:
            trainer.save_checkpoint(path)
            self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        return path
