"""Masked attention: one visible choice between plain matrix products and PyTorch's fused kernels."""

import torch
from torch import Tensor
from torch.nn import functional as F

# B batch, H heads, Nq query positions, Nk key positions, D head width.

# On a CPU the fused kernel's backward pass costs more than it saves below this many keys: at 87 keys, 64 rows and 4
# heads in bf16, forward and backward took 47 to 60 ms fused and 20 to 25 ms written out.
CPU_MATMUL_KEYS = 512


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention with scale 1/sqrt(D).

    Args:
        query: [B, H, Nq, D].
        key: [B, H, Nk, D].
        value: [B, H, Nk, D].
        mask: bool [Nq, Nk], True where attention is allowed, every row with at least one True; None allows all.

    Returns:
        [B, H, Nq, D] in the dtype of `value`.
    """
    if query.device.type == "cpu" and key.shape[2] <= CPU_MATMUL_KEYS:
        return attend_by_matmul(query, key, value, mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def attend_by_matmul(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` written out: two matrix products around a softmax in fp32."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # [B, H, Nq, Nk]
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value
