"""Steps without a finite gradient: they change nothing, are counted, and too many in a row end the run, saved.
Spikes of its norm are counted, and skipped where that is asked for."""

import logging
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from tessera.data.loader import Batch
from tessera.data.order import SampleKey
from tessera.errors import UserError
from tessera.training.callbacks import Saver
from tessera.training.checkpoint import checkpoints
from tessera.training.guard import GradientGuard, UsualNorm
from tessera.training.metrics import read_metrics
from tessera.training.optim import OptimizerConfig, build_optimizer
from tessera.training.run import TrainerConfig, TrainingResult, run_training

OPTIM = OptimizerConfig(warmup=0.0, ema_horizon=0.0, clip_norm=0.5)


class Ones:
    """The same sample for ever."""

    def __len__(self) -> int:
        return 4

    def batch(self, keys: Sequence[SampleKey]) -> Batch:
        return {"x": torch.ones(len(keys), 3)}


class Lit(pl.LightningModule):
    """A regression whose loss a function of the step may spoil."""

    progress = 0.0

    def __init__(self, spoiled: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = nn.Linear(3, 1)
        self.spoiled = spoiled
        self.weights: list[Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.weights.append(self.model.weight.detach().clone())
        loss = self.spoiled(self.global_step, self.model(batch["x"]).square().mean())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model, OPTIM)


def run(
    run_dir: Path, lit: Lit, *, steps: int = 8, stop_after: int = 3, checkpoint_every_steps: int | None = 1
) -> TrainingResult:
    config = TrainerConfig(
        max_steps=steps,
        batch_size=2,
        device="cpu",
        precision="fp32",
        stop_after_skipped=stop_after,
        checkpoint_every_steps=checkpoint_every_steps,
        log_every_steps=1,
    )
    return run_training(lit, Ones(), name="test", config=config, optim=OPTIM, run_dir=run_dir)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_skips_its_step_and_is_counted(
    tmp_path: Path, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    lit = Lit(lambda step, loss: loss * value if step in (2, 3, 5) else loss)
    with caplog.at_level(logging.WARNING):
        result = run(tmp_path, lit)
    assert result.steps == 8
    unchanged = [torch.equal(before, after) for before, after in zip(lit.weights, lit.weights[1:], strict=False)]
    assert [step for step, same in enumerate(unchanged) if same] == [2, 3, 5]
    assert torch.isfinite(lit.model.weight).all()
    counted = dict(read_metrics(tmp_path)["skipped_steps"])
    assert [counted.get(step) for step in range(8)] == [None, None, 1, 2, 2, 3, 3, 3]
    assert "step 3 skipped: its loss or gradient is not finite (1 skipped so far)" in caplog.text


def test_a_finite_loss_with_an_infinite_gradient_is_skipped_too(tmp_path: Path) -> None:
    lit = Lit(lambda step, loss: (0 * loss).sqrt() if step == 1 else loss)
    run(tmp_path, lit, steps=3)
    assert torch.equal(lit.weights[1], lit.weights[2])
    assert not torch.equal(lit.weights[0], lit.weights[1])


def test_too_many_in_a_row_end_the_run_with_the_last_good_state_saved(tmp_path: Path) -> None:
    lit = Lit(lambda step, loss: loss * torch.nan if step >= 4 else loss)
    with pytest.raises(UserError, match=r"4 steps in a row, up to step 8: .*step-000000008.ckpt; a lower"):
        run(tmp_path, lit, steps=50, checkpoint_every_steps=None)
    (saved,) = checkpoints(tmp_path / "checkpoints")
    weight = torch.load(saved, weights_only=True)["state_dict"]["model.weight"]
    assert torch.equal(weight, lit.weights[4])
    assert torch.isfinite(weight).all()
    mended = Lit(lambda step, loss: loss)
    assert run(tmp_path, mended, steps=12, checkpoint_every_steps=None).steps == 12
    assert torch.equal(mended.weights[0], weight)
    assert len(mended.weights) == 4, "it goes on behind the steps that failed"


def test_without_a_limit_nothing_is_clipped() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3e4, 4e4])
    optimizer = build_optimizer(nn.ParameterList([parameter]), OPTIM)
    guard = GradientGuard(clip_norm=None, stop_after=0, saver=Saver(Path("nowhere"), every_seconds=1e9))
    guard.on_before_optimizer_step(None, None, optimizer)  # type: ignore[arg-type]
    torch.testing.assert_close(parameter.grad, torch.tensor([3e4, 4e4]))


