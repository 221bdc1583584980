"""Training runs: killed and resumed runs end where an undisturbed one ends; budgets, interruptions, damage."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from dvae.adversarial import AdversarialConfig
from dvae.lit import DiscreteVAELit
from dvae.model import DiscreteVAE, DiscreteVAEConfig
from dvae.train import ImageBatches, TrainConfig, objective_of
from tessera.data.corpus import load_images
from tessera.data.scenes import ScenesCorpus
from tessera.errors import UserError
from tessera.training.checkpoint import checkpoint_path, checkpoints, newest_valid
from tessera.training.optim import OptimizerConfig
from tessera.training.run import TrainerConfig, TrainingResult, run_training

OPTIM = OptimizerConfig(ema_horizon=0.3)


class Losses(Callback):
    """Collects the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(float(outputs["loss"].detach()))


class StopAt(Callback):
    """Dies like a killed process, but inside this one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def run(
    run_dir: Path,
    *extra: Callback,
    quantizer: str = "fsq",
    optim: OptimizerConfig = OPTIM,
    adversarial: AdversarialConfig | None = None,
    **options: Any,
) -> tuple[TrainingResult, dict, list[float]]:
    torch.manual_seed(0)
    model = DiscreteVAE(
        DiscreteVAEConfig(widths=(8, 16), blocks=(0, 1), levels=(4, 4), quantizer=quantizer, codebook_size=16)  # type: ignore[arg-type]
    )
    losses = Losses()
    config = replace(
        TrainerConfig(max_steps=12, batch_size=4, precision="fp32", device="cpu", checkpoint_every_steps=5), **options
    )
    result = run_training(
        DiscreteVAELit(model, objective_of(TrainConfig(adversarial=adversarial or AdversarialConfig())), optim=optim),
        ImageBatches(load_images(ScenesCorpus(16, image_size=(16, 16))), flip=True),
        name="test",
        config=config,
        optim=optim,
        run_dir=run_dir,
        callbacks=(losses, *extra),
    )
    return result, model.state_dict(), losses.values


@pytest.mark.parametrize("quantizer", ["fsq", "gumbel", "vq"])
def test_a_killed_run_resumes_to_the_same_losses_and_weights(tmp_path: Path, quantizer: str) -> None:
    check_resuming(tmp_path, quantizer=quantizer)


def test_a_run_with_an_adversary_resumes_to_the_same_weights(tmp_path: Path) -> None:
    check_resuming(tmp_path, adversarial=AdversarialConfig(weight=0.1, width=4, layers=2, start=0.1, ramp=0.2))


def check_resuming(tmp_path: Path, **options: Any) -> None:
    whole, expected, losses = run(tmp_path / "whole", **options)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", StopAt(8), **options)
    resumed, weights, later_losses = run(tmp_path / "killed", **options)
    assert resumed.steps == whole.steps == 12
    assert later_losses == losses[5:], "it must go on after the checkpoint of step 5"
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_a_compiled_model_trains_alike_and_goes_on_without_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, expected, losses = run(tmp_path / "whole")
    compiled = []

    def capture(module: torch.nn.Module) -> None:  # the graph, without making code of it, which takes a C++ compiler
        compiled.append(module)
        torch.nn.Module.compile(module, backend="eager")

    with monkeypatch.context() as patched:
        patched.setattr(DiscreteVAE, "compile", capture)
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path / "compiled", StopAt(8), compile=True)
    assert len(compiled) == 1
    resumed, weights, later_losses = run(tmp_path / "compiled")
    assert resumed.steps == whole.steps
    assert later_losses == pytest.approx(losses[5:], rel=1e-4)
    assert weights.keys() == expected.keys()


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    _, expected, _ = run(tmp_path)
    directory = tmp_path / "checkpoints"
    newest = checkpoints(directory)[-1]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    valid, damaged = newest_valid(directory)
    assert [path for path, _ in damaged] == [newest]
    assert valid == checkpoint_path(directory, 10)
    _, weights, losses = run(tmp_path)
    assert len(losses) == 2
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_a_run_without_a_sound_checkpoint_does_not_start_over_by_itself(tmp_path: Path) -> None:
    run(tmp_path)
    for path in checkpoints(tmp_path / "checkpoints"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="no checkpoint in .* is as it was saved, .*step-000000012.ckpt: truncated"):
        run(tmp_path)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path, max_steps=20)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == [
        "step-000000015.ckpt",
        "step-000000020.ckpt",
    ]


def test_the_time_budget_ends_the_schedule(tmp_path: Path) -> None:
    result, _, _ = run(tmp_path, max_steps=100_000, budget_seconds=1.0, checkpoint_every_steps=None)
    assert 1 <= result.steps < 100_000
    assert 1.0 <= result.seconds < 10.0


def test_an_interrupt_saves_and_the_same_command_resumes(tmp_path: Path) -> None:
    class Interrupt(Callback):
        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Interrupt())
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-000000004.ckpt"]
    result, _, losses = run(tmp_path)
    assert result.steps == 12
    assert len(losses) == 8


def test_a_run_killed_after_its_last_step_ends_with_the_averaged_weights(tmp_path: Path) -> None:
    _, expected, _ = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", StopAt(12), checkpoint_every_steps=12)
    result, weights, losses = run(tmp_path / "killed", checkpoint_every_steps=12)
    assert result.steps == 12
    assert losses == []
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_a_run_killed_by_the_system_resumes(tmp_path: Path) -> None:
    """SIGKILL in a process of its own, between two checkpoints."""
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_run import StopAt, run
class Kill(StopAt):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
from pathlib import Path
run(Path({str(tmp_path / "killed")!r}), Kill(7))
"""
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    _, expected, _ = run(tmp_path / "whole")
    _, weights, losses = run(tmp_path / "killed")
    assert len(losses) == 7
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_a_run_that_averages_now_and_then_resumes_exactly(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 60, "checkpoint_every_steps": 25}
    optim = OptimizerConfig(ema_horizon=0.99)  # 59 steps, so every second one
    _, expected, _ = run(tmp_path / "whole", optim=optim, **options)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", StopAt(40), optim=optim, **options)
    _, weights, _ = run(tmp_path / "killed", optim=optim, **options)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_averaging_leaves_integer_buffers_alone(tmp_path: Path) -> None:
    """In floating point, an average of equal integers can come out just below them."""
    lit = Counter()
    run_training(
        lit,
        ImageBatches(load_images(ScenesCorpus(4, image_size=(16, 16)))),
        name="test",
        config=TrainerConfig(max_steps=40, batch_size=2, precision="fp32", device="cpu"),
        optim=OptimizerConfig(ema_horizon=0.7),
        run_dir=tmp_path,
    )
    assert lit.model.get_buffer("radix").tolist() == list(range(1, 400))


