"""Who takes part in benchmarks/attention.py: ours, PyTorch's fused attention, and FlexAttention in its variants."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.attention_cells import Cell, Group
from transformer.attention import attention
from transformer.cache import LayerCache
from transformer.cache_layout import CacheLayout
from transformer.kernels import ops
from transformer.masks import AttentionMask

# B batch, H heads, N positions, D head width, S slots of a cache, T text positions.

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Tiles must divide blocks. All of these are among the candidates of FlexAttention's own search.
_FLEX_COMMON: dict[str, Any] = {
    **{f"fwd_{name}": value for name, value in (("BLOCK_N", 64), ("num_warps", 4), ("num_stages", 3))},
    **{f"bwd_BLOCK_{name}": 64 for name in ("M1", "N1", "M2", "N2")},
    **{f"bwd_{name}": value for name, value in (("num_warps", 4), ("num_stages", 3))},
    "PRESCALE_QK": True,
}
_FLEX_TILES: dict[str, tuple[int, dict[str, Any]]] = {
    "blocks of 128, tiles of 128x64": (128, _FLEX_COMMON | {"fwd_BLOCK_M": 128}),
    "blocks of 64": (64, _FLEX_COMMON | {"fwd_BLOCK_M": 64}),
}


class Contestant(NamedTuple):
    """One way to attend.

    Attributes:
        name: for people.
        group: what it is compared as.
        attend: from queries, keys and values [B, H, N, D] to [B, H, N, D].
        mask: what it computes; its result is checked against this.
        order: int64 [N], the raster position of each token that it is given; None for raster order itself.
        is_tuning: whether its first call tries many kernels and takes minutes.
    """

    name: str
    group: Group
    attend: Attend
    mask: AttentionMask
    order: Tensor | None = None
    is_tuning: bool = False


def contestants(cell: Cell, device: torch.device, *, tune_flex: bool = False) -> list[Contestant]:
    """Everybody who takes part in a cell; whoever needs compiling compiles in its first call.

    Args:
        cell: the mask and its shapes.
        device: of the tensors.
        tune_flex: let FlexAttention search for its kernels too (mode max-autotune).
    """
    mask = cell.mask
    causal = replace(mask, kind="full")
    dense = mask.dense().to(device)
    found = [Contestant("ours", "ours", lambda q, k, v: ops.sparse_attention(q, k, v, mask), mask)]
    for name, backend in _SDPA_BACKENDS.items():
        found.append(Contestant(f"SDPA {name}", "sdpa causal", _sdpa(backend), causal))
    found.append(Contestant("SDPA masked", "sdpa masked", lambda q, k, v: _sdpa_masked(q, k, v, dense), mask))
    found += _flex_contestants(cell, device, tune_flex=tune_flex)
    return found


def wrong_contestant(cell: Cell) -> Contestant:
    """One that computes another mask than it says; the check of every contestant has to refuse it."""
    other = replace(cell.mask, kind="row" if cell.mask.kind == "column" else "column")
    return Contestant("wrong", "flex", lambda q, k, v: ops.sparse_attention(q, k, v, other), cell.mask)


def dispatched(cell: Cell, device: torch.device) -> list[Contestant]:
    """The product's own choice, and SDPA with the same mask, which is what it could have taken."""
    dense = cell.mask.dense().to(device)
    ours = Contestant("ours, dispatched", "ours", lambda q, k, v: attention(q, k, v, cell.mask), cell.mask)
    if cell.mask.kind == "full":
        return [ours, Contestant("SDPA causal", "sdpa causal", lambda q, k, v: _sdpa_any(q, k, v), cell.mask)]
    masked = Contestant("SDPA masked", "sdpa masked", lambda q, k, v: _sdpa_masked(q, k, v, dense), cell.mask)
    return [ours, masked]


def column_major(mask: AttentionMask, device: torch.device) -> Tensor:
    """The raster position of every token when the image lies column by column, int64 [N]."""
    image = torch.arange(mask.text_len, mask.seq_len).view(mask.grid_height, mask.grid_width).T.flatten()
    return torch.cat([torch.arange(mask.text_len), image]).to(device)


def _sdpa(backend: SDPBackend) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa_any(query, key, value)

    return attend


