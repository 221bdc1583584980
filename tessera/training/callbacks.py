"""What happens around a training step: the clock and schedule, saving, interruption, progress."""

import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from tessera.training.checkpoint import checkpoint_path
from tessera.training.optim import OptimizerConfig, rate_at

_AVERAGED_PER_HORIZON = 24


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
        progress = trainer.global_step / self.max_steps
        if self.budget_seconds is not None:
            spent = self.seconds / self.budget_seconds
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
        if self.budget_seconds is not None and self.seconds >= self.budget_seconds:
            trainer.should_stop = True


class HorizonAveraging(WeightAveraging):
    """Exponential weight averaging over a share of training, however many steps the clock lets that be.

    Short runs are not dominated by their start, nor long ones by noise. Averaging walks over all weights, which on a
    CPU took 6 of the 110 ms of a step of a small prior; a few dozen times per horizon average as well as every step.

    Args:
        share: of training, above 0, over which weights are averaged.
        clock: knows how many steps there will be.
        device: where training takes place; Lightning would keep the average where the module was built.
    """

    def __init__(self, share: float, clock: ProgressClock, *, device: torch.device) -> None:
        # Averaging integer buffers truncates them: a radix of 200 becomes 199 and every code a wrong one.
        super().__init__(device=device, use_buffers=False, multi_avg_fn=self._average)
        self.share, self.clock = share, clock

    @property
    def horizon_steps(self) -> float:
        """Steps over which the weight of a past state falls to 1/e."""
        return max(2.0, self.share * self.clock.expected_steps)

    @property
    def every_steps(self) -> int:
        """Steps between two updates of the average."""
        return max(1, int(self.horizon_steps / _AVERAGED_PER_HORIZON))

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx % self.every_steps == 0

    def _average(self, averaged: Any, current: Any, num_averaged: Any) -> None:
        with torch.no_grad():
            torch._foreach_lerp_(averaged, current, 1 - (1 - 1 / self.horizon_steps) ** self.every_steps)


class RandomState(Callback):
    """Carries the state of every random generator through a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        version, words, gauss = random.getstate()
        numpy_state = np.random.get_state(legacy=False)
        assert isinstance(numpy_state, dict)
        return {
            "python": [version, list(words), gauss],
            "numpy": [torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)), int(numpy_state["state"]["pos"])],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        version, words, gauss = state_dict["python"]
        random.setstate((version, tuple(words), gauss))
        key, position = state_dict["numpy"]
        np.random.set_state(("MT19937", key.numpy().astype(np.uint32), position, 0, 0.0))
        torch.set_rng_state(state_dict["torch"])
        if state_dict["cuda"]:
            torch.cuda.set_rng_state_all(state_dict["cuda"])


class Saver(Callback):
    """Saves a checkpoint every so many seconds, and when the user interrupts.

    The first Ctrl-C (or SIGTERM) finishes the step, saves and stops; a second one stops at once.

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
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_at = time.monotonic()
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
        due = time.monotonic() - self._saved_at >= self.every_seconds
        due |= self.every_steps is not None and trainer.global_step % self.every_steps == 0
        if due or self.interrupted:
            self.save(trainer)
        if self.interrupted:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_handlers()

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


class ProgressLine(Callback):
    """Shows step, loss, samples per second, share of time waiting for data and time left, on stderr.

    On a terminal this is a live bar, elsewhere a line every `every_seconds`.

    Args:
        name: what is being trained.
        clock: knows the progress.
        batch_size: samples per step.
        every_seconds: time between two lines where there is no terminal.
    """

    def __init__(self, name: str, clock: ProgressClock, *, batch_size: int, every_seconds: float = 20.0) -> None:
        self.name, self.clock, self.batch_size, self.every_seconds = name, clock, batch_size, every_seconds
        self.waiting = 0.0
        self.first_step = 0
        self._bar: Progress | None = None
        self._shown_at = 0.0
        self._batch_ended = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.first_step = trainer.global_step
        self._batch_ended = time.monotonic()
        console = Console(file=sys.stderr)
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, refresh_per_second=2)
            self._task = self._bar.add_task(self.name, total=1.0)
            self._bar.start()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.waiting += time.monotonic() - self._batch_ended

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = self._batch_ended = time.monotonic()
        if now - self._shown_at < (0.5 if self._bar else self.every_seconds):
            return
        self._shown_at = now
        elapsed = max(now - self.clock.started, 1e-6)
        rate = (trainer.global_step - self.first_step) * self.batch_size / elapsed
        loss = trainer.callback_metrics.get("loss")  # None until the first steps are logged
        text = (
            f"{self.name}  step {trainer.global_step:,}  "
            + (f"loss {float(loss):.4f}  " if loss is not None else "")
            + f"{rate:,.0f} samples/s  waiting {self.waiting / elapsed:.0%}"
        )
        progress = max(float(pl_module.progress), 1e-6)  # type: ignore[arg-type]
        if self._bar:
            self._bar.update(self._task, description=text, completed=progress)
        else:
            left = self.clock.seconds * (1 - progress) / progress
            if self.clock.budget_seconds is not None:  # the first steps compile and say little about the others
                left = min(left, max(0.0, self.clock.budget_seconds - self.clock.seconds))
            started = trainer.global_step - self.first_step > 1  # the first step alone would foretell days
            shown = f"{left:,.0f} s left" if started else "starting"
            print(f"{text}  {progress:.0%}  {shown}", file=sys.stderr, flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bar:
            self._bar.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._bar:
            self._bar.stop()