def test_networks_that_learn_apart_are_clipped_apart() -> None:
    model, judge = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    optimizer = build_optimizer(model, OPTIM)
    optimizer.add_network(list(judge.parameters()), rate=1.0, betas=(0.5, 0.9))
    model.weight.grad, judge.weight.grad = torch.tensor([[0.3, 0.0]]), torch.tensor([[300.0, 400.0]])
    guard = GradientGuard(clip_norm=0.5, stop_after=0, saver=Saver(Path("nowhere"), every_seconds=1e9))
    guard.on_before_optimizer_step(None, None, optimizer)  # type: ignore[arg-type]
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.3, 0.0]]))
    torch.testing.assert_close(judge.weight.grad, torch.tensor([[0.3, 0.4]]))


def test_a_good_step_starts_the_count_in_a_row_again(tmp_path: Path) -> None:
    lit = Lit(lambda step, loss: loss * torch.nan if step % 4 else loss)
    assert run(tmp_path, lit, steps=16, stop_after=3).steps == 16


def test_the_gradient_is_clipped(tmp_path: Path) -> None:
    norms: list[float] = []

    class Watching(Lit):
        def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
            gradients = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
            if gradients:
                norms.append(float(torch.cat(gradients).norm()))

    run(tmp_path, Watching(lambda step, loss: 1e4 * loss), steps=4)
    assert norms and max(norms) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("seed", range(2))
