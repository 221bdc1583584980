"""The sparse forward pass: fused softmax attention over the blocks that a schedule names.

One program per tile of queries, head and batch entry keeps running maxima and sums (Milakov & Gimelshein 2018,
arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135) in float32 and in base 2, first over the blocks that are allowed
whole, then over those where each pair is tested.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from transformer.kernels import rule
from transformer.kernels.launch import LOG2_E, prepare, strides_of
from transformer.kernels.launch_config import LaunchConfig
from transformer.kernels.reference import Attended
from transformer.kernels.rule import BASE, COLUMNS
from transformer.masks import AttentionMask

# B batch, H query heads, Hkv key-value heads, N positions, D head width; Q queries of a tile, K keys of a block.


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    output,
    logsumexp,
    table,
    entries,
    scale_log2,
    query_batch,
    query_head,
    query_position,
    key_batch,
    key_head,
    key_position,
    value_batch,
    value_head,
    value_position,
    output_batch,
    output_head,
    output_position,
    length,
    tiles,
    heads,
    GROUP: tl.constexpr,
    RULE: tl.constexpr,
    TEXT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SIDE: tl.constexpr,
    STEP: tl.constexpr,
    LISTED: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    WINDOW_WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes one tile of `output` [B, H, N, D] and `logsumexp` float32 [B, H, N].

    The grid is tiles * H * B programs, tiles fastest: those of one head share its text keys in the L2 cache.
    """
    program = tl.program_id(0)
    row = table + program % tiles * COLUMNS
    head = program // tiles % heads
    batch = (program // tiles // heads).to(tl.int64)
    query += batch * query_batch + head.to(tl.int64) * query_head
    key += batch * key_batch + (head // GROUP).to(tl.int64) * key_head
    value += batch * value_batch + (head // GROUP).to(tl.int64) * value_head
    output += batch * output_batch + head.to(tl.int64) * output_head
    logsumexp += (batch * heads + head) * length

    q_at, q_valid = rule.tile_positions(tl.load(row + BASE), length, BLOCK_Q, TILE_WIDTH, TEXT, WIDTH)
    q = rule.load_rows(query, q_at, query_position, q_valid, HEAD_DIM, PADDED_DIM, True, UPCAST)
    # finite, so that a row without any allowed key in its first blocks makes no NaN
    peak = tl.full([BLOCK_Q], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mean = tl.zeros([BLOCK_Q, PADDED_DIM], tl.float32)

    full_first, full_end, blocks, run_start, run_blocks, run_end, window = rule.visits(row)
    for index in range(full_first, full_end):
        k_at = rule.full_block_positions(index, run_start, entries, BLOCK_K, LISTED)
        k = rule.load_rows(key, k_at, key_position, k_at, HEAD_DIM, PADDED_DIM, False, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [Q, K]
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        v = rule.load_rows(value, k_at, value_position, k_at, HEAD_DIM, PADDED_DIM, False, UPCAST)
        total = total * shrink + tl.sum(weights, 1)
        mean = tl.dot(weights.to(v.dtype), v, mean * shrink[:, None], input_precision=PRECISION)
        peak = new_peak

    for step in range(blocks - (full_end - full_first)):
        index = tl.where(step < full_first, step, step + (full_end - full_first))
        k_at, k_valid = rule.block_positions(
            index, run_start, run_blocks, run_end, window, entries, length, BLOCK_K, LISTED, WINDOW_WIDTH, TEXT, WIDTH
        )
        k = rule.load_rows(key, k_at, key_position, k_valid, HEAD_DIM, PADDED_DIM, True, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [Q, K]
        allowed = rule.allowed(q_at[:, None], k_at[None, :], RULE, TEXT, HEIGHT, WIDTH, SIDE, STEP)
        scores = tl.where(allowed & k_valid[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        v = rule.load_rows(value, k_at, value_position, k_valid, HEAD_DIM, PADDED_DIM, True, UPCAST)
        total = total * shrink + tl.sum(weights, 1)
        mean = tl.dot(weights.to(v.dtype), v, mean * shrink[:, None], input_precision=PRECISION)
        peak = new_peak

    total = tl.where(q_valid, total, 1.0)  # what is not stored may have seen nothing
    rule.store_rows(output, q_at, output_position, q_valid, mean / total[:, None], HEAD_DIM, PADDED_DIM)
    tl.store(logsumexp + q_at, peak + tl.log2(total), mask=q_valid)


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float, *, config: LaunchConfig | None = None
) -> Attended:
    """`reference.forward` by the Triton kernel.

    Args:
        query: [B, H, N, D], last dimension contiguous.
        key: [B, Hkv, N, D].
        value: [B, Hkv, N, D].
        mask: the mask.
        scale: factor of the scores, positive.
        config: block sizes; None takes those of `launch_config`.
    """
    launch = prepare("forward", query, key, mask, config)
    batch, heads, length, _ = query.shape
    # in the layout of the queries: what follows reads them the same way
    output = torch.empty_like(query)
    logsumexp = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    forward_kernel[(launch.tiles * heads * batch,)](
        query,
        key,
        value,
        output,
        logsumexp,
        launch.table,
        launch.entries,
        scale * LOG2_E,
        *strides_of(query, key, value, output),
        length,
        launch.tiles,
        heads,
        **launch.constants,
        **launch.options,
    )
    return Attended(output, logsumexp)
