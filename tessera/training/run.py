"""Runs one stage of training under Lightning: one function for every stage, on one machine or many."""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from tessera.data.loader import Batch, BatchSource, KeyedLoader
from tessera.data.order import mix
from tessera.errors import UserError
from tessera.precision import resolve_device, resolve_precision
from tessera.training.averaging import HorizonAveraging
from tessera.training.callbacks import FullPrecisionUpdates, ProgressClock, RandomState, Saver
from tessera.training.checkpoint import AtomicCheckpointIO, checkpoint_step, newest_valid
from tessera.training.guard import GradientGuard
from tessera.training.memory import reuse_freed_memory
from tessera.training.metrics import METRICS_DIR, metrics_version
from tessera.training.optim import OptimizerConfig
from tessera.training.processes import Processes, join, on_first
from tessera.training.progress import ProgressLine


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long and on what to train."""

    max_steps: int = 1000
    """optimizer steps"""
    budget_seconds: float | None = None
    """training time at which the schedule ends even if max_steps is not reached; null for no limit"""
    batch_size: int = 64
    """samples per optimizer step, over all processes"""
    seed: int = 0
    """keys the order of samples and every random choice"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """how the processes that torchrun or SLURM starts share the work: ddp, all weights in each of them (auto is the
    same), or fsdp, each holds a part of weights and optimizer state (the prior only); one process needs neither"""
    accumulate: int = 1
    """parts, one after the other, into which each process cuts its share of a batch; more of them need less memory"""
    checkpoint_activations: bool = False
    """compute the activations of each block of the prior once more on the way back instead of keeping them"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 where the hardware multiplies it, else fp32; auto decides and says so"""
    compile: bool = False
    """compile the inner model with torch.compile (needs a C++ compiler on CPUs)"""
    num_workers: int = 0
    """data loading processes"""
    log_every_steps: int = 10
    """steps between two rows of the metrics"""
    validate_every_steps: int = 200
    """steps between two passes over the validation batches"""
    checkpoint_every_seconds: float = 60.0
    """time between two checkpoints"""
    checkpoint_every_steps: int | None = None
    """steps between two checkpoints, in addition; null for time alone"""
    spike_factor: float = 10.0
    """a gradient so many times as large as is usual counts as a spike"""
    skip_spikes: bool = False
    """skip steps with such a gradient like those that are not finite"""
    stop_after_skipped: int = 20
    """steps in a row with a loss or gradient that is not finite after which training gives up; each one is skipped"""
    wandb_project: str | None = None
    """also log to this project of Weights & Biases; needs the wandb package"""

    def __post_init__(self) -> None:
        if self.stop_after_skipped < 0:
            raise UserError(f"trainer.stop_after_skipped must be at least 0; got {self.stop_after_skipped}")
        for name in ("max_steps", "batch_size", "accumulate", "log_every_steps", "validate_every_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"trainer.{name} must be at least 1; got {getattr(self, name)}")
        if self.num_workers < 0 or self.checkpoint_every_seconds < 0:
            raise UserError(
                "trainer.num_workers and trainer.checkpoint_every_seconds must be at least 0; got "
                f"{self.num_workers} and {self.checkpoint_every_seconds}"
            )
        if self.checkpoint_every_steps is not None and self.checkpoint_every_steps < 1:
            raise UserError(
                f"trainer.checkpoint_every_steps must be at least 1, or null; got {self.checkpoint_every_steps}"
            )
        if self.budget_seconds is not None and not self.budget_seconds > 0:
            raise UserError(f"trainer.budget_seconds must be positive, or null for no limit; got {self.budget_seconds}")
        if not self.spike_factor > 1:
            raise UserError(f"trainer.spike_factor must be above 1; got {self.spike_factor}")


class TrainingResult(NamedTuple):
    """What a stage of training came to.

    Attributes:
        steps: optimizer steps in all, those before a resume included.
        seconds: training time in all.
        metrics: the last value of everything logged.
    """

    steps: int
    seconds: float
    metrics: dict[str, float]


def run_training(
    module: pl.LightningModule,
    source: BatchSource,
    *,
    name: str,
    config: TrainerConfig,
    optim: OptimizerConfig,
    run_dir: Path,
    validation: Sequence[Batch] = (),
    callbacks: tuple[Callback, ...] = (),
    unit: str = "images",
    per_sample: int = 1,
    operations: Callable[[], int] | None = None,
) -> TrainingResult:
    """Trains `module` in place, resuming from the newest checkpoint in `run_dir`; its weights end as the averaged ones.

    Args:
        module: a LightningModule with the network at `.model`; its `progress` attribute is set before each step.
        source: the training data.
        name: shown in the progress line.
        config: how long and on what.
        optim: schedule and weight averaging.
        run_dir: receives metrics/, TensorBoard events and checkpoints/.
        validation: batches to validate on; may be empty.
        callbacks: more callbacks.
        unit: what the progress line counts, in the plural.
        per_sample: so many units in one sample.
        operations: gives the floating-point operations of training on one sample, see
            `tessera.training.progress.count_operations`; None leaves out how well a GPU is used.

    Raises:
        KeyboardInterrupt: after saving, when the user interrupted; the same call resumes.
    """
    processes = join(config.device)
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    if device.type == "cpu":
        reuse_freed_memory()
    checkpoint_dir = run_dir / "checkpoints"
    resume_from = _newest(checkpoint_dir)
    start_step = checkpoint_step(resume_from) if resume_from else 0
    if config.batch_size % (processes.world_size * config.accumulate):
        raise UserError(
            f"trainer.batch_size must be a multiple of {processes.world_size} processes x {config.accumulate} parts "
            f"(trainer.accumulate); got {config.batch_size}"
        )

    loader = KeyedLoader(
        source,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start_step,
        rank=processes.rank,
        world_size=processes.world_size,
        accumulate=config.accumulate,
        num_workers=config.num_workers,
    )
    clock = ProgressClock(optim, max_steps=config.max_steps, budget_seconds=config.budget_seconds)
    saver = Saver(
        checkpoint_dir, every_seconds=config.checkpoint_every_seconds, every_steps=config.checkpoint_every_steps
    )
    averaging = HorizonAveraging(optim.ema_horizon, clock) if optim.ema_horizon else None
    module.progress = 0.0  # type: ignore[assignment]
    if processes.rank:  # models begin alike in all processes, their noise must not
        torch.manual_seed(int(mix(config.seed, processes.rank)) >> 1)
    if config.compile:
        module.model.compile()  # type: ignore[operator]
    with warnings.catch_warnings():
        _silence_lightning()
        trainer = pl.Trainer(
            accelerator="cpu" if device.type == "cpu" else "gpu",
            devices=[device.index] if device.index is not None else processes.per_node,
            num_nodes=processes.num_nodes,
            strategy=_strategy(config, processes, module),
            precision="bf16-mixed" if precision.name == "bf16" else "32-true",
            max_steps=config.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=config.accumulate,
            logger=_loggers(config, run_dir, start_step=start_step),
            callbacks=[
                clock,
                *([averaging] if averaging else []),
                RandomState(),
                *([FullPrecisionUpdates()] if precision.name == "fp32" else []),
                GradientGuard(
                    clip_norm=optim.clip_norm,
                    stop_after=config.stop_after_skipped,
                    saver=saver,
                    spike_factor=config.spike_factor,
                    skip_spikes=config.skip_spikes,
                ),
                saver,
                *callbacks,
                ProgressLine(
                    name,
                    clock,
                    batch_size=config.batch_size,
                    waited=lambda: loader.waited_seconds,
                    unit=unit,
                    per_sample=per_sample,
                    operations=operations,
                ),
            ],
            plugins=[
                AtomicCheckpointIO(known_whole=resume_from),
                # one process is alone even inside a job of many
                processes.environment or LightningEnvironment(),
            ],
            log_every_n_steps=config.log_every_steps,
            val_check_interval=config.validate_every_steps * config.accumulate if validation else None,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
        )
        # a bare list would be taken for several loaders
        validation_loader = (
            DataLoader(validation, batch_size=None, generator=torch.Generator()) if validation else None  # type: ignore[arg-type]
        )
        try:
            trainer.fit(module, loader, validation_loader, ckpt_path=resume_from, weights_only=True)
        except SystemExit as exit_:  # what Lightning makes of an interrupt
            raise KeyboardInterrupt from exit_
    if saver.interrupted:
        raise KeyboardInterrupt
    if averaging is not None and start_step >= config.max_steps:
        averaging.put_restored(module)  # Lightning ends such a run before it begins
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return TrainingResult(steps=trainer.global_step, seconds=clock.seconds, metrics=metrics)


def _newest(directory: Path) -> Path | None:
    """The checkpoint to go on from: looked for by the first process, so that all go on from the same."""

    def look() -> Path | None:
        found, damaged = newest_valid(directory)
        for path, reason in damaged:
            logging.getLogger(__name__).warning("checkpoint passed over: %s: %s", path, reason)
        if damaged and found is None:
            raise UserError(
                f"no checkpoint in {directory} is as it was saved, the newest is {damaged[0].path.name}: "
                f"{damaged[0].reason}; delete that folder to start over"
            )
        return found

    return on_first(look)


def _strategy(config: TrainerConfig, processes: Processes, module: pl.LightningModule) -> Strategy | str:
    """How the processes share the work; one process needs no strategy, whatever is configured."""
    if config.strategy == "fsdp" and not is_overridden("configure_model", module):
        raise UserError("trainer.strategy=fsdp shards the prior; the other stages fit into one device: use ddp")
    if processes.world_size == 1:
        return "auto"
    if config.strategy == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=processes.world_size, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return DDPStrategy(gradient_as_bucket_view=True)


def _loggers(config: TrainerConfig, run_dir: Path, *, start_step: int) -> list[Logger]:
    loggers: list[Logger] = [
        CSVLogger(
            run_dir,
            name=METRICS_DIR,
            version=metrics_version(start_step),
            flush_logs_every_n_steps=5 * config.log_every_steps,
        ),
        TensorBoardLogger(run_dir, name="", version="tensorboard"),
    ]
    if config.wandb_project is not None:
        try:
            loggers.append(WandbLogger(project=config.wandb_project, name=str(run_dir), save_dir=run_dir))
        except ModuleNotFoundError as error:
            raise UserError(
                "trainer.wandb_project needs the wandb package: `pip install wandb`, or leave it out: "
                "CSV and TensorBoard files are written in any case"
            ) from error
    return loggers


def _silence_lightning() -> None:
    """Lightning's banners and its hints about choices that are made on purpose here."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer.connectors.checkpoint_connector"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # compiling for a CPU warns that there is no CUDA
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    for message in (
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*mid-epoch.*",
        ".*Experiment logs directory.*",
        ".*The `srun` command is available.*",
    ):
        warnings.filterwarnings("ignore", message=message)
