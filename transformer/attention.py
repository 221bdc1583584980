"""Masked attention behind one function: which of the ways to compute it is taken, and why."""

import importlib.util
import logging
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from transformer.cache import LayerCache
from transformer.kernels import ops, reference
from transformer.kernels.launch_config import (
    HEAD_DIMS,
    LEAST_CAPABILITY,
    SPARSE_PAYS_FROM_POSITIONS,
    SPARSE_PAYS_FROM_RATIO,
    number_format,
)
from transformer.kernels.schedule import visited_ratio
from transformer.masks import AttentionMask

# B batch, H query heads, Hkv key-value heads, N positions, D head width.

Backend = Literal["auto", "triton", "flex", "sdpa", "matmul", "reference"]

# On a CPU the fused kernel's backward pass costs more than it saves below this many keys: at 87 keys, 64 rows and 4
# heads in bf16, forward and backward took 47 to 60 ms fused and 20 to 25 ms written out.
CPU_MATMUL_KEYS = 512

_BLOCK = 64  # of the visited ratio that decides
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """How attention is computed; the result is the same up to rounding."""

    backend: Backend = "auto"
    """auto takes what suits mask, length and device; triton needs a GPU, reference is slow, in float64"""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    backend: Backend = "auto",
    scale: float | None = None,
) -> Tensor:
    """Softmax attention among the first N positions of a mask.

    Args:
        query: [B, H, N, D]; any strides with the last dimension contiguous, so [B, N, H, D] transposed does.
        key: [B, Hkv, N, D]; Hkv divides H, and each key-value head serves as many neighboring query heads.
        value: [B, Hkv, N, D].
        mask: which pairs are allowed; N is at most its length.
        backend: auto (`choose_backend`), triton (the sparse kernels), flex (PyTorch's FlexAttention), sdpa (PyTorch's
            fused kernels with a dense mask), matmul (written out) or reference (float64).
        scale: factor of the scores; None is 1/sqrt(D).

    Returns:
        [B, H, N, D] in the dtype of `value`, or under autocast in autocast's.

    Raises:
        ValueError: shapes, dtypes, strides or scale do not fit each other, the mask or the backend; says what would.
    """
    _check_shapes(query, key, value, mask)
    if scale is not None and not scale > 0:
        raise ValueError(f"the scale of attention scores must be positive; got {scale}")
    length = operator.index(query.shape[2])  # a plain number for the compiler, too: masks are made for one length
    dtype = query.dtype
    if query.device.type != "meta" and torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    else:
        _check_dtypes(query, key, value)
    chosen = _resolve(mask.code, length, query.shape[3], dtype, query.device, backend)
    if chosen == "matmul":
        return matmul_attention(query, key, value, _dense(mask.code, length, query.device), scale=scale)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if chosen == "triton":
        return ops.sparse_attention(query, key, value, mask, scale=scale)
    if chosen == "reference":
        return reference.attention(query, key, value, mask, scale=scale)
    if chosen == "flex":
        if query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad:
            raise ValueError("FlexAttention has no backward pass on a CPU; use backend auto or sdpa")
        return _flex(query, key, value, mask, scale)
    if mask.kind == "full" or length <= mask.text_len:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    # PyTorch's fused kernels take either a mask or grouped queries
    key, value = _for_each_query_head(key, query), _for_each_query_head(value, query)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=_dense(mask.code, length, query.device), scale=scale
    )


def choose_backend(
    mask: AttentionMask, length: int, *, device: torch.device, head_dim: int, dtype: torch.dtype
) -> Backend:
    """What "auto" stands for, for the first `length` positions of a mask.

    CPUs multiply dense matrices with a cached mask, written out where that is faster. GPUs take the sparse kernels
    where the mask spares enough of a causal kernel's work; where it spares little, or the sequence is short, PyTorch's.
    """
    if device.type == "cpu":
        return "matmul" if length <= CPU_MATMUL_KEYS else "sdpa"
    if length < SPARSE_PAYS_FROM_POSITIONS or length <= mask.text_len or mask.kind == "full":
        return "sdpa"
    if why_not_triton(device=device, head_dim=head_dim, dtype=dtype) is not None:
        return "sdpa"
    if number_format(dtype) == "float32":  # without matrix units, which the sparse kernels are made for
        return "sdpa"
    ratio = visited_ratio(mask, length, block_q=_BLOCK, block_k=_BLOCK)
    return "triton" if ratio >= SPARSE_PAYS_FROM_RATIO else "sdpa"