def _sdpa_any(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def _sdpa_masked(query: Tensor, key: Tensor, value: Tensor, dense: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=dense)


def _flex_contestants(cell: Cell, device: torch.device, *, tune_flex: bool) -> Iterator[Contestant]:
    """As documented, then with other blocks and tiles, in the token orders that make sense for the mask."""
    mask = cell.mask
    variants: list[tuple[str, Group, int, dict[str, Any] | None]] = [("blocks of 128", "flex", 128, None)]
    for name, (block, options) in _FLEX_TILES.items():
        variants.append((name, "flex tuned", block, options))
    for name, group, block, options in variants:
        yield Contestant(f"Flex, {name}", group, _flex(mask, device, block, options), mask)
    if tune_flex and mask.kind != "column":
        for block in (64, 128):
            attend = _flex(mask, device, block, None, search=True)
            yield Contestant(f"Flex, blocks of {block}, max-autotune", "flex tuned", attend, mask, is_tuning=True)
    if is_flash_installed():
        attend = _flex(mask, device, 128, {"BACKEND": "FLASH"})
        yield Contestant("Flex, FLASH backend", "flex flash", attend, mask)
    if mask.kind != "column":
        return
    order = column_major(mask, device)
    inverse = order.argsort()
    for name, group, block, options in variants:
        attend = _flex(mask, device, block, options, columns=True)
        name, group = f"Flex, column-major, {name}", "flex column-major" if group == "flex" else group
        yield Contestant(name, group, attend, mask, order)
        yield Contestant(f"{name}, reordered", "flex reordered", _reordered(attend, order, inverse), mask)
    if tune_flex:
        for block in (64, 128):
            attend = _flex(mask, device, block, None, columns=True, search=True)
            name = f"Flex, column-major, blocks of {block}, max-autotune"
            yield Contestant(name, "flex tuned", attend, mask, order, is_tuning=True)


def is_flash_installed() -> bool:
    """Whether FlexAttention's FLASH backend (FlashAttention 4) can be used."""
    return importlib.util.find_spec("flash_attn") is not None and (
        importlib.util.find_spec("flash_attn.cute") is not None
    )


def _reordered(attend: Attend, order: Tensor, inverse: Tensor) -> Attend:
    def attend_in_raster_order(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query[:, :, order], key[:, :, order], value[:, :, order])[:, :, inverse]

    return attend_in_raster_order


def _flex(
    mask: AttentionMask,
    device: torch.device,
    block: int,
    options: dict[str, Any] | None,
    *,
    columns: bool = False,
    search: bool = False,
) -> Attend:
    """FlexAttention; on a CPU its eager form, for nothing is measured there.

    Args:
        mask: what it computes.
        device: of the tensors.
        block: side of its blocks.
        options: kernel options; None leaves the choice to FlexAttention.
        columns: whether the tokens of the image lie column by column.
        search: try all of its kernels in the first call.
    """

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if not columns:
            return mask.allowed(query, key)
        same_column = (query - mask.text_len) // mask.grid_height == (key - mask.text_len) // mask.grid_height
        return (key <= query) & ((key < mask.text_len) | same_column)

    @cache
    def prepared() -> tuple[Callable[..., Any], BlockMask]:
        length = mask.seq_len
        blocks = create_block_mask(allowed, None, None, length, length, device=device, BLOCK_SIZE=block)
        if device.type == "cpu":
            return flex_attention, blocks
        mode = "max-autotune-no-cudagraphs" if search else None
        # fullgraph: past the limit of recompilations it would silently run unfused
        return torch.compile(flex_attention, dynamic=False, fullgraph=True, mode=mode), blocks

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attention_, blocks = prepared()
        return attention_(query, key, value, block_mask=blocks, kernel_options=options)

    return attend


class Decoder(NamedTuple):
    """One way to take a step.

    Attributes:
        name: for people.
        mask: what it computes.
        steps: every one takes the step [B, H, 1, D] on a cache of its own.
    """

    name: str
    mask: AttentionMask
    steps: list[Callable[[], Tensor]]


def decoders(
    query: Tensor, key: Tensor, value: Tensor, at: int, mask: AttentionMask, *, cached_bytes: int
) -> Iterator[Decoder]:
    """Ours on caches of what the mask reaches; SDPA on whole ones: a slice of it, or all of it under a dense mask.

    Args:
        query: [B, H, N, D] of a whole sequence.
        key: likewise; every cache holds the positions before the new one.
        value: likewise.
        at: the new position.
        mask: the layer's.
        cached_bytes: how much the caches of one contestant hold together at least.
    """
    new_query, new_key, new_value = (tensor[:, :, at : at + 1].contiguous() for tensor in (query, key, value))
    device, length = query.device, key.shape[2]
    position = torch.tensor([at], dtype=torch.int32, device=device)

    def caches(layout_mask: AttentionMask) -> list[LayerCache]:
        layout = CacheLayout(layout_mask)
        shape = (2, *key.shape[:2], layout.num_slots, key.shape[3])
        copies = min(400, max(2, -(-cached_bytes // (math.prod(shape) * key.element_size()))))
        filled = []
        for _ in range(copies):
            keys, values = key.new_zeros(shape).unbind(0)
            filled.append(LayerCache(keys, values, layout))
            filled[-1].write(0, key[:, :, :at], value[:, :, :at])
        return filled

    def ours(held: LayerCache) -> Tensor:
        return ops.decode_attention(new_query, new_key, new_value, held.keys, held.values, position, mask)

    def sliced(backend: SDPBackend, held: LayerCache) -> Tensor:
        held.write(at, new_key, new_value)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(new_query, held.keys[:, :, : at + 1], held.values[:, :, : at + 1])

    def static(visible: Tensor, held: LayerCache) -> Tensor:
        held.keys.index_copy_(2, index, new_key)
        held.values.index_copy_(2, index, new_value)
        return F.scaled_dot_product_attention(new_query, held.keys, held.values, attn_mask=visible)

    yield Decoder("ours", mask, [partial(ours, held) for held in caches(mask)])
    causal, index = replace(mask, kind="full"), position.long()
    whole = caches(causal)
    for name, backend in _SDPA_BACKENDS.items():
        yield Decoder(f"SDPA {name}, slice of the cache", causal, [partial(sliced, backend, held) for held in whole])
    for name, computed in (("causal", causal), ("sparse", mask)):
        visible = computed.allowed(index, torch.arange(length, device=device))[None]  # [1, N]
        yield Decoder(f"SDPA, static cache, {name} mask", computed, [partial(static, visible, held) for held in whole])
