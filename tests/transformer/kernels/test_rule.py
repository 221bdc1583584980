"""The masks inside Triton say the same as the mask object, for every pair of positions."""

import pytest
import torch

from transformer.masks import AttentionMask

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402 -- after the check that it is there

from transformer.kernels import rule  # noqa: E402

pytestmark = pytest.mark.interpreter

MASKS = [
    {"kind": "full"},
    {"kind": "row"},
    {"kind": "row", "row_mode": "own_row"},
    {"kind": "column"},
    *(
        {"kind": "conv", "conv_mode": mode, "kernel_size": size, "dilation": dilation}
        for mode in ("raster", "clip", "quadrant", "torus")
        for size in (3, 11)
        for dilation in (1, 2)
    ),
    {"kind": "conv", "conv_mode": "quadrant", "kernel_size": 4},
]
SHAPES = [(0, 4, 4), (3, 7, 5), (5, 1, 9), (4, 3, 2), (6, 8, 16)]


@triton.jit
def matrix_kernel(
    output,
    RULE: tl.constexpr,
    TEXT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SIDE: tl.constexpr,
    STEP: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    at = tl.arange(0, 256)
    if KEYS_FIRST:
        allowed = rule.allowed(at[None, :], at[:, None], RULE, TEXT, HEIGHT, WIDTH, SIDE, STEP)
    else:
        allowed = rule.allowed(at[:, None], at[None, :], RULE, TEXT, HEIGHT, WIDTH, SIDE, STEP)
    tl.store(output + at[:, None] * 256 + at[None, :], allowed.to(tl.int8))


@pytest.mark.parametrize("options", MASKS, ids=lambda options: "-".join(str(value) for value in options.values()))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("keys_first", [False, True], ids=["queries-first", "keys-first"])
def test_the_rule_allows_what_the_mask_allows(options: dict, shape: tuple[int, int, int], keys_first: bool) -> None:
    mask = AttentionMask(text_len=shape[0], grid_height=shape[1], grid_width=shape[2], **options)
    output = torch.full((256, 256), -1, dtype=torch.int8)
    matrix_kernel[(1,)](output, **rule.constants(mask), KEYS_FIRST=keys_first)
    allowed = output[: mask.seq_len, : mask.seq_len].bool()
    assert torch.equal(allowed.T if keys_first else allowed, mask.dense())
