"""`tessera estimate CONFIG.yaml key=value ...`: what training a dVAE will take, before it is trained.

Parameters are counted. Speed is measured here, with a few steps on random pixels. Memory is what a step keeps for its
backward pass, counted tensor by tensor, and what weights and optimizer hold.
"""

import math
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dvae.model import DiscreteVAE
from dvae.train import TrainConfig, check_sizes, objective_of
from recipes.speed import median_seconds, training_step
from tessera.config import load
from tessera.errors import UserError, run_command
from tessera.precision import autocast, describe_hardware, resolve_device, resolve_precision
from tessera.training.memory import reuse_freed_memory

# B batch, H W image pixels.

_GIB = 2**30
_PROCESS_GIB = 1.2  # Python with torch and lightning
_FLOAT_BYTES = 4
_SECONDS = 3.0  # for each thing that is timed
_ENOUGH_SECONDS = 0.5  # a step of this length is not timed with more images


class Parameters(NamedTuple):
    """Trainable numbers of a dVAE by part; a learned codebook counts as the quantizer's."""

    encoder: int
    quantizer: int
    decoder: int

    @property
    def total(self) -> int:
        """Of all parts."""
        return self.encoder + self.quantizer + self.decoder


class Estimate(NamedTuple):
    """What training will take on this machine.

    Attributes:
        parameters: counted.
        discriminator: trainable numbers of the adversary; 0 without one.
        measured_batch: images per step with which speed and memory were measured.
        train_images_per_second: through whole optimizer steps.
        encode_images_per_second: images to codes.
        decode_images_per_second: codes to images.
        state_gib: weights, gradients, optimizer state and averaged weights.
        activations_gib: what a step at the configured batch size keeps for its backward pass.
    """

    parameters: Parameters
    discriminator: int
    measured_batch: int
    train_images_per_second: float
    encode_images_per_second: float
    decode_images_per_second: float
    state_gib: float
    activations_gib: float


def count_parameters(vae: DiscreteVAE) -> Parameters:
    """The trainable numbers of each part; the model may be on the meta device."""

    def count(part: Any) -> int:
        return sum(parameter.numel() for parameter in part.parameters())

    return Parameters(encoder=count(vae.encoder), quantizer=count(vae.quantizer), decoder=count(vae.decoder))


def estimate(config: TrainConfig) -> Estimate:
    """Counts, and times a few optimizer steps, encoding and decoding on random pixels."""
    device = resolve_device(config.trainer.device)
    precision = resolve_precision(config.trainer.precision, device)
    if device.type == "cpu":
        reuse_freed_memory()
    vae, objective = DiscreteVAE(config.model).to(device), objective_of(config)
    objective.to_device_of(vae)
    optimizer = objective.build_optimizer(vae, config.optim)
    size = (config.crop, config.crop) if config.crop else config.data.image_size

    def loss_on(batch: int) -> Callable[[], Tensor]:
        images = torch.rand(batch, 3, *size, device=device)  # [B, 3, H, W]

        def loss() -> Tensor:
            with autocast(precision, device):
                return objective(vae, images, progress=1.0).total

        return loss

    weights = {parameter.untyped_storage().data_ptr() for parameter in (*vae.parameters(), *objective.parameters())}
    one, two = (_kept_bytes(loss_on(batch), weights) for batch in (1, 2))
    batch, seconds = 0, 0.0
    while batch < config.trainer.batch_size and seconds < _ENOUGH_SECONDS:
        wanted = max(2 * batch, int(batch * _ENOUGH_SECONDS / seconds / 2)) if batch else 1
        wanted = min(config.trainer.batch_size, wanted)
        step = training_step(optimizer, loss_on(wanted), clip_norm=config.optim.clip_norm)
        try:
            batch, seconds = wanted, median_seconds(step, device, budget=_SECONDS)
        except torch.OutOfMemoryError:
            if not batch:
                raise UserError(f"not even one picture of this size can be trained on with {device}") from None
            break  # what was measured with fewer pictures has to do

    vae.eval()
    images = torch.rand(batch, 3, *config.data.image_size, device=device)
    with torch.inference_mode(), autocast(precision, device):
        codes = vae.encode(images)
        encode_seconds = median_seconds(lambda: vae.encode(images), device, budget=_SECONDS)
        decode_seconds = median_seconds(lambda: vae.decode(codes), device, budget=_SECONDS)

    parameters = count_parameters(vae)
    discriminator = sum(parameter.numel() for parameter in objective.parameters())
    held = sum(tensor.numel() for state in optimizer.state.values() for tensor in state.values() if _is_tensor(tensor))
    state = 2 * (parameters.total + discriminator) + held  # weights and gradients
    if config.optim.ema_horizon:
        state += parameters.total + discriminator
    return Estimate(
        parameters=parameters,
        discriminator=discriminator,
        measured_batch=batch,
        train_images_per_second=batch / seconds,
        encode_images_per_second=batch / encode_seconds,
        decode_images_per_second=batch / decode_seconds,
        state_gib=_FLOAT_BYTES * state / _GIB,
        # what a step keeps whatever the batch, such as weights in bf16, is in the first picture only
        activations_gib=(one + (two - one) * (config.trainer.batch_size - 1)) / _GIB,
    )


