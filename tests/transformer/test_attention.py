"""The two ways of attention agree, with and without a mask, in values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from transformer.attention import CPU_MATMUL_KEYS, attend, attend_by_matmul
from transformer.masks import AttentionMask, MaskKind


@pytest.mark.parametrize("kind", ["full", "row", "column", "conv", None])
def test_written_out_attention_equals_the_fused_one(kind: MaskKind | None) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = None
    if kind is not None:
        mask = AttentionMask(kind=kind, text_len=3, grid_height=4, grid_width=5, kernel_size=3).dense()
    inputs = [torch.randn(2, 3, 23, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    theirs = [tensor.clone().requires_grad_() for tensor in inputs]
    first = attend_by_matmul(ours[0], ours[1], ours[2], mask)
    second = F.scaled_dot_product_attention(theirs[0], theirs[1], theirs[2], attn_mask=mask)
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)  # its softmax is in fp32
    weights = torch.randn(first.shape, generator=generator, dtype=torch.float64)
    (first * weights).sum().backward()
    (second * weights).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_long_sequences_take_the_fused_path_and_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, CPU_MATMUL_KEYS + 1, 4, generator=generator) for _ in range(3))
    mask = torch.ones(CPU_MATMUL_KEYS + 1, CPU_MATMUL_KEYS + 1, dtype=torch.bool).tril()
    torch.testing.assert_close(
        attend(query, key, value, mask), attend_by_matmul(query, key, value, mask), atol=1e-5, rtol=1e-4
    )
