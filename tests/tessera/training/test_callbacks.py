"""Weight averaging over a share of training."""

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from tessera.training.callbacks import HorizonAveraging, ProgressClock
from tessera.training.optim import OptimizerConfig

CPU = torch.device("cpu")


class OneWeight(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64), requires_grad=False)


def clock_of(max_steps: int, *, budget_seconds: float | None = None) -> ProgressClock:
    return ProgressClock(OptimizerConfig(), max_steps=max_steps, budget_seconds=budget_seconds)


def trainer_at(step: int) -> Any:
    return SimpleNamespace(global_step=step, optimizers=[])


@pytest.mark.parametrize("share, every", [(0.1, 1), (0.5, 2)])
def test_the_average_is_that_of_a_plain_loop(share: float, every: int) -> None:
    module = OneWeight()
    averaging = HorizonAveraging(share, clock_of(120), device=CPU)
    averaging.setup(trainer_at(0), module, "fit")
    for step in range(120):
        module.weight.add_(1)
        averaging.on_train_batch_end(trainer_at(step + 1), module, None, None, step)
    averaging.on_train_end(trainer_at(120), module)

    expected = 1.0  # the first update copies
    for step in range(every, 120, every):
        expected += (1 - (1 - 1 / (share * 120)) ** every) * (step + 1 - expected)
    assert float(module.weight) == pytest.approx(expected)


def test_the_horizon_follows_the_clock_where_it_ends_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clock_of(1_000_000, budget_seconds=100.0)
    averaging = HorizonAveraging(0.03, clock, device=CPU)
    assert averaging.horizon_steps == 30_000
    monkeypatch.setattr(ProgressClock, "seconds", 25.0)
    clock.on_train_batch_start(trainer_at(1500), OneWeight(), None, 0)
    assert clock.expected_steps == 6000
    assert averaging.horizon_steps == 180 and averaging.every_steps == 7
