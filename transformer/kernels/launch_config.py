"""Block sizes, warps and pipeline depth of every kernel launch: pure functions over small tables.

There is no autotuning at run time: a table can be read, tested and compiled ahead of time for every GPU that it names,
and a first call takes no longer than the next. The rows hold the largest blocks, of those that suit the masks, which
compile without spilled registers (benchmarks/results/kernel_aot.json). They have not been timed yet: `python -m
benchmarks.attention --sections tune` times the candidates on a GPU.
"""

import math
from typing import Literal, NamedTuple

import torch

# D head width, T text positions.

KernelName = Literal["forward", "query_gradient", "key_value_gradient", "decode"]
Format = Literal["half", "tf32", "float32"]

HEAD_DIMS = (32, 128)
"""smallest and largest head width, in steps of 8"""
LEAST_CAPABILITY = (8, 0)
"""Ampere: the first GPUs with asynchronous copies and bf16 units"""

# Where a mask spares less than this of a causal kernel's work, or the sequence is shorter, PyTorch's own kernels are
# taken. Estimated from published rates of dense kernels, three quarters of which a sparse one may reach; not measured.
SPARSE_PAYS_FROM_RATIO = 1.4
SPARSE_PAYS_FROM_POSITIONS = 700

_SHORT_TEXT = 64  # from more text on, tiles of 128 queries read the text keys half as often as tiles of 64 would
_MOST_PARTS = 8


