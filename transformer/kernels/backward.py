"""The sparse backward pass: one kernel for the gradient of the queries, one for those of keys and values.

Both compute the probabilities anew from the saved log-sum-exp (Dao et al. 2022, arXiv 2205.14135, appendix B.2). Each
gradient is written by the one program that owns its tile, without atomic additions, so that equal inputs give equal
bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from transformer.kernels import rule
from transformer.kernels.launch import LOG2_E, prepare, strides_of
from transformer.kernels.launch_config import LaunchConfig
from transformer.kernels.reference import Gradients
from transformer.kernels.rule import BASE, COLUMNS, PART
from transformer.masks import AttentionMask

# B batch, H query heads, Hkv key-value heads, N positions, T of them text, D head width; Q queries, K keys of a block.


@triton.jit
def query_gradient_kernel(
    query,
    key,
    value,
    output,
    grad_output,
    logsumexp,
    delta,
    grad_query,
    table,
    entries,
    scale,
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
    grad_batch,
    grad_head,
    grad_position,
    grad_query_batch,
    grad_query_head,
    grad_query_position,
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
    """Writes one tile of `grad_query` [B, H, N, D] and of `delta` float32 [B, H, N].

    delta is the sum over channels of output * grad_output, which the other kernel reads. The grid is that of the
    forward pass.
    """
    program = tl.program_id(0)
    row = table + program % tiles * COLUMNS
    head = program // tiles % heads
    batch = (program // tiles // heads).to(tl.int64)
    query += batch * query_batch + head.to(tl.int64) * query_head
    grad_query += batch * grad_query_batch + head.to(tl.int64) * grad_query_head
    key += batch * key_batch + (head // GROUP).to(tl.int64) * key_head
    value += batch * value_batch + (head // GROUP).to(tl.int64) * value_head
    output += batch * output_batch + head.to(tl.int64) * output_head
    grad_output += batch * grad_batch + head.to(tl.int64) * grad_head
    logsumexp += (batch * heads + head) * length
    delta += (batch * heads + head) * length

    q_at, q_valid = rule.tile_positions(tl.load(row + BASE), length, BLOCK_Q, TILE_WIDTH, TEXT, WIDTH)
    grad_out = rule.load_rows(grad_output, q_at, grad_position, q_valid, HEAD_DIM, PADDED_DIM, True, UPCAST)
    out = rule.load_rows(output, q_at, output_position, q_valid, HEAD_DIM, PADDED_DIM, True, UPCAST)
    d = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    tl.store(delta + q_at, d, mask=q_valid)
    q = rule.load_rows(query, q_at, query_position, q_valid, HEAD_DIM, PADDED_DIM, True, UPCAST)
    lse = tl.load(logsumexp + q_at, mask=q_valid, other=0.0)
    grad = tl.zeros([BLOCK_Q, PADDED_DIM], tl.float32)

    full_first, full_end, blocks, run_start, run_blocks, run_end, window = rule.visits(row)
    for index in range(full_first, full_end):
        k_at = rule.full_block_positions(index, run_start, entries, BLOCK_K, LISTED)
        k = rule.load_rows(key, k_at, key_position, k_at, HEAD_DIM, PADDED_DIM, False, UPCAST)
        v = rule.load_rows(value, k_at, value_position, k_at, HEAD_DIM, PADDED_DIM, False, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [Q, K]
        weights = tl.exp2(scores - lse[:, None])
        grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - d[:, None])
        grad = tl.dot(grad_scores.to(k.dtype), k, grad, input_precision=PRECISION)

    for step in range(blocks - (full_end - full_first)):
        index = tl.where(step < full_first, step, step + (full_end - full_first))
        k_at, k_valid = rule.block_positions(
            index, run_start, run_blocks, run_end, window, entries, length, BLOCK_K, LISTED, WINDOW_WIDTH, TEXT, WIDTH
        )
        k = rule.load_rows(key, k_at, key_position, k_valid, HEAD_DIM, PADDED_DIM, True, UPCAST)
        v = rule.load_rows(value, k_at, value_position, k_valid, HEAD_DIM, PADDED_DIM, True, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [Q, K]
        allowed = rule.allowed(q_at[:, None], k_at[None, :], RULE, TEXT, HEIGHT, WIDTH, SIDE, STEP)
        weights = tl.where(allowed & k_valid[None, :], tl.exp2(scores - lse[:, None]), 0.0)
        grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - d[:, None])
        grad = tl.dot(grad_scores.to(k.dtype), k, grad, input_precision=PRECISION)

    rule.store_rows(grad_query, q_at, grad_query_position, q_valid, grad * scale, HEAD_DIM, PADDED_DIM)


@triton.jit
def key_value_gradient_kernel(
    query,
    key,
    value,
    grad_output,
    logsumexp,
    delta,
    grad_key,
    grad_value,
    part_key,
    part_value,
    table,
    entries,
    scale,
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
    grad_batch,
    grad_head,
    grad_position,
    grad_key_batch,
    grad_key_head,
    grad_key_position,
    grad_value_batch,
    grad_value_head,
    grad_value_position,
    length,
    tiles,
    key_heads,
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
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes one tile of `grad_key` and `grad_value` [B, Hkv, N, D], summed over the queries of the group.

    The grid is tiles * Hkv * B programs, tiles fastest. Rows of the table that hold a part of a tile's work write
    float32 sums to `part_key` and `part_value` [PARTS, B, Hkv, T, D] instead, to be added up afterwards.
    """
    program = tl.program_id(0)
    row = table + program % tiles * COLUMNS
    key_head_index = program // tiles % key_heads
    batch = (program // tiles // key_heads).to(tl.int64)
    key += batch * key_batch + key_head_index.to(tl.int64) * key_head
    grad_key += batch * grad_key_batch + key_head_index.to(tl.int64) * grad_key_head
    value += batch * value_batch + key_head_index.to(tl.int64) * value_head
    grad_value += batch * grad_value_batch + key_head_index.to(tl.int64) * grad_value_head
    first_head = key_head_index * GROUP
    query += batch * query_batch + first_head.to(tl.int64) * query_head
    grad_output += batch * grad_batch + first_head.to(tl.int64) * grad_head
    logsumexp += (batch * key_heads * GROUP + first_head) * length
    delta += (batch * key_heads * GROUP + first_head) * length

    k_at, k_valid = rule.tile_positions(tl.load(row + BASE), length, BLOCK_K, TILE_WIDTH, TEXT, WIDTH)
    k = rule.load_rows(key, k_at, key_position, k_valid, HEAD_DIM, PADDED_DIM, True, UPCAST)
    v = rule.load_rows(value, k_at, value_position, k_valid, HEAD_DIM, PADDED_DIM, True, UPCAST)
    grad_k = tl.zeros([BLOCK_K, PADDED_DIM], tl.float32)
    grad_v = tl.zeros([BLOCK_K, PADDED_DIM], tl.float32)
    full_first, full_end, blocks, run_start, run_blocks, run_end, window = rule.visits(row)

    # one loop over the blocks of all heads of the group: a loop within a loop needs more registers than there are
    full = full_end - full_first
    for step in range(GROUP * full):
        member, index = rule.member_and_index(step, full, GROUP)
        q_at = rule.full_block_positions(full_first + index, run_start, entries, BLOCK_Q, LISTED)
        q = rule.load_rows(query + member * query_head, q_at, query_position, q_at, HEAD_DIM, PADDED_DIM, False, UPCAST)
        grad_out = rule.load_rows(
            grad_output + member * grad_head, q_at, grad_position, q_at, HEAD_DIM, PADDED_DIM, False, UPCAST
        )
        lse = tl.load(logsumexp + member * length + q_at)
        d = tl.load(delta + member * length + q_at)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2  # [K, Q]
        weights = tl.exp2(scores - lse[None, :])
        grad_v = tl.dot(weights.to(q.dtype), grad_out, grad_v, input_precision=PRECISION)
        grad_weights = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - d[None, :])
        grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)

    for step in range(GROUP * (blocks - full)):
        member, index = rule.member_and_index(step, blocks - full, GROUP)
        index = tl.where(index < full_first, index, index + full)
        q_at, q_valid = rule.block_positions(
            index, run_start, run_blocks, run_end, window, entries, length, BLOCK_Q, LISTED, WINDOW_WIDTH, TEXT, WIDTH
        )
        q = rule.load_rows(
            query + member * query_head, q_at, query_position, q_valid, HEAD_DIM, PADDED_DIM, True, UPCAST
        )
        grad_out = rule.load_rows(
            grad_output + member * grad_head, q_at, grad_position, q_valid, HEAD_DIM, PADDED_DIM, True, UPCAST
        )
        lse = tl.load(logsumexp + member * length + q_at, mask=q_valid, other=0.0)
        d = tl.load(delta + member * length + q_at, mask=q_valid, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2  # [K, Q]
        allowed = rule.allowed(q_at[None, :], k_at[:, None], RULE, TEXT, HEIGHT, WIDTH, SIDE, STEP)
        weights = tl.where(allowed & q_valid[None, :], tl.exp2(scores - lse[None, :]), 0.0)
        grad_v = tl.dot(weights.to(q.dtype), grad_out, grad_v, input_precision=PRECISION)
        grad_weights = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - d[None, :])
        grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)

    grad_k *= scale
    if PARTS == 1:
        rule.store_rows(grad_key, k_at, grad_key_position, k_valid, grad_k, HEAD_DIM, PADDED_DIM)
        rule.store_rows(grad_value, k_at, grad_value_position, k_valid, grad_v, HEAD_DIM, PADDED_DIM)
    else:
        part = tl.load(row + PART)
        if part < 0:
            rule.store_rows(grad_key, k_at, grad_key_position, k_valid, grad_k, HEAD_DIM, PADDED_DIM)
            rule.store_rows(grad_value, k_at, grad_value_position, k_valid, grad_v, HEAD_DIM, PADDED_DIM)
        else:
            batches = tl.num_programs(0) // tiles // key_heads
            place = (part.to(tl.int64) * batches + batch) * key_heads + key_head_index
            part_key += place * TEXT * HEAD_DIM
            part_value += place * TEXT * HEAD_DIM
            rule.store_rows(part_key, k_at, HEAD_DIM, k_valid, grad_k, HEAD_DIM, PADDED_DIM)
            rule.store_rows(part_value, k_at, HEAD_DIM, k_valid, grad_v, HEAD_DIM, PADDED_DIM)


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    mask: AttentionMask,
    scale: float,
    *,
    query_config: LaunchConfig | None = None,
    key_config: LaunchConfig | None = None,
) -> Gradients:
    """`reference.backward` by the Triton kernels.

    Args:
        grad_output: [B, H, N, D], any strides with the last dimension contiguous.
        query: [B, H, N, D].
        key: [B, Hkv, N, D].
        value: [B, Hkv, N, D].
        output: [B, H, N, D], as `forward.forward` returned it.
        logsumexp: float32 [B, H, N], likewise.
        mask: the mask.
        scale: factor of the scores, positive.
        query_config: block sizes of the queries' gradient; None takes those of `launch_config`.
        key_config: likewise, of the gradients of keys and values.
    """
    batch, heads, length, head_dim = query.shape
    key_heads = key.shape[1]
    grad_query, grad_key, grad_value = (torch.empty_like(tensor) for tensor in (query, key, value))
    delta = torch.empty_like(logsumexp)

    launch = prepare("query_gradient", query, key, mask, query_config)
    query_gradient_kernel[(launch.tiles * heads * batch,)](
        query,
        key,
        value,
        output,
        grad_output,
        logsumexp,
        delta,
        grad_query,
        launch.table,
        launch.entries,
        scale,
        scale * LOG2_E,
        *strides_of(query, key, value, output, grad_output, grad_query),
        length,
        launch.tiles,
        heads,
        **launch.constants,
        **launch.options,
    )

    launch = prepare("key_value_gradient", query, key, mask, key_config)
    shape = (launch.parts, batch, key_heads, mask.text_len, head_dim) if launch.parts > 1 else (1,)
    part_key, part_value = (torch.empty(shape, dtype=torch.float32, device=query.device) for _ in range(2))
    key_value_gradient_kernel[(launch.tiles * key_heads * batch,)](
        query,
        key,
        value,
        grad_output,
        logsumexp,
        delta,
        grad_key,
        grad_value,
        part_key,
        part_value,
        launch.table,
        launch.entries,
        scale,
        scale * LOG2_E,
        *strides_of(query, key, value, grad_output, grad_key, grad_value),
        length,
        launch.tiles,
        key_heads,
        PARTS=launch.parts,
        **launch.constants,
        **launch.options,
    )
    if launch.parts > 1:
        text = slice(0, min(mask.text_len, length))
        grad_key[:, :, text] = part_key[:, :, :, text].sum(dim=0)
        grad_value[:, :, text] = part_value[:, :, :, text].sum(dim=0)
    return Gradients(grad_query, grad_key, grad_value)
