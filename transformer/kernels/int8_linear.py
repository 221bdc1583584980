"""A few rows times a weight stored as int8 with one scale per output channel (LLM.int8(), Dettmers et al. 2022, 2.1).

With few rows the time goes into reading the weight, so each program reads its output channels once, along the input
channels, and widens them in registers: every int8 is exact in bf16 and fp16, and the sums are float32.

Matrix units multiply 16 rows or more on one side and 8 on the other: the weight is given the side of 16, so that one or
two rows of x waste least. One form then serves any number of rows, and what a row gives does not depend on the others.
A block of 16 output channels is too small to be shared by several warps; instead each warp takes a part of the input
channels, as one entry of a batch of products, and the parts are added at the end.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from transformer.kernels.launch import INTERPRETED
from transformer.kernels.launch_config import Format, number_format

# R rows, K input channels, N output channels; W warps, each with a part of the input channels.


@triton.jit
def int8_linear_kernel(
    x,
    weight,
    scales,
    output,
    rows,
    channels,
    inputs,
    x_row,
    output_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes `output` [R, N]; the grid is (blocks of R, blocks of N), so that neighbors in time share their weights."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_row, is_channel = row < rows, channel < channels
    of_part = tl.arange(0, PARTS)[:, None] * BLOCK_INPUTS + tl.arange(0, BLOCK_INPUTS)[None, :]  # [W, K]
    weight_rows = weight + channel.to(tl.int64)[None, :, None] * inputs
    x_rows = x + row.to(tl.int64)[None, None, :] * x_row
    total = tl.zeros([PARTS, BLOCK_CHANNELS, BLOCK_ROWS], tl.float32)
    for first in range(0, inputs, PARTS * BLOCK_INPUTS):
        at = first + of_part
        is_input = at < inputs
        w = tl.load(weight_rows + at[:, None, :], mask=is_input[:, None, :] & is_channel[None, :, None], other=0)
        a = tl.load(x_rows + at[:, :, None], mask=is_input[:, :, None] & is_row[None, None, :], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
        total = tl.dot(w.to(a.dtype), a, total, input_precision=PRECISION)  # [W, N, R]
    product = tl.sum(total, 0) * tl.load(scales + channel, mask=is_channel, other=0.0)[:, None]
    tl.store(
        output + row.to(tl.int64)[None, :] * output_row + channel[:, None],
        product.to(output.dtype.element_ty),
        mask=is_channel[:, None] & is_row[None, :],
    )


class Blocks(NamedTuple):
    """How the product is cut and compiled.

    Attributes:
        channels: output channels of a program.
        inputs: input channels that a warp reads at a time.
        num_warps: warps of 32 threads per program.
        num_stages: depth of the software pipeline.
    """

    channels: int
    inputs: int
    num_warps: int
    num_stages: int


# Few channels per program, because 1,024 output channels are to occupy half of a large GPU's processors at least; and
# 16 KB of weights on their way at a time. Not timed yet.
BLOCKS: dict[Format, Blocks] = {
    "half": Blocks(16, 64, 4, 4),
    "tf32": Blocks(16, 32, 4, 3),
    "float32": Blocks(16, 32, 4, 3),
}


def block_rows(rows: int) -> int:
    """Rows of a program, of so many in all: one or two times the width of a matrix instruction."""
    return 8 if rows <= 8 else 16


def constants(rows: int, products: Format) -> dict[str, Any]:
    """The compile-time constants of `int8_linear_kernel`."""
    blocks = BLOCKS[products]
    return {
        "BLOCK_ROWS": block_rows(rows),
        "BLOCK_CHANNELS": blocks.channels,
        "BLOCK_INPUTS": blocks.inputs,
        "PARTS": blocks.num_warps,
        "PRECISION": "tf32" if products == "tf32" else "ieee",  # of no effect on half precision
        "UPCAST": False,
    }


def options(products: Format) -> dict[str, Any]:
    """The compiler's options."""
    blocks = BLOCKS[products]
    return {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages, "enable_fp_fusion": True}


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`int8_reference.int8_linear` by the kernel, with float32 sums.

    Args:
        x: [R, K]; float32, float16 or bfloat16.
        weight: int8 [N, K], contiguous.
        scale: float32 [N], contiguous.

    Returns:
        [R, N] in the dtype of x.
    """
    (rows, inputs), channels = x.shape, weight.shape[0]
    if x.stride(1) != 1:
        x = x.contiguous()
    output = torch.empty(rows, channels, dtype=x.dtype, device=x.device)
    if output.numel() == 0:
        return output
    products = number_format(x.dtype)
    of_kernel = constants(rows, products)
    # the interpreter computes on bf16's bits as if they were integers
    of_kernel["UPCAST"] = INTERPRETED and x.dtype == torch.bfloat16
    grid = (triton.cdiv(rows, of_kernel["BLOCK_ROWS"]), triton.cdiv(channels, of_kernel["BLOCK_CHANNELS"]))
    int8_linear_kernel[grid](
        x,
        weight,
        scale,
        output,
        rows,
        channels,
        inputs,
        x.stride(0),
        output.stride(0),
        **of_kernel,
        **options(products),
    )
    return output
