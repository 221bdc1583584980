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
from tessera.training.processes import is_first, whole

# The mean of norms spans 1 / (1 - decay) = 50 steps, and is not compared with before it has seen as many.
_DECAY, _LEAST_STEPS = 0.98, 50

_logger = logging.getLogger(__name__)


class UsualNorm:
    """The running geometric mean of gradient norms, and which of them are far above it.

    Norms of one network vary by factors, not by amounts, and one norm of a thousand would lift an arithmetic mean for a
    long time. A spike enters the mean as no more than the limit that it broke: where norms have grown for good, the
    mean follows, and they stop being spikes.

    Args:
        factor: a norm so many times the mean is a spike, above 1.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.steps = 0
        """norms seen so far"""
        self.log_mean = 0.0
        """natural logarithm of the mean"""

    def add(self, norm: float) -> bool:
        """Takes in a finite norm; returns whether it is a spike."""
        if norm == 0.0:  # where nothing is learned; its logarithm would be the end of the mean
            return False
        log_norm, limit = math.log(norm), self.log_mean + math.log(self.factor)
        is_spike = self.steps >= _LEAST_STEPS and log_norm > limit
        self.steps += 1
        share = (1 - _DECAY) / (1 - _DECAY**self.steps)  # of the newest, in a mean over few as over many
        self.log_mean += share * ((limit if is_spike else log_norm) - self.log_mean)
        return is_spike


class GradientGuard(Callback):
    """Clips the gradient, and drops it where it is not finite or, if asked to, where it is a spike.

    A loss of NaN or infinity has a gradient that is not finite; a finite loss may have one, too. The optimizer passes
    over parameters without a gradient, so that such a step changes neither weights nor the optimizer's state. It still
    counts, and the order of the samples goes on as if nothing had happened. On a GPU the check waits for the gradient
    of every step.

    A spike is a norm, before clipping, of `spike_factor` times what is usual. It is counted in any case: spikes that
    become more frequent often foretell that training is about to diverge.

    Parameter groups with an `apart` entry of the same value are clipped, and compared with what is usual, together and
    apart from all others: a discriminator's gradient says nothing about how large the decoder's may be.

    Args:
        clip_norm: largest norm of the gradient; None for no limit.
        stop_after: steps in a row that may be skipped; the run ends with the next one.
        saver: writes the last good state before that.
        spike_factor: how many times the usual norm is a spike, above 1.
        skip_spikes: whether steps with a spike are skipped.
    """

    def __init__(
        self,
        *,
        clip_norm: float | None,
        stop_after: int,
        saver: Saver,
        spike_factor: float = 10.0,
        skip_spikes: bool = False,
    ) -> None:
        self.clip_norm = clip_norm
        self.stop_after = stop_after
        self.saver = saver
        self.skip_spikes = skip_spikes
        self.skipped = 0
        """steps skipped so far, those before a resume included"""
        self.spikes = 0
        """steps with a spike so far, skipped or not, those before a resume included"""
        self.in_a_row = 0
        self._usual: dict[str, UsualNorm] = defaultdict(lambda: UsualNorm(spike_factor))
        self._has_told = False

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "spikes": self.spikes,
            "in_a_row": self.in_a_row,
            "usual": {network: [usual.steps, usual.log_mean] for network, usual in self._usual.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
        self.spikes = state_dict["spikes"]
        self.in_a_row = state_dict["in_a_row"]
        for network, (steps, log_mean) in state_dict["usual"].items():
            self._usual[network].steps, self._usual[network].log_mean = steps, log_mean

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        norms = self._clip(optimizer)
        counted = self.skipped, self.spikes
        reason = None
        if not all(map(math.isfinite, norms.values())):
            reason = "its loss or gradient is not finite"
        elif spike := self._spike(norms):
            self.spikes += 1
            if self.skip_spikes:
                reason = spike
            elif is_first():
                _logger.warning("step %d: %s (%d such steps so far)", trainer.global_step + 1, spike, self.spikes)
        if reason is None:
            self.in_a_row = 0
        else:
            optimizer.zero_grad(set_to_none=True)
            self.skipped += 1
            self.in_a_row += 1
            if is_first():
                step = trainer.global_step + 1
                _logger.warning("step %d skipped: %s (%d skipped so far)", step, reason, self.skipped)
        # what a run counted before it was resumed is told again, or its last metrics would not have it
        if (self.skipped, self.spikes) != counted or (any(counted) and not self._has_told):
            self._has_told = True
            counts = {"skipped_steps": self.skipped, "spikes": self.spikes}
            pl_module.log_dict({name: float(count) for name, count in counts.items() if count})

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.in_a_row > self.stop_after:
            path = self.saver.save(trainer)
            raise UserError(
                f"the loss or its gradient was not finite{', or a spike,' if self.skip_spikes else ''} in "
                f"{self.in_a_row} steps in a row, up to step {trainer.global_step}: "
                f"the last good state is in {path}; a lower optim.learning_rate, or trainer.precision=fp32, is the "
                "usual cure, in another run_dir"
            )

    def _clip(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Clips the gradients; returns the norm that each network's had."""
        by_network: dict[str, list[Tensor]] = defaultdict(list)
        for group in optimizer.param_groups:
            with_gradient = [parameter for parameter in group["params"] if parameter.grad is not None]
            by_network[group.get("apart", "")].extend(with_gradient)
        most = math.inf if self.clip_norm is None else self.clip_norm
        norms = [whole(torch.nn.utils.clip_grad_norm_(parameters, most)) for parameters in by_network.values()]
        return dict(zip(by_network, torch.stack(norms).tolist(), strict=True))  # one look at the device for all

    def _spike(self, norms: dict[str, float]) -> str | None:
        """What stands out about a step, None if nothing does; every norm becomes part of what is usual."""
        found = None
        for network, norm in norms.items():
            usual = math.exp(self._usual[network].log_mean)
            if self._usual[network].add(norm):
                whose = f"the {network}'s gradient" if network else "its gradient"
                found = found or f"{whose} has norm {norm:.3g} where {usual:.3g} is usual"
        return found
