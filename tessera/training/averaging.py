"""The exponential average of the weights: what is validated, shown and exported.

Lightning's own callback copies whole modules, which keeps weights that are shared out among processes from being so.
"""

from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from tessera.training.callbacks import ProgressClock
from tessera.training.processes import like, part_here, whole

_AVERAGED_PER_HORIZON = 24


class HorizonAveraging(Callback):
    """Averages the parameters of `module.model` over a share of training, however many steps the clock lets that be.

    Short runs are not dominated by their start, nor long ones by noise. Averaging walks over all weights, which on a
    CPU took 6 of the 110 ms of a step of a small prior; a few dozen times per horizon average as well as every step.
    Buffers are left alone.

    Args:
        share: of training, above 0, over which weights are averaged.
        clock: knows how many steps there will be.
    """

    def __init__(self, share: float, clock: ProgressClock) -> None:
        self.share, self.clock = share, clock
        self._averages: dict[str, Tensor] = {}
        self._restored: dict[str, Tensor] = {}
        self._updated_at = 0  # steps made when the average was last updated

    @property
    def horizon_steps(self) -> float:
        """Steps over which the weight of a past state falls to 1/e."""
        return max(2.0, self.share * self.clock.expected_steps)

    @property
    def every_steps(self) -> int:
        """Steps between two updates of the average."""
        return max(1, int(self.horizon_steps / _AVERAGED_PER_HORIZON))

    def state_dict(self) -> dict[str, Any]:
        averages = {name: whole(average).cpu() for name, average in self._averages.items()}
        return {"updated_at": self._updated_at, "averages": averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updated_at = state_dict["updated_at"]
        self._restored = state_dict["averages"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not when they are loaded: the parameters have not got their device and their parts by then.
        for name, parameter in _parameters(pl_module).items():
            if name in self._restored:
                self._averages[name] = like(self._restored[name].to(parameter.device, copy=True), parameter)
        self._restored = {}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps = trainer.global_step
        if steps == self._updated_at or (steps - 1) % self.every_steps:
            return
        self._updated_at = steps
        parameters = _parameters(pl_module)
        if not self._averages:
            self._averages = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            return
        weight = 1 - (1 - 1 / self.horizon_steps) ** self.every_steps
        averages = [part_here(self._averages[name]) for name in parameters]
        torch._foreach_lerp_(averages, [part_here(parameter) for parameter in parameters.values()], weight)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap(pl_module)

    @torch.no_grad()
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put(pl_module)  # after the last checkpoint, which holds both

    @torch.no_grad()
    def put_restored(self, pl_module: pl.LightningModule) -> None:
        """Copies averages that were loaded into the module, for a run that was over before it was resumed."""
        for name, parameter in _parameters(pl_module).items():
            if name in self._restored:
                self._averages[name] = like(self._restored[name].to(parameter.device, copy=True), parameter)
        self._put(pl_module)

    def _put(self, pl_module: pl.LightningModule) -> None:
        for name, parameter in _parameters(pl_module).items():
            if name in self._averages:
                part_here(parameter).copy_(part_here(self._averages[name]))

    @torch.no_grad()
    def _swap(self, pl_module: pl.LightningModule) -> None:
        for name, parameter in _parameters(pl_module).items():
            if name in self._averages:
                current = part_here(parameter).clone()
                part_here(parameter).copy_(part_here(self._averages[name]))
                part_here(self._averages[name]).copy_(current)


def _parameters(pl_module: pl.LightningModule) -> dict[str, nn.Parameter]:
    model = cast(nn.Module, pl_module.model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a pass without gradients, what it put together is still lying there
    return dict(model.named_parameters())
