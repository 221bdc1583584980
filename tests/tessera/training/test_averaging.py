"""Weight averaging over a share of training."""

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from tessera.training.averaging import HorizonAveraging
from tessera.training.callbacks import ProgressClock
from tessera.training.optim import OptimizerConfig


class OneWeight(pl.LightningModule):
    """A module around a model of one number and one integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64), requires_grad=False)
        self.model.register_buffer("radix", torch.tensor([200]))

    @property
    def weight(self) -> Any:
        return self.model.weight


def clock_of(max_steps: int, *, budget_seconds: float | None = None) -> ProgressClock:
    return ProgressClock(OptimizerConfig(), max_steps=max_steps, budget_seconds=budget_seconds)


def trainer_at(step: int) -> Any:
    return SimpleNamespace(global_step=step, optimizers=[])


def advance(module: OneWeight, averaging: HorizonAveraging, steps: range) -> None:
    for step in steps:
        module.weight.add_(1)
        averaging.on_train_batch_end(trainer_at(step + 1), module, None, None, step)


@pytest.mark.parametrize("share, every", [(0.1, 1), (0.5, 2)])
def test_the_average_is_that_of_a_plain_loop(share: float, every: int) -> None:
    module = OneWeight()
    averaging = HorizonAveraging(share, clock_of(120))
    averaging.on_train_start(trainer_at(0), module)
    advance(module, averaging, range(120))
    averaging.on_fit_end(trainer_at(120), module)

    expected = 1.0  # the first update copies
    for step in range(every, 120, every):
        expected += (1 - (1 - 1 / (share * 120)) ** every) * (step + 1 - expected)
    assert float(module.weight) == pytest.approx(expected)
    assert module.model.get_buffer("radix").tolist() == [200]


def test_a_resumed_average_goes_on(tmp_path: Any) -> None:
    whole, module = OneWeight(), OneWeight()
    expected = HorizonAveraging(0.5, clock_of(120))
    advance(whole, expected, range(120))
    first = HorizonAveraging(0.5, clock_of(120))
    advance(module, first, range(51))
    torch.save(first.state_dict(), tmp_path / "state")
    resumed = HorizonAveraging(0.5, clock_of(120))
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    resumed.on_train_start(trainer_at(51), module)
    advance(module, resumed, range(51, 120))
    for averaging, trained in ((expected, whole), (resumed, module)):
        averaging.on_fit_end(trainer_at(120), trained)
    assert torch.equal(module.weight, whole.weight)


def test_validation_sees_the_average_and_training_does_not() -> None:
    module = OneWeight()
    averaging = HorizonAveraging(0.5, clock_of(120))
    advance(module, averaging, range(60))
    averaging.on_validation_start(trainer_at(60), module)
    assert float(module.weight) < 60
    averaging.on_validation_end(trainer_at(60), module)
    assert float(module.weight) == 60


def test_parts_of_a_batch_are_no_steps() -> None:
    module = OneWeight()
    averaging = HorizonAveraging(0.1, clock_of(120))
    advance(module, averaging, range(2))
    before = averaging.state_dict()["averages"]["weight"].clone()
    averaging.on_train_batch_end(trainer_at(2), module, None, None, 0)
    assert torch.equal(averaging.state_dict()["averages"]["weight"], before)


def test_the_horizon_follows_the_clock_where_it_ends_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clock_of(1_000_000, budget_seconds=100.0)
    averaging = HorizonAveraging(0.03, clock)
    assert averaging.horizon_steps == 30_000
    monkeypatch.setattr(ProgressClock, "seconds", 25.0)
    clock.on_train_batch_start(trainer_at(1500), OneWeight(), None, 0)
    assert clock.expected_steps == 6000
    assert averaging.horizon_steps == 180 and averaging.every_steps == 7
