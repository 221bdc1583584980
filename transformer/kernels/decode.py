"""One new image position against a cache that holds only what its mask can still reach.

The kernel stores the new key and value, and reads from the cache just the slots that the mask allows. The position is
read on the device and every loop bound is fixed, so that one CUDA graph serves all positions. Where batch x heads is
too small to fill the GPU, the keys are split among several programs whose results a second kernel combines (the idea
of FlashDecoding, Dao et al. 2023, pytorch.org/blog/flash-decoding).
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from transformer.kernels import rule
from transformer.kernels.launch import INTERPRETED, LOG2_E, compile_constants, compile_options, config_of, gpu_of
from transformer.kernels.launch_config import LaunchConfig, decode_splits, number_format
from transformer.masks import AttentionMask

# B batch, H query heads, Hkv key-value heads, T text positions, S slots of the cache, D head width, K keys of a block.


@triton.jit
def decode_kernel(
    query,
    new_key,
    new_value,
    keys,
    values,
    position,
    output,
    part_mean,
    part_peak,
    part_total,
    scale_log2,
    query_batch,
    query_head,
    new_key_batch,
    new_key_head,
    new_value_batch,
    new_value_head,
    keys_batch,
    keys_head,
    keys_slot,
    values_batch,
    values_head,
    values_slot,
    output_batch,
    output_head,
    key_heads,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    POSITION_PER_ROW: tl.constexpr,
    RULE: tl.constexpr,
    TEXT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SIDE: tl.constexpr,
    STEP: tl.constexpr,
    REACH: tl.constexpr,
    RING: tl.constexpr,
    WINDOW_WIDTH: tl.constexpr,
    WINDOW_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS_PER_SPLIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes `output` [B, H, D], or with SPLITS > 1 the parts of it that `combine_kernel` adds up.

    The grid is (Hkv * B, SPLITS). The queries of a group share the keys that are read, as rows of one matrix.
    """
    key_head = tl.program_id(0) % key_heads
    batch = (tl.program_id(0) // key_heads).to(tl.int64)
    split = tl.program_id(1)
    keys += batch * keys_batch + key_head.to(tl.int64) * keys_head
    values += batch * values_batch + key_head.to(tl.int64) * values_head
    now = tl.load(position + batch * POSITION_PER_ROW)
    channel = tl.arange(0, PADDED_DIM)
    is_channel = channel < HEAD_DIM
    member = tl.arange(0, PADDED_GROUP)
    heads = key_head * GROUP + member
    is_member = member < GROUP
    q = tl.load(
        query + batch * query_batch + heads[:, None] * query_head + channel[None, :],
        mask=is_member[:, None] & is_channel[None, :],
        other=0.0,
    )
    if UPCAST:
        q = q.to(tl.float32)

    peak = tl.full([PADDED_GROUP], -1.0e30, tl.float32)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    mean = tl.zeros([PADDED_GROUP, PADDED_DIM], tl.float32)
    if split == 0:
        # the new position sees itself, out of the registers
        own_key = tl.load(
            new_key + batch * new_key_batch + key_head * new_key_head + channel, mask=is_channel, other=0.0
        )
        own_value = tl.load(
            new_value + batch * new_value_batch + key_head * new_value_head + channel, mask=is_channel, other=0.0
        )
        slot = _slot(now, TEXT, HEIGHT, WIDTH, RING)
        tl.store(keys + slot * keys_slot + channel, own_key, mask=is_channel)
        tl.store(values + slot * values_slot + channel, own_value, mask=is_channel)
        peak = tl.sum(q.to(tl.float32) * own_key.to(tl.float32)[None, :], 1) * scale_log2
        total = tl.full([PADDED_GROUP], 1.0, tl.float32)
        mean += own_value.to(tl.float32)[None, :]

    text_blocks: tl.constexpr = (TEXT + BLOCK_K - 1) // BLOCK_K
    blocks: tl.constexpr = text_blocks + (WINDOW_KEYS + BLOCK_K - 1) // BLOCK_K
    first = split * BLOCKS_PER_SPLIT
    for index in range(first, tl.minimum(first + BLOCKS_PER_SPLIT, blocks)):
        text_at = index * BLOCK_K + tl.arange(0, BLOCK_K)
        place = text_at - text_blocks * BLOCK_K
        image_at = _window_position(place, now, RULE, TEXT, WIDTH, SIDE, STEP, REACH, WINDOW_WIDTH)
        is_seen = (place < WINDOW_KEYS) & (image_at >= TEXT) & (image_at < now)
        is_seen = is_seen & rule.allowed(now, image_at, RULE, TEXT, HEIGHT, WIDTH, SIDE, STEP)
        is_text = index < text_blocks
        is_seen = tl.where(is_text, text_at < TEXT, is_seen)
        slot = tl.where(is_text, text_at, _slot(image_at, TEXT, HEIGHT, WIDTH, RING))
        k = rule.load_rows(keys, slot, keys_slot, is_seen, HEAD_DIM, PADDED_DIM, True, UPCAST)
        v = rule.load_rows(values, slot, values_slot, is_seen, HEAD_DIM, PADDED_DIM, True, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [group, K]
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        mean = tl.dot(weights.to(v.dtype), v, mean * shrink[:, None], input_precision=PRECISION)
        peak = new_peak

    kept = is_member[:, None] & is_channel[None, :]
    if SPLITS == 1:
        pointers = output + batch * output_batch + heads[:, None] * output_head + channel[None, :]
        tl.store(pointers, (mean / total[:, None]).to(output.dtype.element_ty), mask=kept)
    else:
        part = ((batch * key_heads + key_head) * GROUP + member) * SPLITS + split
        tl.store(part_mean + part[:, None] * HEAD_DIM + channel[None, :], mean, mask=kept)
        tl.store(part_peak + part, peak, mask=is_member)
        tl.store(part_total + part, total, mask=is_member)


@triton.jit
def combine_kernel(
    part_mean,
    part_peak,
    part_total,
    output,
    output_batch,
    output_head,
    heads,
    SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """Writes `output` [B, H, D] from the parts; the grid is B * H programs."""
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    split = tl.arange(0, PADDED_SPLITS)
    channel = tl.arange(0, PADDED_DIM)
    is_split, is_channel = split < SPLITS, channel < HEAD_DIM
    part = tl.program_id(0).to(tl.int64) * SPLITS + split
    peak = tl.load(part_peak + part, mask=is_split, other=-1.0e30)
    weight = tl.exp2(peak - tl.max(peak, 0))
    total = tl.sum(tl.load(part_total + part, mask=is_split, other=0.0) * weight, 0)
    means = tl.load(
        part_mean + part[:, None] * HEAD_DIM + channel[None, :], mask=is_split[:, None] & is_channel[None, :], other=0.0
    )
    mean = tl.sum(means * weight[:, None], 0) / total
    pointers = output + batch * output_batch + head * output_head + channel
    tl.store(pointers, mean.to(output.dtype.element_ty), mask=is_channel)


@triton.jit
def _slot(at, TEXT: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, RING: tl.constexpr):
    """Where the cache keeps an image position: in a ring, or column by column where RING is 0."""
    place = at - TEXT
    if RING == 0:
        slot = TEXT + place % WIDTH * HEIGHT + place // WIDTH
    else:
        slot = TEXT + place % RING
    return slot


@triton.jit
def _window_position(
    place,
    now,
    RULE: tl.constexpr,
    TEXT: tl.constexpr,
    WIDTH: tl.constexpr,
    SIDE: tl.constexpr,
    STEP: tl.constexpr,
    REACH: tl.constexpr,
    WINDOW_WIDTH: tl.constexpr,
):
    """The positions that the places 0, 1, ... of the window of `now` stand for."""
    if RULE == rule.COLUMN:
        at = TEXT + (now - TEXT) % WIDTH + place * WIDTH
    elif WINDOW_WIDTH > 0:
        # the convolution's window, row by row
        at = now + STEP * ((place // WINDOW_WIDTH - SIDE) * WIDTH + place % WINDOW_WIDTH - SIDE)
    else:
        at = now - REACH + place
    return at


def constants(mask: AttentionMask, config: LaunchConfig, group: int, *, splits: int) -> dict[str, Any]:
    """The compile-time constants of `decode_kernel` that follow from the mask and the split."""
    window_width, window_keys = _window(mask)
    blocks = _num_blocks(mask, config)
    return {
        **rule.constants(mask),
        "GROUP": group,
        "PADDED_GROUP": max(16, triton.next_power_of_2(group)),
        "REACH": mask.reach,
        "RING": 0 if mask.kind == "column" else mask.reach + 1,
        "WINDOW_WIDTH": window_width,
        "WINDOW_KEYS": window_keys,
        "SPLITS": splits,
        "BLOCKS_PER_SPLIT": math.ceil(blocks / splits),
        "POSITION_PER_ROW": 0,
    }


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    mask: AttentionMask,
    scale: float,
    *,
    config: LaunchConfig | None = None,
    splits: int | None = None,
) -> Tensor:
    """Stores one new key and value in the cache and attends.

    Args:
        query: [B, H, 1, D] of the new position, in the cache's dtype, last dimension contiguous.
        key: [B, Hkv, 1, D].
        value: [B, Hkv, 1, D].
        keys: [B, Hkv, S, D], the cache as `transformer.cache_layout.CacheLayout` lays it out; written in place.
        values: [B, Hkv, S, D].
        position: int32 [1] or [B] on the device: where in the sequence the new position stands; of the image.
        mask: the layer's mask.
        scale: factor of the scores, positive.
        config: block size; None takes that of `launch_config`.
        splits: among how many programs the keys of a head are split; None takes `decode_splits`.

    Returns:
        [B, H, 1, D].
    """
    batch, heads, _, head_dim = query.shape
    key_heads = keys.shape[1]
    config = config or config_of("decode", query, mask)
    if splits is None:
        splits = decode_splits(batch * key_heads, blocks=_num_blocks(mask, config), processors=gpu_of(query).processors)
    output = torch.empty_like(query)
    part_shape = (batch, heads, splits, head_dim) if splits > 1 else (1, 1, 1, 1)
    part_mean = torch.empty(part_shape, dtype=torch.float32, device=query.device)
    part_peak, part_total = (torch.empty_like(part_mean[..., 0]) for _ in range(2))
    formats = compile_constants(head_dim, number_format(query.dtype), config)
    formats["UPCAST"] = INTERPRETED and query.dtype == torch.bfloat16
    del formats["BLOCK_Q"]
    decode_kernel[(key_heads * batch, splits)](
        query,
        key,
        value,
        keys,
        values,
        position,
        output,
        part_mean,
        part_peak,
        part_total,
        scale * LOG2_E,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        *output.stride()[:2],
        key_heads,
        **constants(mask, config, heads // key_heads, splits=splits)
        | {"POSITION_PER_ROW": position.stride(0) if len(position) > 1 else 0},
        **formats,
        **compile_options(config),
    )
    if splits > 1:
        combine_kernel[(batch * heads,)](
            part_mean,
            part_peak,
            part_total,
            output,
            *output.stride()[:2],
            heads,
            SPLITS=splits,
            PADDED_SPLITS=triton.next_power_of_2(splits),
            HEAD_DIM=head_dim,
            PADDED_DIM=formats["PADDED_DIM"],
            enable_fp_fusion=True,
        )
    return output


def _window(mask: AttentionMask) -> tuple[int, int]:
    """Columns of the window that holds the earlier image keys (0: a run), and how many places it has."""
    if mask.kind == "column":
        return 1, mask.grid_height - 1
    if mask.kind == "conv" and mask.conv_mode != "torus":
        side = mask.kernel_size - 1 if mask.conv_mode == "quadrant" else mask.kernel_size // 2
        width = side + 1 if mask.conv_mode == "quadrant" else 2 * side + 1
        if width <= mask.grid_width:  # else places of neighboring rows would coincide
            return width, (side + 1) * width
    return 0, mask.reach


def _num_blocks(mask: AttentionMask, config: LaunchConfig) -> int:
    return math.ceil(mask.text_len / config.block_k) + math.ceil(_window(mask)[1] / config.block_k)
