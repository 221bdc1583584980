"""The kernels as PyTorch operators, so that compilers, checkpointing and data parallelism treat them as such.

Importing this imports no Triton. On CUDA tensors, and on any tensor under Triton's interpreter, the operators run the
kernels; on CPU tensors otherwise the plain reference, for tracing and tests (`transformer.attention` refuses to train
that way).
"""

import os
from typing import Any

import torch
from torch import Tensor

from transformer.kernels import int8_reference, reference
from transformer.kernels.flops import register_flop_formulas
from transformer.masks import AttentionMask

# B batch, H query heads, Hkv key-value heads, N positions, S slots of a cache, D head width.
# Of products: R rows, K input channels, N output channels.


def sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, *, scale: float | None = None
) -> Tensor:
    """`reference.attention` by the sparse kernels, differentiable.

    Args:
        query: [B, H, N, D]; float32, float16 or bfloat16, last dimension contiguous.
        key: [B, Hkv, N, D], same dtype.
        value: [B, Hkv, N, D], same dtype.
        mask: the mask; N is at most its length.
        scale: factor of the scores, positive; None is 1/sqrt(D).

    Returns:
        [B, H, N, D], in memory as the queries are.

    Raises:
        ValueError: if the scale is not positive.
    """
    return _sparse_attention(query, key, value, mask.code, _checked_scale(scale, query))[0]


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    mask: AttentionMask,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention of one new image position against a cache, which receives its key and value.

    Args:
        query: [B, H, 1, D], in the cache's dtype.
        key: [B, Hkv, 1, D].
        value: [B, Hkv, 1, D].
        keys: [B, Hkv, S, D], laid out as `transformer.cache_layout.CacheLayout` says; written in place.
        values: [B, Hkv, S, D], likewise.
        position: int32 [1] or [B], where in the sequence the new position stands, on the same device.
        mask: the layer's mask.
        scale: factor of the scores, positive; None is 1/sqrt(D).

    Returns:
        [B, H, 1, D].

    Raises:
        ValueError: if the scale is not positive.
    """
    return _decode_attention(query, key, value, keys, values, position, mask.code, _checked_scale(scale, query))


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T of a weight stored as int8, for few rows and inference only.

    Args:
        x: [R, K]; float32, float16 or bfloat16.
        weight: int8 [N, K], contiguous.
        scale: float32 [N], contiguous; row n of W is scale[n] * weight[n].

    Returns:
        [R, N] in the dtype of x.

    Raises:
        ValueError: if a shape, dtype or layout is another.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or scale.shape != weight.shape[:1]:
        raise ValueError(
            f"int8_linear needs x [R, K], weight [N, K] and scale [N]; "
            f"got {list(x.shape)}, {list(weight.shape)} and {list(scale.shape)}"
        )
    if weight.dtype != torch.int8 or scale.dtype != torch.float32 or not x.is_floating_point():
        raise ValueError(
            f"int8_linear needs floating x, an int8 weight and float32 scales; "
            f"got {x.dtype}, {weight.dtype} and {scale.dtype}"
        )
    if not weight.is_contiguous() or not scale.is_contiguous():
        raise ValueError(
            f"int8_linear needs a contiguous weight and scale; got strides {weight.stride()} and {scale.stride()}"
        )
    return _int8_linear(x, weight, scale)


@torch.library.custom_op("tessera::sparse_attention", mutates_args=())
def _sparse_attention(query: Tensor, key: Tensor, value: Tensor, mask: str, scale: float) -> tuple[Tensor, Tensor]:
    """The output [B, H, N, D] and its logsumexp float32 [B, H, N]."""
    module = _kernels(query, "forward")
    with torch.cuda.device_of(query):  # Triton launches on the current device, wherever the tensors are
        return tuple(module.forward(query, key, value, AttentionMask.from_code(mask), scale))


@torch.library.custom_op("tessera::sparse_attention_backward", mutates_args=())
def _sparse_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    mask: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values."""
    if grad_output.stride(3) != 1:  # such as an expanded one, of a sum
        grad_output = grad_output.contiguous()
    module = _kernels(query, "backward")
    named = AttentionMask.from_code(mask)
    with torch.cuda.device_of(query):
        return tuple(module.backward(grad_output, query, key, value, output, logsumexp, named, scale))


@torch.library.custom_op("tessera::decode_attention", mutates_args=("keys", "values"))
def _decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    mask: str,
    scale: float,
) -> Tensor:
    """The output [B, H, 1, D]."""
    module = _kernels(query, "decode")
    with torch.cuda.device_of(query):
        return module.decode(query, key, value, keys, values, position, AttentionMask.from_code(mask), scale)


@torch.library.custom_op("tessera::int8_linear", mutates_args=())
def _int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The product [R, N]."""
    module = _kernels(x, "int8_linear")
    with torch.cuda.device_of(x):
        return module.int8_linear(x, weight, scale)


def _kernels(tensor: Tensor, name: str) -> Any:
    """The module that computes for a tensor; Triton is imported here, at the first use."""
    if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return int8_reference if name == "int8_linear" else reference
    register_flop_formulas()
    if name == "forward":
        from transformer.kernels import forward as module
    elif name == "backward":
        from transformer.kernels import backward as module
    elif name == "int8_linear":
        from transformer.kernels import int8_linear as module
    else:
        from transformer.kernels import decode as module
    return module


@_sparse_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: str, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@_sparse_attention_backward.register_fake
def _(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    mask: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@_decode_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    mask: str,
    scale: float,
) -> Tensor:
    return torch.empty_like(query)


@_int8_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.mask, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the log-sum-exp, which nobody differentiates


def _differentiate(ctx: Any, grad_output: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 5
    query, key, value, output, logsumexp = ctx.saved_tensors
    gradients = _sparse_attention_backward(grad_output, query, key, value, output, logsumexp, ctx.mask, ctx.scale)
    return (*gradients, None, None)


_sparse_attention.register_autograd(_differentiate, setup_context=_save)


def _checked_scale(scale: float | None, query: Tensor) -> float:
    if scale is None:
        return query.shape[-1] ** -0.5
    if not scale > 0:
        raise ValueError(f"the scale of attention scores must be positive; got {scale}")
    return scale
