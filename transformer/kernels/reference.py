"""Masked attention as its definition says, in float64 with a dense mask: what every kernel is compared with."""

from typing import NamedTuple

import torch
from torch import Tensor

from transformer.cache_layout import CacheLayout
from transformer.masks import AttentionMask

# B batch, H query heads, Hkv key-value heads (H = Hkv * group), N positions, D head width.


class Attended(NamedTuple):
    """What a forward pass leaves for the backward pass.

    Attributes:
        output: [B, H, N, D], dtype of the queries.
        logsumexp: float32 [B, H, N], base-2 logarithm of each query's sum of 2^(score * log2 e).
    """

    output: Tensor
    logsumexp: Tensor


class Gradients(NamedTuple):
    """Gradients of queries [B, H, N, D], keys and values [B, Hkv, N, D], each in its input's dtype."""

    query: Tensor
    key: Tensor
    value: Tensor


_LOG2_E = 1.4426950408889634


def attention(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, *, scale: float | None = None) -> Tensor:
    """Softmax attention of the first N positions of a mask, differentiable.

    Args:
        query: [B, H, N, D], floating.
        key: [B, Hkv, N, D]; Hkv divides H, and each key-value head serves as many neighboring query heads.
        value: [B, Hkv, N, D].
        mask: allows the pairs (query, key).
        scale: factor of the scores; None is 1/sqrt(D).

    Returns:
        [B, H, N, D] in the dtype of `query`.
    """
    return (_scores(query, key, mask, scale).softmax(dim=-1) @ _per_query_head(value, query)).to(query.dtype)


def forward(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float) -> Attended:
    """`attention` and the statistic that its backward pass starts from."""
    scores = _scores(query, key, mask, scale)
    logsumexp = scores.logsumexp(dim=-1)
    output = (scores - logsumexp[..., None]).exp() @ _per_query_head(value, query)
    return Attended(_like(query, output), (logsumexp * _LOG2_E).float())


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    mask: AttentionMask,
    scale: float,
) -> Gradients:
    """Gradients of `attention` from what `forward` left (Dao et al. 2022, arXiv 2205.14135, appendix B.2)."""
    probability = (_scores(query, key, mask, scale) - logsumexp[..., None].double() / _LOG2_E).exp()  # [B, H, N, N]
    grad_output, output = grad_output.double(), output.double()
    grad_value = probability.transpose(-1, -2) @ grad_output
    grad_probability = grad_output @ _per_query_head(value, query).transpose(-1, -2)
    delta = (grad_output * output).sum(dim=-1, keepdim=True)  # [B, H, N, 1]
    grad_scores = probability * (grad_probability - delta) * scale
    grad_query = grad_scores @ _per_query_head(key, query)
    grad_key = grad_scores.transpose(-1, -2) @ query.double()
    groups = (key.shape[1], -1)
    return Gradients(
        _like(query, grad_query),
        _like(key, grad_key.unflatten(1, groups).sum(dim=2)),
        _like(value, grad_value.unflatten(1, groups).sum(dim=2)),
    )


def _scores(query: Tensor, key: Tensor, mask: AttentionMask, scale: float | None) -> Tensor:
    """Float64 [B, H, N, N], minus infinity where the mask forbids."""
    if scale is None:
        scale = query.shape[-1] ** -0.5
    scores = query.double() @ _per_query_head(key, query).transpose(-1, -2) * scale
    return scores.masked_fill(~mask.dense(query.shape[2]).to(query.device), -torch.inf)


def _like(model: Tensor, values: Tensor) -> Tensor:
    """The values in dtype and memory layout of `model`, as the kernels return them."""
    return torch.empty_like(model).copy_(values)


def _per_query_head(tensor: Tensor, query: Tensor) -> Tensor:
    """[B, Hkv, N, D] to float64 [B, H, N, D]."""
    return tensor.double().repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    mask: AttentionMask,
    scale: float,
) -> Tensor:
    """Stores the key and value [B, Hkv, 1, D] of one new image position in its cache [B, Hkv, S, D] and attends.

    Position is int32 [1] or [B]; the cache is laid out as `transformer.cache_layout.CacheLayout` says.
    """
    layout = CacheLayout(mask)
    outputs = []
    for row, at in enumerate(position.expand(query.shape[0]).tolist()):
        keys[row, :, layout.slot(at)], values[row, :, layout.slot(at)] = key[row, :, 0], value[row, :, 0]
        visible = layout.visible(at, query.device)
        one = slice(row, row + 1)
        scores = query[one].double() @ _per_query_head(keys[one, :, visible], query).transpose(-1, -2) * scale
        outputs.append(scores.softmax(dim=-1) @ _per_query_head(values[one, :, visible], query))
    return torch.cat(outputs).to(query.dtype)
