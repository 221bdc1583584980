"""What training a prior takes, counted from its settings and not measured: parameters, operations, memory.

Operations are those that the method needs (Chowdhery et al. 2022, "PaLM", appendix B): two per weight and position
forward, four backward, and attention's for the pairs that its masks allow. What is done on top of them, to save memory
or to orthogonalize updates, is counted apart.
"""

from typing import Literal, NamedTuple, cast

import torch
from torch import nn

from tessera.precision import PrecisionName
from tessera.training.optim import ORTHOGONALIZED_AT_ONCE, OptimizerConfig, build_optimizer
from transformer.attention import CPU_MATMUL_KEYS
from transformer.model import Prior, PriorConfig

# B samples, T text positions, I image positions, N = T + I, C width, H heads, V text ids, K codebook size.

GIB = 2**30
_FLOAT_BYTES = 4
_NEWTON_SCHULZ_ROUNDS = 5  # as tessera.training.optim makes
# Of every matrix of one shape: its update once more in fp32, and in bf16 before, during and after a round.
_ORTHOGONALIZED_BYTES = 10
# Forward, float copy and logarithm, two gradients: 2 + 3 x 4 bytes in bf16; without the copy in fp32.
_LOGIT_BYTES = {"bf16": 14, "fp32": 16}
# What an allocator holds over what tensors take at their peak: 1.45 to 1.5 measured with the C library's heap, which is
# kept from step to step, for 256 channels and 16 or 64 samples; assumed for PyTorch's own on GPUs.
_HELD = {"cpu": 1.5, "cuda": 1.1}
# FSDP gathers the weights of the next block while it computes with those of one.
_GATHERED_BLOCKS = 2


class PriorParameters(NamedTuple):
    """Weights of a prior by part."""

    embeddings: int
    blocks: int
    heads: int

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(self)


class StepOperations(NamedTuple):
    """Floating-point operations of one optimizer step.

    Attributes:
        blocks: products with the weights of all layers.
        attention: products among positions.
        heads: products with the heads.
        recomputed: all of the blocks' forward pass once more, where activations are not kept.
        update: orthogonalizing the hidden weights' updates; the same however large the batch.
    """

    blocks: float
    attention: float
    heads: float
    recomputed: float
    update: float

    @property
    def model(self) -> float:
        """Those that the method needs."""
        return self.blocks + self.attention + self.heads

    def seconds(self, flops: float, *, processes: int = 1) -> float:
        """The step's time where each process does so many operations a second; every one of them updates all weights.

        What the processes send to each other is not counted.
        """
        return ((self.model + self.recomputed) / processes + self.update) / flops


class TrainingMemory(NamedTuple):
    """Bytes that one process holds while it trains, by what they are for.

    Attributes:
        weights: in fp32.
        gradients: in fp32.
        optimizer: running means of gradients, and of their squares.
        average: the averaged weights.
        gathered: weights that a process has from the others for a while, under fsdp.
        activations: what a forward pass keeps for its backward pass, weights in bf16 and logits included.
        update: what the optimizer's step needs for a moment, when activations are gone.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    gathered: float
    activations: float
    update: float

    @property
    def state(self) -> float:
        """What is held all the time."""
        return self.weights + self.gradients + self.optimizer + self.average + self.gathered

    @property
    def peak(self) -> float:
        """The most at a time."""
        return self.state + max(self.activations, self.update)

    def held_gib(self, kind: str) -> float:
        """What the process takes of a device's memory for it, in GiB: an allocator cannot use every gap."""
        return _HELD.get(kind, 1.0) * self.peak / GIB


class ParallelTraining(NamedTuple):
    """How a batch is shared and what is kept of it: the settings of the trainer that memory depends on.

    Attributes:
        processes: how many train together.
        strategy: ddp, all weights in each of them, or fsdp, a part in each.
        checkpoint_activations: keep the input of each block alone.
        kind: cpu or cuda.
        precision: of products.
    """

    processes: int = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"
    checkpoint_activations: bool = False
    kind: str = "cuda"
    precision: PrecisionName = "bf16"


