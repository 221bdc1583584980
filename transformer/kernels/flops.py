"""How many floating-point operations the sparse operators do, for PyTorch's `FlopCounterMode`."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from transformer.masks import AttentionMask


@lru_cache
def register_flop_formulas() -> None:
    """Tells PyTorch's counter the formulas below.

    Not done where the operators are defined, because the counter imports Triton: training does it, and the first launch
    of a kernel. Call it to count before that.
    """
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.tessera.sparse_attention)(_forward_flops)
    register_flop_formula(torch.ops.tessera.sparse_attention_backward)(_backward_flops)
    register_flop_formula(torch.ops.tessera.decode_attention)(_decode_flops)


def _forward_flops(
    query_shape: Sequence[int], key_shape: Any, value_shape: Any, mask: str, *args: Any, **kwargs: Any
) -> int:
    """Two products of D multiplications and additions per allowed pair."""
    batch, heads, length, head_dim = query_shape
    return 4 * head_dim * batch * heads * AttentionMask.from_code(mask).pairs(length)


def _backward_flops(
    grad_shape: Sequence[int],
    query_shape: Any,
    key_shape: Any,
    value_shape: Any,
    output_shape: Any,
    logsumexp_shape: Any,
    mask: str,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Five products, as in PyTorch's own formula; that the scores are computed twice is not counted."""
    batch, heads, length, head_dim = grad_shape
    return 10 * head_dim * batch * heads * AttentionMask.from_code(mask).pairs(length)


def _decode_flops(
    query_shape: Sequence[int],
    key_shape: Any,
    value_shape: Any,
    keys_shape: Any,
    values_shape: Any,
    position_shape: Any,
    mask: str,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Of the position that sees the most: which one is decoded, only the device knows."""
    batch, heads, _, head_dim = query_shape
    return 4 * head_dim * batch * heads * _most_keys(AttentionMask.from_code(mask))


@lru_cache
def _most_keys(mask: AttentionMask) -> int:
    return int(mask.dense().sum(dim=1).max())
