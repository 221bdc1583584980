"""What training a dVAE takes: parameters are counted, passes and updates timed.

Speed is measured here, on random pixels. Memory is estimated: what a pass keeps for its way back, counted tensor by
tensor, and what weights and optimizer hold.
"""

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dvae.model import DiscreteVAE
from dvae.train import TrainConfig, objective_of
from recipes.estimate_timing import describe_device, seconds_of, seconds_of_update, timed_batch
from tessera.duration import duration
from tessera.errors import UserError
from tessera.precision import autocast, resolve_device, resolve_precision
from tessera.training.memory import reuse_freed_memory
from tessera.training.process_memory import process_gib

# B batch, H W image pixels.

_GIB = 2**30
_FLOAT_BYTES = 4


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
        measured_batch: images at once with which speed was measured.
        train_images_per_second: through whole optimizer steps at the configured batch size.
        encode_images_per_second: images to codes.
        decode_images_per_second: codes to images.
        state_gib: weights, gradients, optimizer state and averaged weights.
        activations_gib: what a forward pass keeps for its backward pass, of as many images as training takes at once.
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
    """Counts, and times passes forward and backward, updates, encoding and decoding on random pixels.

    Raises:
        UserError: if the batch cannot be cut into `trainer.accumulate` parts.
    """
    trainer = config.trainer
    if trainer.batch_size % trainer.accumulate:
        raise UserError(
            f"trainer.batch_size must be a multiple of {trainer.accumulate} parts (trainer.accumulate); "
            f"got {trainer.batch_size}"
        )
    at_once = trainer.batch_size // trainer.accumulate
    device = resolve_device(trainer.device)
    precision = resolve_precision(trainer.precision, device)
    if device.type == "cpu":
        reuse_freed_memory()
    vae, objective = DiscreteVAE(config.model).to(device), objective_of(config)
    objective.to_device_of(vae)
    optimizer = objective.build_optimizer(vae, config.optim)
    size = (config.crop, config.crop) if config.crop else config.data.image_size

    def loss_on(count: int) -> Callable[[], Tensor]:
        images = torch.rand(count, 3, *size, device=device)  # [B, 3, H, W]

        def loss() -> Tensor:
            with autocast(precision, device):
                return objective(vae, images, progress=1.0).total

        return loss

    def passes(count: int) -> Callable[[], None]:
        loss = loss_on(count)

        def run() -> None:
            optimizer.zero_grad()
            loss().backward()

        return run

    weights = {parameter.untyped_storage().data_ptr() for parameter in (*vae.parameters(), *objective.parameters())}
    one, two = (kept_bytes(loss_on(count), weights) for count in (1, 2))
    timed = timed_batch(passes, device, most=at_once, sample="picture")
    update_seconds = seconds_of_update(optimizer, device, clip_norm=config.optim.clip_norm)

    vae.eval()
    images = torch.rand(timed.size, 3, *config.data.image_size, device=device)
    with torch.inference_mode(), autocast(precision, device):
        codes = vae.encode(images)
        encode_seconds = seconds_of(lambda: vae.encode(images), device)
        decode_seconds = seconds_of(lambda: vae.decode(codes), device)

    parameters = count_parameters(vae)
    discriminator = sum(parameter.numel() for parameter in objective.parameters())
    held = sum(tensor.numel() for state in optimizer.state.values() for tensor in state.values() if _is_tensor(tensor))
    state = 2 * (parameters.total + discriminator) + held  # weights and gradients
    if config.optim.ema_horizon:
        state += parameters.total  # a discriminator is not averaged
    return Estimate(
        parameters=parameters,
        discriminator=discriminator,
        measured_batch=timed.size,
        train_images_per_second=trainer.batch_size / (trainer.batch_size * timed.seconds / timed.size + update_seconds),
        encode_images_per_second=timed.size / encode_seconds,
        decode_images_per_second=timed.size / decode_seconds,
        state_gib=_FLOAT_BYTES * state / _GIB,
        # what a step keeps whatever the batch, such as weights in bf16, is in the first picture only
        activations_gib=(one + (two - one) * (at_once - 1)) / _GIB,
    )


def kept_bytes(loss: Callable[[], Tensor], weights: Collection[int]) -> int:
    """What a forward pass keeps for the backward pass.

    Args:
        loss: runs the forward pass.
        weights: addresses of memory that does not count, that of the weights themselves.
    """
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
    device = resolve_device(config.trainer.device)
    precision = resolve_precision(config.trainer.precision, device)
    height, width = config.data.image_size
    f, sizes, steps = config.model.downsampling, found.parameters, config.trainer.max_steps
    seconds = steps * config.trainer.batch_size / found.train_images_per_second
    process = process_gib(device.type)
    peak = process + found.state_gib + found.activations_gib
    at_once = config.trainer.batch_size // config.trainer.accumulate
    trained_on = f"{config.crop}x{config.crop} crops" if config.crop else "whole images"
    lines = [
        f"device      {describe_device(device)}, {precision.name}",
        f"image       {height}x{width} pixels as {height // f}x{width // f} of {config.model.num_codes:,} codes "
        f"(f = {f}), {height * width // f**2 * math.log2(config.model.num_codes):,.0f} bits",
        f"parameters  {sizes.total:,}: encoder {sizes.encoder:,}, quantizer {sizes.quantizer:,}, "
        f"decoder {sizes.decoder:,}" + (f"; discriminator {found.discriminator:,}" if found.discriminator else ""),
        f"training    {found.train_images_per_second:,.1f} images/s ({trained_on}, "
        f"measured with {found.measured_batch} at once); {steps:,} steps of {config.trainer.batch_size} take about "
        f"{duration(seconds)}",
        f"encoding    {found.encode_images_per_second:,.1f} images/s, decoding {found.decode_images_per_second:,.1f} "
        "(measured)",
        f"memory      about {peak:.1f} GiB (estimated): weights and optimizer {found.state_gib:.2f}, "
        f"activations of {at_once} at once {found.activations_gib:.2f}"
        + (f", process {process:.1f}" if process else ""),
    ]
    if config.trainer.budget_seconds is not None and config.trainer.budget_seconds < seconds:
        lines.append(f"            trainer.budget_seconds ends it after {duration(config.trainer.budget_seconds)}")
    return lines


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
