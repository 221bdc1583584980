"""How fast training goes and how far it is: one line or bar for people, the same figures for the metrics.

Model FLOPs utilization is the share of a GPU's peak that the model's own operations take (Chowdhery et al. 2022, PaLM,
appendix B): forward and backward once, attention as if it were dense, nothing that is computed twice to save memory.
"""

import logging
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops, measure_flops
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from torch import Tensor, nn

from tessera.duration import duration
from tessera.training.callbacks import ProgressClock

_BAR_EVERY_SECONDS = 0.5
# operations per second without sparsity, NVIDIA H200 data sheet; float32 without TF32
_OTHER_PEAKS = {"H200": {torch.bfloat16: 989e12, torch.float32: 67e12}}

_logger = logging.getLogger(__name__)


class _Mark(NamedTuple):
    """Where training was at a moment; the figures are about what lies between two of them."""

    step: int
    seconds: float  # of training; passes over validation batches do not count
    waited: float  # of these, for data


class ProgressLine(Callback):
    """Shows step, loss, rate, share of time waiting for data and time left on stderr, and logs the figures.

    On a terminal this is a live bar, elsewhere a line every `every_seconds`. The metrics receive `<unit>_per_second`,
    `waiting` in [0, 1] and, on GPUs whose peak is known, `mfu` in [0, 1], each over the steps since the row before. Of
    several processes the first one does all this. Put it behind the other callbacks, whose time belongs to the steps.

    Args:
        name: what is being trained.
        clock: knows the progress.
        batch_size: samples per step, over all processes.
        waited: gives the seconds for which training has waited for data so far.
        unit: what is counted, in the plural: images, tokens.
        per_sample: so many units in one sample.
        operations: gives the floating-point operations of training on one sample, see `count_operations`; asked once,
            and only where they can be compared with a peak. None leaves the utilization out.
        every_seconds: time between two lines where there is no terminal.
    """

    def __init__(
        self,
        name: str,
        clock: ProgressClock,
        *,
        batch_size: int,
        waited: Callable[[], float],
        unit: str = "images",
        per_sample: int = 1,
        operations: Callable[[], int] | None = None,
        every_seconds: float = 20.0,
    ) -> None:
        self.name, self.clock, self.batch_size = name, clock, batch_size
        self.waited = waited
        self.unit, self.per_sample, self.operations = unit, per_sample, operations
        self.every_seconds = every_seconds
        self._bar: Progress | None = None
        self._shown_at = 0.0
        self._first_step = 0
        self._ended_at = 0.0  # the latest batch, or the validation after it
        self._paused = 0.0
        # The older of two, so that a line tells of at least as many steps as a row of the metrics.
        self._marks: deque[_Mark] = deque(maxlen=2)
        self._utilization_per_sample = 0.0  # of all devices together, at one sample per second

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._utilization_per_sample = self._share_of_peak(trainer)
        self._first_step = trainer.global_step
        self._paused = 0.0
        self._ended_at = time.monotonic()
        self._marks.clear()
        self._marks.append(self._mark(self._first_step, self._ended_at))
        console = Console(file=sys.stderr)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), console=console, auto_refresh=False
            )
            self._task = self._bar.add_task(self.name, total=1.0)
            self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = self._ended_at = time.monotonic()
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        if step % trainer.log_every_n_steps == 0 and step > self._marks[-1].step:  # type: ignore[attr-defined]
            mark = self._mark(step, now)
            figures = self._figures(self._marks[-1], mark)
            self._marks.append(mark)
            # not by the module's `log`, whose bookkeeping takes longer than all else here
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=step - 1)  # Lightning counts from 0
        if now - self._shown_at >= (_BAR_EVERY_SECONDS if self._bar else self.every_seconds):
            self._shown_at = now
            progress = float(pl_module.progress)  # type: ignore[arg-type]
            self._show(trainer, self._mark(step, now), progress)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # the next batch would seem to have been late
        now = time.monotonic()
        self._paused += now - self._ended_at
        self._ended_at = now

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _mark(self, step: int, now: float) -> _Mark:
        return _Mark(step, now - self._paused, self.waited())

    def _figures(self, since: _Mark, now: _Mark) -> dict[str, float]:
        seconds = max(now.seconds - since.seconds, 1e-9)
        samples_per_second = (now.step - since.step) * self.batch_size / seconds
        figures = {
            f"{self.unit}_per_second": samples_per_second * self.per_sample,
            "waiting": (now.waited - since.waited) / seconds,
        }
        if self._utilization_per_sample:
            figures["mfu"] = samples_per_second * self._utilization_per_sample
        return figures

    def _show(self, trainer: pl.Trainer, mark: _Mark, progress: float) -> None:
        figures = self._figures(self._marks[0], mark)
        metrics = trainer.callback_metrics
        parts = [self.name, f"step {mark.step:,}"]
        if "loss" in metrics:  # from the first row of the metrics on
            parts.append(f"loss {float(metrics['loss']):.4f}")
        parts.append(f"{figures[f'{self.unit}_per_second']:,.0f} {self.unit}/s")
        parts.append(f"waiting {figures['waiting']:.0%}")
        if "mfu" in figures:
            parts.append(f"mfu {figures['mfu']:.0%}")
        for metric, word in (("skipped_steps", "skipped"), ("spikes", "spikes")):
            if metric in metrics:
                parts.append(f"{word} {int(metrics[metric]):,}")
        if mark.step - self._first_step > 1:  # the first step alone would foretell days
            left = f"{duration(self._seconds_left(progress))} left"
        else:
            left = "starting"
        if self._bar:
            self._bar.update(self._task, description="  ".join([*parts, left]), completed=progress, refresh=True)
        else:
            print("  ".join([*parts, f"{progress:.0%}", left]), file=sys.stderr, flush=True)

    def _seconds_left(self, progress: float) -> float:
        progress = max(progress, 1e-6)
        left = self.clock.seconds * (1 - progress) / progress
        if self.clock.budget_seconds is None:
            return left
        # the first steps compile and say little about the others
        return min(left, max(0.0, self.clock.budget_seconds - self.clock.seconds))

    def _share_of_peak(self, trainer: pl.Trainer) -> float:
        """What one sample per second uses of all devices, 0 where that is not known."""
        dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a GPU that is not in Lightning's table
            peak = get_available_flops(trainer.strategy.root_device, dtype) or _other_peak(trainer, dtype)
        if peak is None or self.operations is None:
            return 0.0
        try:
            return self.operations() / (peak * trainer.world_size)
        except RuntimeError as error:  # of an operator that has no meta kernel
            _logger.warning("the operations of a step could not be counted, mfu is left out: %s", error)
            return 0.0

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


def _other_peak(trainer: pl.Trainer, dtype: torch.dtype) -> float | None:
    """The peak of GPUs that Lightning's table has under names that their drivers do not give."""
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peaks.get(dtype) for part, peaks in _OTHER_PEAKS.items() if part in name), None)


def count_operations(build: Callable[[], nn.Module], loss: Callable[[Any], Tensor]) -> int:
    """Floating-point operations of a forward and a backward pass, counted on the meta device: nothing is computed.

    Args:
        build: makes the model.
        loss: takes the model to a scalar; tensors that it makes are on the meta device, too.

    Returns:
        Multiplications and additions, two for each multiply-add.
    """
    with torch.device("meta"):
        model = build()
        return measure_flops(model, lambda: loss(model), lambda value: value)