def training_memory_gib(
    config: PriorConfig,
    batch_size: int,
    *,
    kind: str = "cuda",
    precision: PrecisionName = "bf16",
    optim: OptimizerConfig | None = None,
    checkpoint_activations: bool = False,
) -> float:
    """Peak memory of training a prior in one process, in GiB, without the process itself; counted, not measured.

    Args:
        config: sizes.
        batch_size: samples that pass through the model at once.
        kind: cpu or cuda.
        precision: of products.
        optim: what the weights' update keeps; None for the defaults.
        checkpoint_activations: keep the input of each block alone.
    """
    training = ParallelTraining(kind=kind, precision=precision, checkpoint_activations=checkpoint_activations)
    return training_memory(config, batch_size, optim=optim or OptimizerConfig(), training=training).held_gib(kind)


def training_memory(
    config: PriorConfig, samples: int, *, optim: OptimizerConfig, training: ParallelTraining
) -> TrainingMemory:
    """What one process holds.

    Args:
        config: sizes.
        samples: that pass through a process's model at once: its share of the batch, or a part of that.
        optim: what the weights' update keeps.
        training: how processes share the work.
    """
    prior = _shapes_of(config)
    sizes = _count(prior)
    is_shared_out = training.strategy == "fsdp" and training.processes > 1
    share = 1 / training.processes if is_shared_out else 1.0
    weights = _FLOAT_BYTES * sizes.total * share
    state, update = 0.0, 0.0
    for group in build_optimizer(prior, optim).param_groups:
        numbers = sum(parameter.numel() for parameter in group["params"])
        if group["rule"] == "muon":
            # every process has some updates whole, for no part of a matrix knows its directions
            shapes = [(len(same), same[0].numel()) for same in _by_shape(group["params"])]
            most = max(size * min(count, max(1, ORTHOGONALIZED_AT_ONCE // size)) for count, size in shapes)
            state += _FLOAT_BYTES * numbers * share
            update = max(update, (_FLOAT_BYTES + _ORTHOGONALIZED_BYTES) * most)
        else:
            state += 2 * _FLOAT_BYTES * numbers * share
            update = max(update, _FLOAT_BYTES * numbers * share)
    gathered = 0.0
    if is_shared_out:
        gathered = _FLOAT_BYTES * (sizes.embeddings + sizes.heads + _GATHERED_BLOCKS * sizes.blocks / config.depth)
    return TrainingMemory(
        weights=weights,
        gradients=weights,
        optimizer=state,
        average=weights if optim.ema_horizon else 0.0,
        gathered=gathered,
        activations=samples * _sample_bytes(prior, training) + _weight_copies(prior, training),
        update=update,
    )


def count_parameters(config: PriorConfig) -> PriorParameters:
    """The weights of each part; the norm before the heads belongs to the blocks."""
    return _count(_shapes_of(config))


def step_operations(
    config: PriorConfig, batch_size: int, *, optim: OptimizerConfig, checkpoint_activations: bool = False
) -> StepOperations:
    """The operations of one optimizer step, in all processes together.

    Args:
        config: sizes.
        batch_size: samples per step, over all processes.
        optim: whether hidden weights' updates are orthogonalized.
        checkpoint_activations: compute the blocks' forward pass twice.
    """
    prior, positions = _shapes_of(config), config.layout.seq_len - 1
    matrices = [layer.weight for layer in prior.blocks.modules() if isinstance(layer, nn.Linear)]
    blocks = 6.0 * batch_size * positions * sum(weight.numel() for weight in matrices)
    pairs = sum(mask.pairs(positions) for mask in config.masks())
    attention = 12.0 * batch_size * config.dim * pairs  # D multiplications and additions, twice, per head and pair
    update = sum(_orthogonalizing(weight) for weight in matrices) if optim.hidden == "muon" else 0.0
    return StepOperations(
        blocks=blocks,
        attention=attention,
        heads=6.0 * batch_size * config.dim * _num_logits(config),
        recomputed=(blocks + attention) / 3 if checkpoint_activations else 0.0,
        update=update,
    )


def cache_bytes(config: PriorConfig, precision: PrecisionName) -> int:
    """What keys and values of one image take while it is drawn."""
    return _shapes_of(config).cache_bytes_per_row(torch.bfloat16 if precision == "bf16" else torch.float32)


def most_samples(
    config: PriorConfig, *, optim: OptimizerConfig, training: ParallelTraining, memory_gib: float, most: int
) -> int:
    """How many samples, up to `most`, pass through a process's model at once within so much memory; 0 for none."""
    one, two = (training_memory(config, samples, optim=optim, training=training) for samples in (1, 2))
    if one.held_gib(training.kind) > memory_gib:
        return 0
    room = memory_gib / one.held_gib(training.kind) * one.peak - one.state
    return min(most, 1 + int((room - one.activations) / (two.activations - one.activations)))


def _count(prior: Prior) -> PriorParameters:
    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    blocks = count(prior.blocks) + count(prior.norm)
    heads = count(prior.text_head) + count(prior.image_head)
    return PriorParameters(embeddings=count(prior) - blocks - heads, blocks=blocks, heads=heads)


def _sample_bytes(prior: Prior, training: ParallelTraining) -> float:
    """What one sample's forward pass keeps."""
    config, layout = prior.config, prior.layout
    positions = layout.seq_len - 1  # the last code is never an input
    number = _number_bytes(training)
    heads = _LOGIT_BYTES[training.precision] * _num_logits(config)
    heads += positions * config.dim * (_FLOAT_BYTES + number)
    block = positions * _block_bytes(prior, training)
    if training.checkpoint_activations:
        # logits are gone when the first block is computed again
        return config.depth * positions * config.dim * _FLOAT_BYTES + max(heads, block)
    return config.depth * block + heads


def _block_bytes(prior: Prior, training: ParallelTraining) -> float:
    """What a block keeps of one position; the sums that blocks add to are fp32 in bf16, too."""
    config, keys = prior.config, prior.layout.seq_len - 1
    number = _number_bytes(training)
    hidden = cast(nn.Linear, prior.blocks[0].get_submodule("mlp.down")).in_features
    grouped = config.num_key_value_heads / config.heads
    norms = 2 * config.dim * (_FLOAT_BYTES + number)  # what goes in, and what goes from there into a product
    heads = number * config.dim * (1 + 2 * grouped)
    queries_keys = config.dim * (1 + grouped)
    # on GPUs autocast has norms computed in fp32, of a copy where their input is bf16
    normalized = 2 * _FLOAT_BYTES if training.kind == "cuda" and number == 2 else number
    if training.kind == "cpu" and keys <= CPU_MATMUL_KEYS:
        # queries, keys and values lie in a row for the products; probabilities are kept in both formats
        attention = number * 4 * config.dim + config.heads * keys * (_FLOAT_BYTES + (2 if number == 2 else 0))
    else:
        attention = number * (queries_keys + config.dim) + _FLOAT_BYTES * config.heads
    statistics = 2 * _FLOAT_BYTES * (2 + config.heads + config.num_key_value_heads)
    return norms + heads + normalized * queries_keys + attention + statistics + number * 4 * hidden


def _weight_copies(prior: Prior, training: ParallelTraining) -> float:
    """Matrices in bf16, of which a step makes one copy each and keeps it for its backward pass."""
    if training.precision == "fp32":
        return 0.0
    sizes = _count(prior)
    # of blocks that are computed again, FSDP has no copy in between
    is_gathered = training.checkpoint_activations and training.strategy == "fsdp" and training.processes > 1
    return 2 * (sizes.heads + sizes.blocks * (_GATHERED_BLOCKS / len(prior.blocks) if is_gathered else 1))


def _num_logits(config: PriorConfig) -> int:
    layout = config.layout
    return layout.image_len * layout.codebook_size + (layout.text_len - 1) * layout.num_text_ids


def _number_bytes(training: ParallelTraining) -> int:
    return 2 if training.precision == "bf16" else 4


def _orthogonalizing(weight: torch.Tensor) -> float:
    """Operations of Muon's iteration: three products per round, on the matrix with its shorter side first."""
    rows, columns = sorted(weight.shape)
    return _NEWTON_SCHULZ_ROUNDS * (4.0 * rows**2 * columns + 2.0 * rows**3)


def _by_shape(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    shapes: dict[torch.Size, list[nn.Parameter]] = {}
    for parameter in parameters:
        shapes.setdefault(parameter.shape, []).append(parameter)
    return list(shapes.values())


def _shapes_of(config: PriorConfig) -> Prior:
    """The model without its numbers."""
    with torch.device("meta"):
        return Prior(config)