def describe_backends(
    masks: Sequence[AttentionMask],
    length: int,
    *,
    device: torch.device,
    head_dim: int,
    dtype: torch.dtype,
    backend: Backend = "auto",
) -> str:
    """What `attention` will take for a model's masks, for the user: "row, column by triton; conv by sdpa".

    Raises:
        ValueError: the backend is unknown or cannot run there.
    """
    chosen: dict[Backend, list[str]] = {}
    for mask in dict.fromkeys(masks):
        chosen.setdefault(_resolved(mask, length, head_dim, dtype, device, backend), []).append(mask.kind)
    return "; ".join(f"{', '.join(kinds)} by {name}" for name, kinds in chosen.items())


def why_not_triton(*, device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run, with what they support; None where they can."""
    if not _has_triton():
        return "backend triton needs the package triton, which is not installed (it exists for Linux)"
    is_interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not is_interpreted:
        return f"backend triton needs a CUDA GPU; got device {device.type}"
    if device.type == "cuda" and torch.version.hip:
        return "backend triton is made for NVIDIA GPUs; got an AMD GPU"
    capability = LEAST_CAPABILITY if is_interpreted else torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        needed, got = (f"{major}.{minor}" for major, minor in (LEAST_CAPABILITY, capability))
        return f"backend triton needs a GPU of compute capability {needed} or newer; got {got}"
    if not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[-1] or head_dim % 8:
        return f"backend triton supports head widths of {HEAD_DIMS[0]} to {HEAD_DIMS[-1]} in steps of 8; got {head_dim}"
    if dtype not in _DTYPES:
        return f"backend triton supports float32, float16 and bfloat16; got {dtype}"
    return None


def matmul_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention written out: two matrix products around a softmax in fp32.

    Args:
        query: [B, H, Nq, D].
        key: [B, Hkv, Nk, D].
        value: [B, Hkv, Nk, D].
        mask: bool [Nq, Nk], True where attention is allowed, every row with at least one True.
        scale: factor of the scores; None is 1/sqrt(D).

    Returns:
        [B, H, Nq, D] in the dtype of `value`.
    """
    key, value = _for_each_query_head(key, query), _for_each_query_head(value, query)
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)  # [B, H, Nq, Nk]
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: LayerCache,
    position: int | Tensor,
    *,
    backend: Backend = "auto",
    scale: float | None = None,
) -> Tensor:
    """Attention of one new position against a cache, which receives its key and value.

    Args:
        query: [B, H, 1, D].
        key: [B, Hkv, 1, D].
        value: [B, Hkv, 1, D].
        cache: of this layer, filled with all positions before; extended in place.
        position: where in the sequence the new position stands. A tensor, int32 [1] or [B] on the device, is for
            image positions and the Triton kernel only: nothing is read back from it, so that a CUDA graph may hold it.
        backend: as in `attention`; see `choose_decode_backend`.
        scale: factor of the scores; None is 1/sqrt(D).

    Returns:
        [B, H, 1, D] in the dtype of `value`.

    Raises:
        ValueError: shapes or strides do not fit the cache, the backend is unknown or cannot run here, or the mask has
            no such position.
    """
    _check_decoding(query, key, value, cache, position)
    return attend_to_cache(query, key, value, cache, position, backend=backend, scale=scale)


def attend_to_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: LayerCache,
    position: int | Tensor,
    *,
    backend: Backend = "auto",
    scale: float | None = None,
) -> Tensor:
    """`decode_attention` without its checks of shapes, for a loop whose shapes stay the same."""
    chosen = choose_decode_backend(
        device=query.device, head_dim=query.shape[3], dtype=cache.keys.dtype, backend=backend
    )
    mask = cache.layout.mask
    if chosen == "triton" and (isinstance(position, Tensor) or position >= mask.text_len):
        if not isinstance(position, Tensor):
            position = torch.full((1,), position, dtype=torch.int32, device=query.device)
        query, key, new_value = (tensor.to(cache.keys.dtype) for tensor in (query, key, value))
        keys, values = cache.keys, cache.values
        return ops.decode_attention(query, key, new_value, keys, values, position, mask, scale=scale).to(value.dtype)
    if isinstance(position, Tensor):
        raise ValueError("a position on the device is read by backend triton only; give it as a number")
    cache.write(position, key, value)
    if chosen == "matmul":
        return attend_to_stored(query, cache, position, scale=scale)
    visible = cache.layout.visible(position, query.device)
    keys, values = cache.keys[:, :, visible].to(key.dtype), cache.values[:, :, visible].to(value.dtype)
    return F.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=query.shape[1] != keys.shape[1])


