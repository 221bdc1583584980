"""Which sizes of models are worth training: the largest that images, memory and seconds suffice for."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from dvae.model import DiscreteVAEConfig
from recipes.estimate_prior import step_operations, training_memory_gib
from tessera.errors import UserError
from tessera.precision import PrecisionName
from tessera.training.optim import OptimizerConfig
from transformer.masks import MaskKind
from transformer.model import PriorConfig, SequenceLayout

# Measured products are the best case; a small model's step spends much of its time on everything else.
_UTILIZATION = {"cpu": 0.4, "cuda": 0.3}
_MOST_CODES = {"cpu": 256, "cuda": 1024}
_MOST_MEMORY = 0.8  # of what the device has
_GIB = 2**30


class DVAERow(NamedTuple):
    """One size of the dVAE and what it takes to be worth it."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    batch_size: int
    learning_rate: float
    least_steps: int
    least_images: int


class PriorRow(NamedTuple):
    """One size of the prior and what it takes to be worth it."""

    dim: int
    depth: int
    heads: int
    attention: tuple[MaskKind, ...]
    batch_size: int
    learning_rate: float
    bpe_dropout: float
    least_steps: int
    least_images: int


# Smallest first; the largest row that the budget can train for `least_steps` is taken, the first one whatever happens.
# In little time small models learn more, because they see more: in 110 seconds of two cores a prior of 128 channels
# came to 0.77 nats per token with 4 layers, 0.83 with 6, and one of 192 channels to 1.07. With twelve minutes of emoji
# it was the other way round, 2.35 against 1.77 on held-out drawings, after dVAEs of about equal quality. Small batches
# learn more, too: 1,200 steps of 16 captioned images were worth more than 600 of 32. A prior that sees every caption
# only a few times cannot afford to see its words in pieces as well: skipping one merge in ten breaks four words in ten.
DVAE_ROWS = (
    DVAERow((48, 96), (1, 2), 48, 3e-3, 0, 0),
    DVAERow((64, 128), (1, 3), 48, 3e-3, 6_000, 0),
    DVAERow((96, 192), (2, 3), 64, 2e-3, 8_000, 2_000),
    DVAERow((128, 384), (2, 4), 128, 1e-3, 20_000, 50_000),
)
_ROWS_THEN_FULL: tuple[MaskKind, ...] = ("row", "column", "row", "full")
PRIOR_ROWS = (
    PriorRow(128, 4, 4, _ROWS_THEN_FULL, 16, 6e-3, 0.0, 0, 0),
    PriorRow(128, 6, 4, _ROWS_THEN_FULL, 16, 6e-3, 0.0, 6_000, 0),
    PriorRow(192, 6, 6, _ROWS_THEN_FULL, 16, 5e-3, 0.0, 6_000, 0),
    PriorRow(256, 8, 4, _ROWS_THEN_FULL, 64, 3e-3, 0.1, 5_000, 2_000),
    PriorRow(512, 12, 8, _ROWS_THEN_FULL, 256, 1.5e-3, 0.1, 6_000, 10_000),  # 50 M parameters with its embeddings
    PriorRow(1024, 24, 16, _ROWS_THEN_FULL, 256, 6e-4, 0.1, 20_000, 100_000),  # 350 M
)
# Few images fill few codes: (images from which on, levels).
CODEBOOKS = ((0, (8, 5, 5, 5)), (200_000, (8, 8, 8, 6, 5)))


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What a plan needs to know about a corpus."""

    name: str
    """as the corpus calls itself"""
    num_images: int
    """in the training split"""
    image_size: tuple[int, int]
    """height and width in pixels"""
    text_len: int
    """estimated text positions of the longest captions"""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a plan needs to know about the hardware."""

    kind: str
    """cpu or cuda"""
    memory_gib: float
    """of the device that trains"""
    flops: float
    """measured floating-point operations per second of a large matrix product in the precision of training"""
    precision: PrecisionName
    """of training"""
    can_compile: bool = False
    """whether torch.compile has what it needs: on CPUs a C++ compiler"""


class Sizes(NamedTuple):
    """What is trained, and the rows whose rates and batches suit it."""

    vae: DiscreteVAEConfig
    vae_row: DVAERow
    prior: PriorConfig
    prior_row: PriorRow


def affordable_sizes(facts: DataFacts, machine: Machine, *, dvae_seconds: float, prior_seconds: float) -> Sizes:
    """The largest rows that can be trained long enough on this machine, in so much time for each of the two.

    Raises:
        UserError: if the image sides do not fit the downsampling.
    """
    flops = machine.flops * _UTILIZATION.get(machine.kind, 1.0)
    vae_row = DVAE_ROWS[0]
    for row in DVAE_ROWS:
        candidate_vae = _vae_config(row, facts, machine)
        size = trained_size(facts.image_size, crop_for(facts.image_size, candidate_vae))
        needed = row.least_steps * dvae_step_flops(candidate_vae, size, row.batch_size)
        if needed <= flops * dvae_seconds and facts.num_images >= row.least_images:
            vae_row = row
    vae = _vae_config(vae_row, facts, machine)
    check_image_size(facts.image_size, vae)
    layout = layout_for(facts, vae)
    prior_row = PRIOR_ROWS[0]
    for row_ in PRIOR_ROWS:
        if facts.num_images < row_.least_images:
            continue
        candidate = _prior_config(row_, layout)
        operations = step_operations(candidate, row_.batch_size, optim=OptimizerConfig())
        needed = row_.least_steps * operations.model  # updates and all else are in the utilization
        if needed <= flops * prior_seconds and prior_fits(candidate, row_.batch_size, machine):
            prior_row = row_
    return Sizes(vae, vae_row, _prior_config(prior_row, layout), prior_row)