def _kept_bytes(loss: Callable[[], Tensor], weights: Collection[int]) -> int:
    """What a forward pass keeps for the backward pass, apart from the weights themselves."""
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # freed memory would be given to other tensors, and counted once for all of them

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss()
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def estimate_lines(config: TrainConfig, found: Estimate) -> list[str]:
    """The estimate as a few lines for people."""
    hardware = describe_hardware()
    device = resolve_device(config.trainer.device)
    precision = resolve_precision(config.trainer.precision, device)
    name = hardware["gpu"] if device.type == "cuda" else f"{hardware['cpu']}, {hardware['cores']} cores"
    height, width = config.data.image_size
    f, sizes, steps = config.model.downsampling, found.parameters, config.trainer.max_steps
    seconds = steps * config.trainer.batch_size / found.train_images_per_second
    process = _PROCESS_GIB if device.type == "cpu" else 0.0
    peak = process + found.state_gib + found.activations_gib
    trained_on = f"{config.crop}x{config.crop} crops" if config.crop else "whole images"
    lines = [
        f"device      {name}, {precision.name}",
        f"image       {height}x{width} pixels as {height // f}x{width // f} of {config.model.num_codes:,} codes "
        f"(f = {f}), {height * width // f**2 * math.log2(config.model.num_codes):,.0f} bits",
        f"parameters  {sizes.total:,}: encoder {sizes.encoder:,}, quantizer {sizes.quantizer:,}, "
        f"decoder {sizes.decoder:,}" + (f"; discriminator {found.discriminator:,}" if found.discriminator else ""),
        f"training    {found.train_images_per_second:,.1f} images/s ({trained_on}, measured with batches of "
        f"{found.measured_batch}); {steps:,} steps of {config.trainer.batch_size} take about {_duration(seconds)}",
        f"encoding    {found.encode_images_per_second:,.1f} images/s, decoding {found.decode_images_per_second:,.1f}",
        f"memory      about {peak:.1f} GiB: weights and optimizer {found.state_gib:.2f}, "
        f"activations {found.activations_gib:.2f}" + (f", process {process:.1f}" if process else ""),
    ]
    if config.trainer.budget_seconds is not None and config.trainer.budget_seconds < seconds:
        lines.append(f"            trainer.budget_seconds ends it after {_duration(config.trainer.budget_seconds)}")
    return lines


def main(argv: Sequence[str]) -> int:
    """The command."""
    config = load(TrainConfig, argv, prog="tessera estimate")
    check_sizes(config)
    print("\n".join(estimate_lines(config, estimate(config))))
    return 0


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400.0), ("hours", 3_600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"


if __name__ == "__main__":
    raise SystemExit(run_command(main, sys.argv[1:]))