class LaunchConfig(NamedTuple):
    """How a kernel is cut and compiled.

    Attributes:
        block_q: queries of a tile or block.
        block_k: keys of a tile or block.
        num_warps: warps of 32 threads per program.
        num_stages: depth of the software pipeline.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


# By kernel and padded head width. Hopper and its successors of the data center: up to 227 KiB of shared memory per
# program, and matrix instructions that read it directly.
_HALF_HOPPER: dict[tuple[KernelName, int], LaunchConfig] = {
    ("forward", 32): LaunchConfig(128, 64, 8, 3),
    ("forward", 64): LaunchConfig(128, 64, 8, 3),
    ("forward", 128): LaunchConfig(128, 64, 8, 3),
    ("query_gradient", 32): LaunchConfig(64, 64, 4, 3),
    ("query_gradient", 64): LaunchConfig(64, 64, 4, 3),
    ("query_gradient", 128): LaunchConfig(64, 64, 4, 2),
    ("key_value_gradient", 32): LaunchConfig(64, 64, 4, 2),
    ("key_value_gradient", 64): LaunchConfig(64, 64, 4, 2),
    ("key_value_gradient", 128): LaunchConfig(32, 64, 8, 2),
}
# All others, within the 99 KiB of the GPUs of desktops.
_HALF: dict[tuple[KernelName, int], LaunchConfig] = {
    ("forward", 32): LaunchConfig(64, 64, 4, 3),
    ("forward", 64): LaunchConfig(64, 64, 4, 3),
    ("forward", 128): LaunchConfig(64, 64, 8, 2),
    ("query_gradient", 32): LaunchConfig(64, 64, 4, 3),
    ("query_gradient", 64): LaunchConfig(64, 64, 4, 3),
    ("query_gradient", 128): LaunchConfig(64, 64, 8, 2),
    ("key_value_gradient", 32): LaunchConfig(32, 64, 4, 2),
    ("key_value_gradient", 64): LaunchConfig(32, 64, 4, 2),
    ("key_value_gradient", 128): LaunchConfig(32, 64, 8, 2),
}
_TF32: dict[tuple[KernelName, int], LaunchConfig] = {
    ("forward", 32): LaunchConfig(64, 32, 8, 2),
    ("forward", 64): LaunchConfig(64, 32, 8, 2),
    ("forward", 128): LaunchConfig(64, 32, 8, 2),
    ("query_gradient", 32): LaunchConfig(64, 32, 4, 3),
    ("query_gradient", 64): LaunchConfig(64, 32, 8, 2),
    ("query_gradient", 128): LaunchConfig(32, 32, 4, 2),
    ("key_value_gradient", 32): LaunchConfig(32, 64, 8, 2),
    ("key_value_gradient", 64): LaunchConfig(16, 32, 4, 2),
    ("key_value_gradient", 128): LaunchConfig(16, 32, 4, 2),
}
# Without matrix units every product passes through registers, of which small blocks need fewer.
_FLOAT32: dict[tuple[KernelName, int], LaunchConfig] = {
    ("forward", 32): LaunchConfig(64, 32, 4, 2),
    ("forward", 64): LaunchConfig(16, 32, 4, 2),
    ("forward", 128): LaunchConfig(32, 16, 8, 2),
    ("query_gradient", 32): LaunchConfig(32, 32, 4, 2),
    ("query_gradient", 64): LaunchConfig(32, 32, 4, 2),
    ("query_gradient", 128): LaunchConfig(32, 16, 8, 2),
    ("key_value_gradient", 32): LaunchConfig(16, 32, 8, 2),
    ("key_value_gradient", 64): LaunchConfig(16, 32, 8, 2),
    ("key_value_gradient", 128): LaunchConfig(16, 16, 4, 2),
}
_DECODE: dict[Format, LaunchConfig] = {
    "half": LaunchConfig(16, 32, 4, 3),
    "tf32": LaunchConfig(16, 32, 4, 2),
    "float32": LaunchConfig(16, 32, 4, 2),
}


def launch_config(
    kernel: KernelName,
    *,
    head_dim: int,
    number_format: Format,
    capability: tuple[int, int],
    text_len: int,
    group: int = 1,
) -> LaunchConfig:
    """The block sizes of one launch.

    Args:
        kernel: which kernel.
        head_dim: D, within `HEAD_DIMS`.
        number_format: of the products: half (bf16 and fp16), tf32, or float32 without matrix units.
        capability: the GPU's compute capability, at least `LEAST_CAPABILITY`.
        text_len: T.
        group: query heads per head of keys and values.
    """
    if kernel == "decode":
        return _DECODE[number_format]
    width = padded_head_dim(head_dim)
    if number_format == "tf32":
        return _TF32[kernel, width]
    if number_format == "float32":
        return _FLOAT32[kernel, width]
    # a group's further heads need registers that the larger blocks leave none of
    if not is_hopper_like(capability) or (kernel == "key_value_gradient" and group > 1):
        return _HALF[kernel, width]
    if kernel == "forward" and text_len <= _SHORT_TEXT:
        return LaunchConfig(64, 64, 4, 3)
    return _HALF_HOPPER[kernel, width]


def candidates(kernel: KernelName, *, head_dim: int, capability: tuple[int, int]) -> list[LaunchConfig]:
    """What is worth timing for half precision: the tables above are to hold the fastest of these."""
    if kernel == "decode":
        return [LaunchConfig(16, block_k, warps, 3) for block_k in (32, 64, 128) for warps in (2, 4)]
    if kernel == "key_value_gradient":
        shapes = [(64, 64, 4), (64, 128, 8), (32, 64, 4), (32, 64, 8), (32, 128, 8), (128, 64, 8)]
        stages = (2,) if head_dim > 64 else (2, 3)
    else:
        shapes = [(64, 64, 4), (128, 64, 8), (128, 64, 4), (64, 32, 4), (128, 32, 4), (128, 128, 8), (64, 128, 4)]
        stages = (2, 3) if head_dim > 64 else (2, 3, 4)
    if not is_hopper_like(capability):
        shapes = [shape for shape in shapes if shape[0] * shape[1] < 128 * 128]
    return [LaunchConfig(*shape, num_stages=depth) for shape in shapes for depth in stages]


def number_format(dtype: torch.dtype) -> Format:
    """How tensors of a dtype are multiplied: float32 in tf32 where PyTorch is allowed to, else exactly."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "float32"


def padded_head_dim(head_dim: int) -> int:
    """The power of two that a head width is padded to."""
    return 2 ** (head_dim - 1).bit_length()


def is_hopper_like(capability: tuple[int, int]) -> bool:
    """Whether a program may take 227 KiB of shared memory."""
    return capability[0] in (9, 10)


def text_parts(batch_heads: int, *, text_len: int, block_k: int, processors: int) -> int:
    """Into how many parts the key-value gradient of each text tile is split, so that two programs meet each processor.

    Args:
        batch_heads: batch x key-value heads.
        text_len: T.
        block_k: keys of a tile.
        processors: multiprocessors of the GPU.
    """
    programs = batch_heads * math.ceil(text_len / block_k)
    return max(1, min(_MOST_PARTS, math.ceil(2 * processors / programs))) if programs else 1


def decode_splits(batch_heads: int, *, blocks: int, processors: int) -> int:
    """Among how many programs the `blocks` of keys of one head are split, so that each processor has one."""
    wanted = max(1, min(blocks, math.ceil(processors / max(1, batch_heads))))
    return math.ceil(blocks / math.ceil(blocks / wanted))  # as many as have something to do