class Counter(pl.LightningModule):
    """A model that does nothing but hold integers."""

    progress = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Linear(1, 1)
        self.model.register_buffer("radix", torch.arange(1, 400))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model(torch.ones(1, 1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_checkpoints_load_without_unpickling_code(tmp_path: Path) -> None:
    run(tmp_path)
    for path in checkpoints(tmp_path / "checkpoints"):
        assert "state_dict" in torch.load(path, weights_only=True)


def test_sharding_is_for_models_that_can_be_cut(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="strategy=fsdp shards the prior; the other stages fit into one device"):
        run(tmp_path, strategy="fsdp")


def test_a_batch_that_cannot_be_cut_into_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="multiple of 1 processes x 3 parts .*; got 4"):
        run(tmp_path, accumulate=3)


def test_accumulated_parts_make_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim": OptimizerConfig(hidden="adamw", learning_rate=1e-3)}
    _, expected, losses = run(tmp_path / "whole", **options)
    result, weights, parts = run(tmp_path / "parts", accumulate=2, **options)
    assert result.steps == 12 and len(parts) == 24
    sums = [sum(parts[at : at + 2]) for at in range(0, 24, 2)]  # each is divided by their number
    assert sums == pytest.approx(losses, abs=1e-5)
    assert all(torch.allclose(weights[key], expected[key], atol=1e-5) for key in expected)


def test_a_killed_run_of_accumulated_parts_resumes_to_the_same_weights(tmp_path: Path) -> None:
    _, expected, losses = run(tmp_path / "whole", accumulate=2)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", StopAt(8), accumulate=2)
    _, weights, later_losses = run(tmp_path / "killed", accumulate=2)
    assert later_losses == losses[10:]
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_wandb_is_an_option_that_nobody_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(**settings: Any) -> None:
        raise ModuleNotFoundError("No module named 'wandb'")

    monkeypatch.setattr("tessera.training.run.WandbLogger", missing)
    run(tmp_path / "without", max_steps=1)
    with pytest.raises(UserError, match="needs the wandb package: `pip install wandb`, or leave it out"):
        run(tmp_path / "with", max_steps=1, wandb_project="mosaics")