def prior_fits(config: PriorConfig, batch_size: int, machine: Machine) -> bool:
    """Whether the device can train it, with room for what else there is."""
    needed = training_memory_gib(config, batch_size, kind=machine.kind, precision=machine.precision)
    return needed <= _MOST_MEMORY * machine.memory_gib


def crop_for(image_size: tuple[int, int], vae: DiscreteVAEConfig) -> int | None:
    """Side of the crops that the dVAE trains on: about half the shorter side, None if that is less than three codes."""
    f = vae.downsampling
    side = f * round(min(image_size) / 2 / f)
    return side if side >= 3 * f else None


def trained_size(image_size: tuple[int, int], crop: int | None) -> tuple[int, int]:
    """Height and width of what a dVAE sees in training: square crops, or whole images without them."""
    return (crop, crop) if crop else image_size


def check_image_size(image_size: tuple[int, int], vae: DiscreteVAEConfig) -> None:
    """Raises UserError if a side is not divisible by the downsampling factor."""
    height, width = image_size
    f = vae.downsampling
    if height % f or width % f:
        lower, upper = f * max(1, height // f), f * (height // f + 1)
        near = lower if height - lower <= upper - height else upper
        raise UserError(
            f"--image-size {height}x{width}: both sides must be divisible by {f}; for example {near} "
            f"(one number is a square, HEIGHTxWIDTH anything else)"
        )


def layout_for(facts: DataFacts, vae: DiscreteVAEConfig) -> SequenceLayout:
    """The sequence that the prior will have, as far as it is known before there are shards."""
    height, width = facts.image_size
    return SequenceLayout(
        text_len=facts.text_len,
        grid_height=height // vae.downsampling,
        grid_width=width // vae.downsampling,
        text_vocab_size=1024,
        codebook_size=vae.num_codes,
        codebook_levels=vae.code_digits,
    )


def dvae_step_flops(config: DiscreteVAEConfig, image_size: tuple[int, int], batch_size: int) -> float:
    """Operations of one training step of the residual blocks, which do nearly all the work."""
    operations = 0.0
    for level, (width, blocks) in enumerate(zip(config.widths, config.blocks, strict=True)):
        positions = math.prod(image_size) / (config.patch_size * 2**level) ** 2
        taps = config.encoder_kernel_size**2 + 9  # of the encoder's and the decoder's convolutions
        # two convolutions per block, multiply and add, forward and twice that backward
        operations += positions * blocks * 2 * taps * width**2 * 2 * 3
    return operations * batch_size


def dvae_memory_gib(config: DiscreteVAEConfig, image_size: tuple[int, int], batch_size: int) -> float:
    """Peak memory of training the dVAE: activations of the blocks, images and reconstructions.

    Args:
        config: sizes.
        image_size: (height, width) of what it trains on, crops or whole images.
        batch_size: images that pass through the model at once.
    """
    pixels = math.prod(image_size)
    total = 24.0 * 4 * pixels * batch_size
    for level, (width, blocks) in enumerate(zip(config.widths, config.blocks, strict=True)):
        positions = pixels / (config.patch_size * 2**level) ** 2
        total += batch_size * positions * width * 2 * (blocks + 1) * 24
    return total / _GIB


def _vae_config(row: DVAERow, facts: DataFacts, machine: Machine) -> DiscreteVAEConfig:
    """A row's model, with one more resolution for every factor of two by which the images are too large."""
    levels = next(levels for images, levels in reversed(CODEBOOKS) if facts.num_images >= images)
    widths, blocks = row.widths, row.blocks
    config = DiscreteVAEConfig(widths=widths, blocks=blocks, levels=levels)
    while math.prod(facts.image_size) / config.downsampling**2 > _MOST_CODES.get(machine.kind, 256):
        widths, blocks = (*widths, 2 * widths[-1] if len(widths) < 3 else widths[-1]), (*blocks, blocks[-1])
        config = DiscreteVAEConfig(widths=widths, blocks=blocks, levels=levels)
    return config


def _prior_config(row: PriorRow, layout: SequenceLayout) -> PriorConfig:
    # sparse masks are for long sequences; a short one only loses sight of what it has drawn already
    attention: tuple[MaskKind, ...] = row.attention if layout.image_len > _MOST_CODES["cpu"] else ("full",)
    return PriorConfig(layout=layout, dim=row.dim, depth=row.depth, heads=row.heads, attention=attention)


def batch_for(batch_size: int, facts: DataFacts) -> int:
    """A row's batch, or a smaller one where there are few images."""
    return min(batch_size, max(4, facts.num_images))