def attend_to_stored(query: Tensor, cache: LayerCache, position: int, *, scale: float | None = None) -> Tensor:
    """Attention of one position, query [B, H, 1, D], to what the cache holds of all that it sees, itself included."""
    visible = cache.layout.visible(position, query.device)
    keys, values = cache.keys[:, :, visible].to(query.dtype), cache.values[:, :, visible].to(query.dtype)
    return _one_position(query, keys, values, scale)


def _one_position(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Attention of one position, query [B, H, 1, D], to all keys [B, Hkv, n, D]; one product for each row and head.

    On CPUs PyTorch's fused kernel is no faster, and what it gives for a row depends on the number of rows.
    """
    batch, heads, _, head_dim = query.shape
    query = query.reshape(batch * key.shape[1], -1, head_dim)  # [B * Hkv, H / Hkv, D]
    if scale is None:
        scale = head_dim**-0.5
    if scale != 1:
        query = query * scale
    scores = torch.bmm(query, key.flatten(0, 1).transpose(1, 2))  # [B * Hkv, H / Hkv, n]
    attended = torch.bmm(scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype), value.flatten(0, 1))
    return attended.view(batch, heads, 1, head_dim)


@lru_cache(maxsize=256)
def choose_decode_backend(
    *, device: torch.device, head_dim: int, dtype: torch.dtype, backend: Backend = "auto"
) -> Literal["triton", "sdpa", "matmul"]:
    """How one new position is decoded; says so in the log, once for each combination.

    The kernel where it can run, for every mask: it reads no more than the mask allows (and has not been timed yet).
    Otherwise the visible slots are gathered and given to PyTorch's kernels, on a CPU to plain products; the other names
    of `Backend` ask for that, too.

    Raises:
        ValueError: the backend is unknown or cannot run here.
    """
    _check_backend(backend)
    why_not = why_not_triton(device=device, head_dim=head_dim, dtype=dtype)
    if backend == "triton" and why_not:
        raise ValueError(why_not)
    if backend == "triton" or (backend == "auto" and not why_not and device.type == "cuda"):
        chosen: Literal["triton", "sdpa", "matmul"] = "triton"
    else:
        chosen = "matmul" if device.type == "cpu" else "sdpa"
    logger.info("decoding on %s: %s", device, chosen)
    return chosen


def _resolve(
    mask: str, length: int, head_dim: int, dtype: torch.dtype, device: torch.device, backend: Backend
) -> Backend:
    """The backend to take; the compiler sees it, and the dense mask below, as constants.

    Masks come as their codes, for not every version of the compiler can hand over a dataclass.
    """
    return _resolved(AttentionMask.from_code(mask), length, head_dim, dtype, device, backend)


@lru_cache(maxsize=256)
def _resolved(
    mask: AttentionMask, length: int, head_dim: int, dtype: torch.dtype, device: torch.device, backend: Backend
) -> Backend:
    """Checks the backend, and says in the log, once for each combination, what was chosen.

    What was chosen stays: PyTorch's precision of float32 products has to be set before the first call.
    """
    _check_backend(backend)
    chosen = backend
    if backend == "auto":
        chosen = choose_backend(mask, length, device=device, head_dim=head_dim, dtype=dtype)
    elif backend == "triton":
        why_not = why_not_triton(device=device, head_dim=head_dim, dtype=dtype)
        if why_not:
            raise ValueError(why_not)
    logger.info("%s attention over %d positions on %s: %s", mask.kind, length, device, chosen)
    return chosen


def _dense(mask: str, length: int, device: torch.device) -> Tensor:
    return _cached_dense(AttentionMask.from_code(mask), length, device)


@lru_cache(maxsize=64)
def _cached_dense(mask: AttentionMask, length: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # made in it, the mask would be useless to a later pass with gradients
        return mask.dense(length).to(device)


# What torch.compiler.assume_constant_result does, which would import the compiler, and Triton with it.
for function in (_resolve, _dense):
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float | None) -> Tensor:
    block_mask = _flex_block_mask(mask, query.shape[2], query.device)
    return _flex_function(query.device.type)(
        query, key, value, block_mask=block_mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


@lru_cache(maxsize=64)
def _flex_block_mask(mask: AttentionMask, length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    with torch.inference_mode(False):  # as in `_cached_dense`
        return create_block_mask(
            lambda batch, head, query, key: mask.allowed(query, key), None, None, length, length, device=device
        )


@lru_cache
def _flex_function(device_type: str) -> Callable[..., Any]:
    """FlexAttention, compiled where that is what makes it fast; its CPU kernels know no backward pass."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if device_type == "cuda" else flex_attention


def _for_each_query_head(tensor: Tensor, query: Tensor) -> Tensor:
    """[B, Hkv, N, D] to [B, H, N, D]; the tensor itself where there is nothing to repeat."""
    group = query.shape[1] // tensor.shape[1]
    return tensor if group == 1 else tensor.repeat_interleave(group, dim=1)


@lru_cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _check_backend(backend: str) -> None:
    if backend not in get_args(Backend):
        raise ValueError(f"attention backend is one of {', '.join(get_args(Backend))}; got {backend!r}")


def _check_decoding(query: Tensor, key: Tensor, value: Tensor, cache: LayerCache, position: int | Tensor) -> None:
    batch, key_heads, _, head_dim = cache.keys.shape
    one = (batch, key_heads, 1, head_dim)
    is_grouped = query.dim() == 4 and (query.shape[0], *query.shape[2:]) == (batch, 1, head_dim)
    if not is_grouped or query.shape[1] % key_heads or tuple(key.shape) != one or tuple(value.shape) != one:
        raise ValueError(
            f"decoding needs query [{batch}, a multiple of {key_heads}, 1, {head_dim}] and key and value {list(one)}, "
            f"as the cache has them; got {list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    _check_strides(query, key, value)
    if isinstance(position, Tensor):
        if position.dtype != torch.int32 or position.shape not in ((1,), (batch,)) or position.device != query.device:
            raise ValueError(
                f"a position on the device must be int32 [1] or [{batch}] on {query.device}; "
                f"got {position.dtype} {list(position.shape)} on {position.device}"
            )
    elif not 0 <= position < cache.layout.mask.seq_len:
        raise ValueError(f"position must lie in [0, {cache.layout.mask.seq_len}); got {position}")


def _check_strides(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.stride(3) != 1:
            raise ValueError(
                f"the last dimension of {name} must be contiguous (stride 1), as after .contiguous(); "
                f"got strides {tensor.stride()}"
            )


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> None:
    if not isinstance(mask, AttentionMask):
        raise ValueError(f"attention takes an AttentionMask, not a matrix; got {type(mask).__name__}")
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape or query.shape[1] % max(1, key.shape[1]):
        raise ValueError(
            "attention needs query [B, H, N, D] and key and value [B, Hkv, N, D] with H a multiple of Hkv; "
            f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if (query.shape[0], *query.shape[2:]) != (key.shape[0], *key.shape[2:]):
        raise ValueError(
            f"query and key must agree in batch, positions and head width; got {tuple(query.shape)} "
            f"and {tuple(key.shape)}"
        )
    if not 1 <= query.shape[2] <= mask.seq_len:
        raise ValueError(
            f"attention takes 1 to {mask.seq_len} positions, as the mask has them "
            f"({mask.text_len} text and {mask.grid_height}x{mask.grid_width} image); got {query.shape[2]}"
        )
    _check_strides(query, key, value)


def _check_dtypes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if not query.device == key.device == value.device:
        raise ValueError(
            f"query, key and value must lie on one device; got {query.device}, {key.device} and {value.device}"
        )
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise ValueError(
            f"query, key and value must have one floating dtype; got {query.dtype}, {key.dtype} and {value.dtype}"
        )
