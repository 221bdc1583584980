"""What training a prior takes, for people: its step measured on this machine, or estimated for one that is not here.

Every figure of time says which of the two it is. Memory is always estimated: see `recipes.estimate_prior`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from recipes.estimate_prior import (
    GIB,
    ParallelTraining,
    StepOperations,
    cache_bytes,
    count_parameters,
    most_samples,
    step_operations,
    training_memory,
)
from recipes.estimate_timing import TimedBatch, describe_device, seconds_of_update, timed_batch
from recipes.speed import measure_machine
from tessera.duration import duration
from tessera.errors import UserError
from tessera.precision import Precision, autocast, describe_hardware, resolve_device, resolve_precision
from tessera.training.memory import reuse_freed_memory
from tessera.training.optim import build_optimizer
from tessera.training.process_memory import process_gib
from transformer.lit import prior_loss
from transformer.model import Prior
from transformer.train import TrainConfig

# B batch, T text positions, I image positions.

_LONGEST_SECONDS = 20.0  # a step of one sample that would take longer is not measured
_MACHINE_UTILIZATION = 0.4  # of a matrix product's rate, where a step cannot be measured
_LAUNCH_BOUND_SECONDS = 0.02  # a step has thousands of kernels, and a GPU starts some hundred thousand a second


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked about a prior's training, beside its settings."""

    processes: int = 1
    """how many train together"""
    device_flops: float | None = None
    """operations a second of a device that is not here, at its best; None for this machine"""
    utilization: float = 0.4
    """share of them that training reaches, above 0 and at most 1"""
    device_memory_gib: float | None = None
    """memory of a device that is not here"""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise UserError(f"--processes must be at least 1; got {self.processes}")
        if not 0 < self.utilization <= 1:
            raise UserError(f"--utilization must lie in (0, 1]; got {self.utilization:g}")
        if self.device_flops is None and self.utilization != Question.utilization:
            raise UserError("--utilization is a share of --device-flops: give both")
        for name, value in (("--device-flops", self.device_flops), ("--device-memory", self.device_memory_gib)):
            if value is not None and not value > 0:
                raise UserError(f"{name} must be positive; got {value:g}")

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is about hardware that is not here."""
        return self.device_flops is not None or self.device_memory_gib is not None


class StepTime(NamedTuple):
    """What an optimizer step takes, and how that is known.

    Attributes:
        seconds: of the whole batch, in all processes.
        how: measured or estimated, and from what.
    """

    seconds: float
    how: str


def prior_lines(config: TrainConfig, question: Question) -> list[str]:
    """The estimate as lines for people; measures unless the question is about other hardware.

    Raises:
        UserError: if the batch cannot be shared by the processes.
    """
    trainer, layout = config.trainer, config.model.layout
    parts = question.processes * trainer.accumulate
    if trainer.batch_size % parts:
        raise UserError(
            f"trainer.batch_size must be a multiple of {question.processes} processes x {trainer.accumulate} parts; "
            f"got {trainer.batch_size}"
        )
    operations = step_operations(
        config.model,
        trainer.batch_size,
        optim=config.optim,
        checkpoint_activations=trainer.checkpoint_activations,
    )
    time = _time_elsewhere(operations, question) if question.is_elsewhere else _time_here(config, operations, question)
    sizes = count_parameters(config.model)
    tokens = trainer.batch_size * layout.seq_len
    on_top = operations.update + operations.recomputed
    lines = [
        f"device      {_device_line(config, question)}",
        f"sequence    {layout.text_len} text positions of {layout.num_text_ids:,} ids, then "
        f"{layout.grid_height}x{layout.grid_width} image positions of {layout.codebook_size:,} codes: "
        f"{layout.seq_len:,} in all",
        f"parameters  {sizes.total:,}: embeddings {sizes.embeddings:,}, blocks {sizes.blocks:,}, heads {sizes.heads:,}",
        f"operations  {_figure(operations.model / tokens / 1e9)} GFLOP per token, {_figure(operations.model / 1e12)} "
        f"TFLOP per step of {trainer.batch_size}: attention {operations.attention / operations.model:.0%}; "
        f"on top {_figure(on_top / 1e12)} for updates" + (" and recomputing" if operations.recomputed else ""),
        *_time_lines(config, time),
        *_memory_lines(config, question),
    ]
    size = cache_bytes(config.model, _training(config, question).precision)
    return [*lines, f"decoding    keys and values of one image take {size / 2**20:,.1f} MiB"]


def measure_step(config: TrainConfig, *, most: int) -> tuple[TimedBatch, float]:
    """Times passes forward and backward on random tokens, and the update of the weights.

    Args:
        config: sizes and settings.
        most: samples at once.

    Returns:
        The pass, and the seconds of an update.
    """
    device = resolve_device(config.trainer.device)
    precision = resolve_precision(config.trainer.precision, device)
    if device.type == "cpu":
        reuse_freed_memory()
    layout = config.model.layout
    model = Prior(
        config.model,
        attention_backend=config.attention.backend,
        checkpoint_activations=config.trainer.checkpoint_activations,
    ).to(device)
    optimizer = build_optimizer(model, config.optim)

    def passes(rows: int) -> Callable[[], None]:
        text_ids = torch.randint(layout.num_text_ids, (rows, layout.text_len), device=device)  # [B, T]
        codes = torch.randint(layout.codebook_size, (rows, layout.image_len), device=device)  # [B, I]

        def run() -> None:
            optimizer.zero_grad()
            _loss(model, text_ids, codes, precision, device).backward()

        return run

    timed = timed_batch(passes, device, most=most, sample="sample")
    return timed, seconds_of_update(optimizer, device, clip_norm=config.optim.clip_norm)


def _loss(model: Prior, text_ids: Tensor, codes: Tensor, precision: Precision, device: torch.device) -> Tensor:
    with autocast(precision, device):
        output = model(text_ids, codes)
    return prior_loss(output, text_ids, codes, text_vocab_size=model.layout.text_vocab_size).total


def _time_elsewhere(operations: StepOperations, question: Question) -> StepTime | None:
    if question.device_flops is None:
        return None
    flops = question.device_flops * question.utilization
    seconds, how = operations.seconds(flops, processes=question.processes), f"estimated{_each(question)}"
    if seconds < _LAUNCH_BOUND_SECONDS:
        how += "; so short a step is spent on starting kernels: expect several times as much"
    return StepTime(seconds, how)


def _time_here(config: TrainConfig, operations: StepOperations, question: Question) -> StepTime:
    """Measured where a step of one sample fits this machine and a short time, else estimated from its products."""
    training = _training(config, question)._replace(processes=1)
    memory = _memory_here_gib(config) - process_gib(training.kind)
    at_once = config.trainer.batch_size // (question.processes * config.trainer.accumulate)
    most = most_samples(config.model, optim=config.optim, training=training, memory_gib=memory, most=at_once)
    machine = measure_machine(config.trainer.device, config.trainer.precision)
    flops = machine.flops * _MACHINE_UTILIZATION
    one = step_operations(
        config.model, 1, optim=config.optim, checkpoint_activations=config.trainer.checkpoint_activations
    )
    if not most or one.seconds(flops) > _LONGEST_SECONDS:
        why = "one sample takes too long here" if most else "not even one sample fits the memory here"
        return StepTime(
            operations.seconds(flops, processes=question.processes),
            f"estimated: {why}; a large matrix product does {machine.flops / 1e12:.3g} TFLOP/s, training "
            f"{_MACHINE_UTILIZATION:.0%} of that{_each(question)}",
        )
    timed, update_seconds = measure_step(config, most=most)
    seconds = timed.seconds * config.trainer.batch_size / timed.size / question.processes + update_seconds
    how = (
        f"measured: forward and backward with {timed.size} at once {_figure(timed.seconds / timed.size)} s each, "
        f"update {_figure(update_seconds)} s"
    )
    if question.processes > 1:
        how = f"estimated{_each(question)}; of one, {how}"
    return StepTime(seconds, how)


def _time_lines(config: TrainConfig, time: StepTime | None) -> list[str]:
    if time is None:
        return ["training    how long a step takes there needs --device-flops TFLOPS"]
    steps, budget = config.trainer.max_steps, config.trainer.budget_seconds
    lines = [
        f"training    {_figure(time.seconds)} s per step ({time.how})",
        f"            {steps:,} steps of {config.trainer.batch_size} take about {duration(steps * time.seconds)}",
    ]
    if budget is not None and budget < steps * time.seconds:
        lines.append(f"            trainer.budget_seconds ends it after {duration(budget)}")
    return lines


def _memory_lines(config: TrainConfig, question: Question) -> list[str]:
    """What one process holds, with and without checkpoints, for each strategy."""
    configured = _training(config, question)
    memory = question.device_memory_gib if question.is_elsewhere else _memory_here_gib(config)
    samples = config.trainer.batch_size // (question.processes * config.trainer.accumulate)
    heading = f"GiB per process (estimated), {samples} samples at once"
    lines = [f"memory      {heading:48}{'state':>9}{'activations':>13}{'update':>8}{'in all':>8}"]
    strategies: tuple[Literal["ddp", "fsdp"], ...] = ("ddp", "fsdp") if question.processes > 1 else ("ddp",)
    for strategy in strategies:
        for is_checkpointed in (False, True):
            training = configured._replace(strategy=strategy, checkpoint_activations=is_checkpointed)
            held = training_memory(config.model, samples, optim=config.optim, training=training)
            name = f"{question.processes} processes, {strategy}" if question.processes > 1 else "1 process"
            name += ", checkpoint_activations" if is_checkpointed else ""
            peak = held.held_gib(training.kind) + process_gib(training.kind)
            verdict = ""
            if memory is not None:
                verdict = "  fits" if peak <= memory else "  does not fit"
            verdict += "  <- as configured" if training == configured else ""
            lines.append(
                f"            {name:48}{held.state / GIB:9.2f}{held.activations / GIB:13.2f}"
                f"{held.update / GIB:8.2f}{peak:8.2f}{verdict}"
            )
    held = training_memory(config.model, samples, optim=config.optim, training=configured)
    state = {
        "weights": held.weights,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "averaged weights": held.average,
        "gathered weights": held.gathered,
    }
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in state.items() if size)
    lines.append(f"            the state as configured: {shown}")
    return [*lines, *_advice(config, question, configured, samples, memory)]


def _advice(
    config: TrainConfig, question: Question, training: ParallelTraining, samples: int, memory: float | None
) -> list[str]:
    """What would make it fit, where it does not."""
    if memory is None:
        return []
    room = memory - process_gib(training.kind)
    fitting = most_samples(config.model, optim=config.optim, training=training, memory_gib=room, most=samples)
    if fitting == samples:
        return []
    if not fitting:
        return [f"            of {memory:,.0f} GiB, not even one sample at once fits as configured"]
    share = config.trainer.batch_size // question.processes
    accumulate = next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= fitting)
    return [f"            {memory:,.0f} GiB are enough for {fitting} at once: trainer.accumulate={accumulate}"]


def _training(config: TrainConfig, question: Question) -> ParallelTraining:
    if question.is_elsewhere:
        kind, precision = "cuda", "fp32" if config.trainer.precision == "fp32" else "bf16"
    else:
        device = resolve_device(config.trainer.device)
        kind, precision = device.type, resolve_precision(config.trainer.precision, device).name
    return ParallelTraining(
        processes=question.processes,
        # one process has nothing to share out
        strategy="fsdp" if config.trainer.strategy == "fsdp" and question.processes > 1 else "ddp",
        checkpoint_activations=config.trainer.checkpoint_activations,
        kind=kind,
        precision=precision,  # type: ignore[arg-type]
    )


def _device_line(config: TrainConfig, question: Question) -> str:
    precision = _training(config, question).precision
    if not question.is_elsewhere:
        return f"{describe_device(resolve_device(config.trainer.device))}, {precision}"
    named = []
    if question.device_flops is not None:
        named.append(f"{question.device_flops / 1e12:,.4g} TFLOP/s used to {question.utilization:.0%}")
    if question.device_memory_gib is not None:
        named.append(f"{question.device_memory_gib:,.4g} GiB")
    return f"a GPU of {' and '.join(named)}, {precision}; it is not here, so that all of this is estimated"


def _figure(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _each(question: Question) -> str:
    return f" for {question.processes} processes, without what they send" if question.processes > 1 else ""


def _memory_here_gib(config: TrainConfig) -> float:
    hardware = describe_hardware()
    is_gpu = resolve_device(config.trainer.device).type == "cuda"
    return float((hardware["gpu_memory_gib"] if is_gpu else hardware["memory_gib"]) or 8.0)
