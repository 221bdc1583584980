"""The progress line: its figures are those of training alone, and reach the metrics and the user."""

import io
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from tessera.data.loader import Batch
from tessera.data.order import SampleKey
from tessera.training.callbacks import ProgressClock
from tessera.training.metrics import read_metrics
from tessera.training.optim import OptimizerConfig
from tessera.training.progress import ProgressLine, count_operations
from tessera.training.run import TrainerConfig, run_training


class Training:
    """Calls a progress line as Lightning would, on a clock of its own; the line's own work takes no time.

    Each step waits 1 s for its data and computes for 3 s.
    """

    progress = 0.5

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, rank: int = 0, **options: Any) -> None:
        self.now, self.waited = 1000.0, 0.0
        monkeypatch.setattr("tessera.training.progress.time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(ProgressClock, "seconds", property(lambda clock: self.now - 1000.0))
        clock = ProgressClock(OptimizerConfig(), max_steps=1000, budget_seconds=options.pop("budget_seconds", None))
        self.trainer: Any = SimpleNamespace(
            global_step=0,
            is_global_zero=rank == 0,
            log_every_n_steps=2,
            callback_metrics={},
            precision="bf16-mixed",
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            world_size=2,
            loggers=[self],
        )
        self.logged: list[dict[str, float]] = []
        self.line = cast(Any, ProgressLine("test", clock, batch_size=8, waited=lambda: self.waited, **options))
        self.line.on_train_start(self.trainer, self)

    def log_metrics(self, figures: dict[str, float], step: int) -> None:
        assert step == self.trainer.global_step - 1
        self.logged.append(figures)

    def batch(self, *, ends_step: bool = True) -> None:
        self.waited += 1
        self.now += 4
        self.trainer.global_step += ends_step
        self.line.on_train_batch_end(self.trainer, self, None, None, 0)

    def validate(self, seconds: float) -> None:
        self.now += seconds
        self.line.on_validation_end(self.trainer, self)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.batch()


def test_rate_and_waiting_are_logged_every_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(monkeypatch, unit="tokens", per_sample=10)
    training.steps(5)
    assert training.logged == [{"tokens_per_second": 20.0, "waiting": 0.25}] * 2


def test_validation_is_neither_training_nor_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(monkeypatch)
    for _ in range(4):
        training.batch()
        training.validate(100.0)
    assert training.logged == [{"images_per_second": 2.0, "waiting": 0.25}] * 2


def test_a_batch_in_parts_is_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(monkeypatch)
    for _ in range(5):
        training.batch(ends_step=False)
        training.batch(ends_step=True)
    assert training.logged == [{"images_per_second": 1.0, "waiting": 0.25}] * 2


def test_figures_are_about_the_steps_since_the_row_before(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(monkeypatch)
    training.now += 92.0  # compiling
    training.steps(4)
    assert [row["images_per_second"] for row in training.logged] == [16 / 100, 2.0]


def test_the_line_tells_what_there_is_to_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(monkeypatch, unit="tokens", per_sample=1000, every_seconds=4.0)
    training.batch()
    assert capsys.readouterr().err == "test  step 1  2,000 tokens/s  waiting 25%  50%  starting\n"
    training.trainer.callback_metrics = {
        "loss": torch.tensor(1.25),
        "skipped_steps": torch.tensor(1200.0),
        "spikes": torch.tensor(3.0),
    }
    training.batch()
    assert capsys.readouterr().err == (
        "test  step 2  loss 1.2500  2,000 tokens/s  waiting 25%  skipped 1,200  spikes 3  50%  8 s left\n"
    )


def test_lines_come_every_so_many_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    training = Training(monkeypatch, every_seconds=20.0)
    training.steps(11)  # the first at once, then after 20 and 40 seconds
    assert capsys.readouterr().err.count("\n") == 3


def test_no_more_time_is_left_than_the_budget_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(monkeypatch, every_seconds=4.0, budget_seconds=110.0)
    training.now += 92.0
    training.steps(2)
    assert capsys.readouterr().err.endswith("10 s left\n")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        "tessera.training.progress.Console", lambda file: Console(file=screen, force_terminal=True, width=120)
    )
    training = Training(monkeypatch)
    training.steps(3)
    training.line.on_train_end(training.trainer, training)
    assert "step 3  2 images/s  waiting 25%  12 s left" in screen.getvalue() and "50%" in screen.getvalue()
    assert capsys.readouterr().err == ""


def test_only_the_first_process_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    training = Training(monkeypatch, rank=1, every_seconds=0.0)
    training.steps(4)
    training.validate(1.0)
    assert training.logged == [] and capsys.readouterr().err == ""


def test_a_gpu_s_utilization_is_that_of_all_devices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks = {torch.bfloat16: 1000, torch.float32: 1}
    monkeypatch.setattr("tessera.training.progress.get_available_flops", lambda device, dtype: peaks[dtype])
    training = Training(monkeypatch, operations=lambda: 400, every_seconds=4.0)
    training.steps(2)
    (row,) = training.logged
    assert row["mfu"] == pytest.approx(2.0 * 400 / (2 * 1000))
    assert "mfu 40%" in capsys.readouterr().err


def test_operations_are_not_counted_where_the_peak_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(device: torch.device, dtype: torch.dtype) -> None:
        warnings.warn("FLOPs not found for 'NVIDIA Abacus'", stacklevel=1)  # would be an error here

    def operations() -> int:
        raise AssertionError("counted in vain")

    on_cpu = Training(monkeypatch, operations=operations)
    monkeypatch.setattr("tessera.training.progress.get_available_flops", unknown)
    on_abacus = Training(monkeypatch, operations=operations)
    for training in (on_cpu, on_abacus):
        training.steps(2)
        assert "mfu" not in training.logged[0]


def test_a_model_that_cannot_be_counted_trains_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def operations() -> int:
        return count_operations(lambda: nn.Linear(1, 1), lambda model: torch.autocast("meta"))  # type: ignore[arg-type]

    monkeypatch.setattr("tessera.training.progress.get_available_flops", lambda device, dtype: 1000)
    with caplog.at_level(logging.WARNING):
        training = Training(monkeypatch, operations=operations)
    training.steps(2)
    assert "mfu" not in training.logged[0]
    assert "could not be counted, mfu is left out" in caplog.text


def test_operations_of_both_passes_are_counted_and_nothing_is_computed() -> None:
    before = torch.get_rng_state()

    def loss(model: nn.Module) -> Tensor:
        return model(torch.rand(5, 40_000)).sum()

    # forward, and backward to both weights and to what lies between
    expected = 2 * 5 * (40_000 * 30_000 + 30_000 * 2) + 2 * 5 * (40_000 * 30_000 + 2 * 30_000 * 2)
    assert count_operations(lambda: nn.Sequential(nn.Linear(40_000, 30_000), nn.Linear(30_000, 2)), loss) == expected
    assert torch.equal(torch.get_rng_state(), before), "training would not be the same with and without"


class Ones:
    """The same sample for ever."""

    def __len__(self) -> int:
        return 4

    def batch(self, keys: Sequence[SampleKey]) -> Batch:
        return {"x": torch.ones(len(keys), 3)}


class Lit(pl.LightningModule):
    """A regression that logs its loss."""

    progress = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(3, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.model(batch["x"]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_run_has_the_figures_in_its_metrics(tmp_path: Path) -> None:
    config = TrainerConfig(max_steps=6, batch_size=4, precision="fp32", device="cpu", log_every_steps=2)
    run_training(Lit(), Ones(), name="test", config=config, optim=OptimizerConfig(ema_horizon=0.0), run_dir=tmp_path)
    metrics = read_metrics(tmp_path)
    rates = metrics["images_per_second"]
    assert [step for step, _ in rates] == [step for step, _ in metrics["loss"]] == [1, 3, 5]
    assert all(rate > 0 for _, rate in rates)
    assert all(0 <= share <= 1 for _, share in metrics["waiting"])
    assert "mfu" not in metrics
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = events.Tags()["scalars"]
    assert isinstance(scalars, list) and {"loss", "images_per_second", "waiting"} <= set(scalars)