def test_whichever_steps_have_no_finite_gradient_these_and_no_others_are_skipped(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    bad = {step: draw.choice([torch.nan, torch.inf, -torch.inf]) for step in draw.sample(range(40), 12)}
    lit = Lit(lambda step, loss: loss * bad[step] if step in bad else loss)
    result = run(tmp_path, lit, steps=40, stop_after=12, checkpoint_every_steps=None)
    weights = [*lit.weights, lit.model.weight.detach()]
    unchanged = [step for step, pair in enumerate(zip(weights, weights[1:], strict=False)) if torch.equal(*pair)]
    assert unchanged == sorted(bad)
    assert result.metrics["skipped_steps"] == 12


def guard_of(**options: Any) -> GradientGuard:
    saver = Saver(Path("nowhere"), every_seconds=1e9)
    return GradientGuard(clip_norm=None, stop_after=3, saver=saver, **options)


class Steps:
    """Hands a guard gradients of given norms and keeps what it logs."""

    def __init__(self, guard: GradientGuard) -> None:
        self.guard = guard
        self.parameter = nn.Parameter(torch.zeros(1))
        self.optimizer = build_optimizer(nn.ParameterList([self.parameter]), OPTIM)
        self.logged: list[dict[str, float]] = []
        self.global_step = 0

    def log_dict(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def passes(self, norm: float) -> bool:
        """Whether the gradient is left to the optimizer."""
        self.parameter.grad = torch.tensor([norm])
        self.guard.on_before_optimizer_step(self, self, self.optimizer)  # type: ignore[arg-type]
        self.global_step += 1
        return self.parameter.grad is not None


def test_a_spike_is_counted_and_trained_on_unless_it_shall_be_skipped(caplog: pytest.LogCaptureFixture) -> None:
    counting, skipping = Steps(guard_of()), Steps(guard_of(skip_spikes=True))
    for norm in [1.0, 2.0, 4.0] * 20:  # 2 on geometric average
        assert counting.passes(norm) and skipping.passes(norm)
    with caplog.at_level(logging.WARNING):
        assert counting.passes(21.0)
        assert not skipping.passes(21.0)
    assert counting.logged == [{"spikes": 1.0}]
    assert skipping.logged == [{"skipped_steps": 1.0, "spikes": 1.0}]
    assert "step 61: its gradient has norm 21 where 2" in caplog.text
    assert "step 61 skipped: its gradient has norm 21 where 2" in caplog.text
    assert counting.passes(18.0) and skipping.passes(18.0), "less than ten times what is usual"
    assert counting.guard.spikes == skipping.guard.spikes == 1
    assert skipping.guard.in_a_row == 0


def test_nothing_is_a_spike_before_the_usual_norm_is_known() -> None:
    steps = Steps(guard_of(skip_spikes=True))
    assert all(steps.passes(norm) for norm in (1e-3, 1e3) * 10)


def test_norms_that_have_grown_for_good_stop_being_spikes() -> None:
    usual = UsualNorm(10.0)
    assert not any(usual.add(1.0) for _ in range(100))
    spikes = [usual.add(50.0) for _ in range(100)]
    assert all(spikes[:10]) and not any(spikes[50:])


def test_a_norm_of_zero_tells_nothing_of_what_is_usual() -> None:
    usual = UsualNorm(10.0)
    assert not any(usual.add(norm) for norm in [1.0, 0.0] * 60)
    assert math.exp(usual.log_mean) == pytest.approx(1.0)


def test_spikes_of_networks_that_learn_apart_are_found_apart(caplog: pytest.LogCaptureFixture) -> None:
    steps = Steps(guard_of())
    judge = nn.Parameter(torch.zeros(1))
    steps.optimizer.add_network([judge], rate=1.0, betas=(0.5, 0.9))
    for _ in range(60):
        judge.grad = torch.tensor([1000.0])
        steps.passes(1.0)
    assert steps.guard.spikes == 0
    judge.grad = torch.tensor([1000.0])
    with caplog.at_level(logging.WARNING):
        steps.passes(1000.0)
    assert steps.guard.spikes == 1 and "its gradient has norm 1e+03 where 1 is usual" in caplog.text
    judge.grad = torch.tensor([1e5])
    with caplog.at_level(logging.WARNING):
        steps.passes(1.0)
    assert steps.guard.spikes == 2 and "the adversary's gradient has norm 1e+05" in caplog.text


def test_a_guard_goes_on_from_its_state_as_if_nothing_had_happened() -> None:
    draw = random.Random(0)
    norms = [draw.lognormvariate(0, 1.5) for _ in range(200)]
    whole = Steps(guard_of(skip_spikes=True))
    before = [whole.passes(norm) for norm in norms[:99]]
    assert not whole.passes(math.nan)
    resumed = Steps(guard_of(skip_spikes=True))
    resumed.guard.load_state_dict(whole.guard.state_dict())
    after = [whole.passes(norm) for norm in norms[99:]]
    assert [resumed.passes(norm) for norm in norms[99:]] == after
    assert not all(before) and not all(after)
    assert resumed.guard.state_dict() == whole.guard.state_dict()


def test_what_was_counted_before_a_resume_is_told_after_it() -> None:
    steps = Steps(guard_of())
    steps.passes(math.inf)
    resumed = Steps(guard_of())
    resumed.guard.load_state_dict(steps.guard.state_dict())
    assert resumed.passes(1.0) and resumed.passes(1.0)
    assert resumed.logged == [{"skipped_steps": 1.0}]


def test_too_many_spikes_in_a_row_end_the_run_too(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(guard_of(skip_spikes=True))
    monkeypatch.setattr(steps.guard.saver, "save", lambda trainer: Path(f"step-{trainer.global_step}.ckpt"))

    def ends(norm: float) -> None:
        steps.passes(norm)
        steps.guard.on_train_batch_end(steps, steps, None, None, 0)  # type: ignore[arg-type]

    for norm in [1.0] * 60 + [1e3, 1e4, 1e5]:
        ends(norm)
    with pytest.raises(UserError, match=r"not finite, or a spike, in 4 steps in a row, up to step 64: .*step-64.ckpt"):
        ends(1e6)
