"""Runs one stage of training under Lightning: one function for every stage, on one machine or many."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch.utils.data import DataLoader

from tessera.data.loader import Batch, BatchSource, KeyedLoader
from tessera.errors import UserError
from tessera.precision import resolve_device, resolve_precision
from tessera.training.callbacks import HorizonAveraging, ProgressClock, ProgressLine, RandomState, Saver
from tessera.training.checkpoint import AtomicCheckpointIO, checkpoint_step, newest_readable
from tessera.training.guard import GradientGuard
from tessera.training.memory import reuse_freed_memory
from tessera.training.metrics import METRICS_DIR, metrics_version
from tessera.training.optim import OptimizerConfig


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
    num_devices: int = 1
    """processes per node, one per GPU (or CPU process); under torchrun or SLURM the launcher's number"""
    num_nodes: int = 1
    """machines"""
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
    stop_after_skipped: int = 20
    """steps in a row with a loss or gradient that is not finite after which training gives up; each one is skipped"""
    wandb_project: str | None = None
    """also log to this project of Weights & Biases; needs the wandb package"""

    def __post_init__(self) -> None:
        if self.stop_after_skipped < 0:
            raise UserError(f"trainer.stop_after_skipped must be at least 0; got {self.stop_after_skipped}")
        if self.max_steps < 1 or self.batch_size < 1:
            raise UserError(
                f"trainer needs max_steps and batch_size of at least 1; got {self.max_steps} and {self.batch_size}"
            )


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

    Raises:
        KeyboardInterrupt: after saving, when the user interrupted; the same call resumes.
    """
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    if device.type == "cpu":
        reuse_freed_memory()
    checkpoint_dir = run_dir / "checkpoints"
    resume_from, damaged = newest_readable(checkpoint_dir)
    for path in damaged:
        logging.getLogger(__name__).warning("damaged checkpoint passed over: %s", path)
    start_step = checkpoint_step(resume_from) if resume_from else 0
    if config.num_devices * config.num_nodes > 1:
        raise UserError(
            f"training on several processes is not supported yet; "
            f"got trainer.num_devices={config.num_devices} and trainer.num_nodes={config.num_nodes}"
        )

    clock = ProgressClock(optim, max_steps=config.max_steps, budget_seconds=config.budget_seconds)
    saver = Saver(
        checkpoint_dir, every_seconds=config.checkpoint_every_seconds, every_steps=config.checkpoint_every_steps
    )
    averaging = [HorizonAveraging(optim.ema_horizon, clock, device=device)] if optim.ema_horizon else []
    module.progress = 0.0  # type: ignore[assignment]
    if config.compile:
        module.model.compile()  # type: ignore[operator]
    with warnings.catch_warnings():
        _silence_lightning()
        trainer = pl.Trainer(
            accelerator="cpu" if device.type == "cpu" else "gpu",
            devices=[device.index] if device.index is not None else config.num_devices,
            num_nodes=config.num_nodes,
            precision="bf16-mixed" if precision.name == "bf16" else "32-true",
            max_steps=config.max_steps,
            max_epochs=-1,
            logger=_loggers(config, run_dir, start_step=start_step),
            callbacks=[
                clock,
                *averaging,
                RandomState(),
                GradientGuard(clip_norm=optim.clip_norm, stop_after=config.stop_after_skipped, saver=saver),
                saver,
                *callbacks,
                ProgressLine(name, clock, batch_size=config.batch_size),
            ],
            plugins=[AtomicCheckpointIO()],
            log_every_n_steps=config.log_every_steps,
            val_check_interval=config.validate_every_steps if validation else None,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
        )
        loader = KeyedLoader(
            source,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start_step,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            num_workers=config.num_workers,
        )
        # a bare list would be taken for several loaders
        validation_loader = DataLoader(validation, batch_size=None) if validation else None  # type: ignore[arg-type]
        try:
            trainer.fit(module, loader, validation_loader, ckpt_path=resume_from, weights_only=True)
        except SystemExit as exit_:  # what Lightning makes of an interrupt
            raise KeyboardInterrupt from exit_
    if saver.interrupted:
        raise KeyboardInterrupt
    if resume_from is not None and start_step >= config.max_steps:
        # Lightning ends such a run before it hands over the averaged weights
        module.load_state_dict(torch.load(resume_from, map_location="cpu", weights_only=True)["state_dict"])
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return TrainingResult(steps=trainer.global_step, seconds=clock.seconds, metrics=metrics)


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
