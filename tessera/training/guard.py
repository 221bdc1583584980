"""Steps that would ruin the weights are skipped, counted and reported; too many in a row end the run, saved."""

import logging
import math
from collections import defaultdict
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from tessera.errors import UserError
from tessera.training.callbacks import Saver

_logger = logging.getLogger(__name__)


class GradientGuard(Callback):
    """Clips the gradient, and drops it where it is not finite.

    A loss of NaN or infinity has such a gradient; a finite loss may have one, too. The optimizer passes over parameters
    without a gradient, so that such a step changes neither weights nor the optimizer's state. It still counts, and the
    order of the samples goes on as if nothing had happened. On a GPU the check waits for the gradient of every step.

    Parameter groups with an `apart` entry of the same value are clipped together and apart from all others: a
    discriminator's gradient says nothing about how large the decoder's may be.

    Args:
        clip_norm: largest norm of the gradient; None for no limit.
        stop_after: steps in a row that may be skipped; the run ends with the next one.
        saver: writes the last good state before that.
    """

    def __init__(self, *, clip_norm: float | None, stop_after: int, saver: Saver) -> None:
        self.clip_norm = clip_norm
        self.stop_after = stop_after
        self.saver = saver
        self.skipped = 0
        """steps skipped so far, those before a resume included"""
        self.in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped = state_dict["skipped"]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        by_network: dict[str, list[Tensor]] = defaultdict(list)
        for group in optimizer.param_groups:
            with_gradient = [parameter for parameter in group["params"] if parameter.grad is not None]
            by_network[group.get("apart", "")].extend(with_gradient)
        most = math.inf if self.clip_norm is None else self.clip_norm
        norms = [torch.nn.utils.clip_grad_norm_(parameters, most) for parameters in by_network.values()]
        if bool(torch.isfinite(torch.stack(norms)).all()):
            self.in_a_row = 0
            return
        optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        self.in_a_row += 1
        pl_module.log("skipped_steps", float(self.skipped))
        _logger.warning(
            "step %d skipped: its loss or gradient is not finite (%d skipped so far)",
            trainer.global_step + 1,
            self.skipped,
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.in_a_row > self.stop_after:
            path = self.saver.save(trainer)
            raise UserError(
                f"the loss was not finite in {self.in_a_row} steps in a row, up to step {trainer.global_step}: "
                f"the last good state is in {path}; a lower optim.learning_rate, or trainer.precision=fp32, is the "
                "usual cure, in another run_dir"
            )
