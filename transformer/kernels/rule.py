"""The masks inside Triton: which pairs are allowed, which positions a tile owns, and which a block visits.

`allowed` says the same as `AttentionMask.allowed`, in few instructions: on a GPU the test of a pair costs about as much
as its share of the matrix products. Differences are compared as unsigned numbers, so that one comparison bounds them
from both sides, and all divisions happen on vectors, before they meet in a matrix of pairs.
"""

import triton
import triton.language as tl

from transformer.kernels import schedule
from transformer.masks import AttentionMask

# Q queries and K keys of a block, H x G image grid, T text positions.

FULL = tl.constexpr(0)
ROW_WINDOW = tl.constexpr(1)
OWN_ROW = tl.constexpr(2)
COLUMN = tl.constexpr(3)
CONV_RASTER = tl.constexpr(4)
CONV_CLIP = tl.constexpr(5)
CONV_QUADRANT = tl.constexpr(6)
CONV_TORUS = tl.constexpr(7)

_FAR = tl.constexpr(1 << 30)

BASE = tl.constexpr(schedule.BASE)
FULL_FIRST = tl.constexpr(schedule.FULL_FIRST)
FULL_END = tl.constexpr(schedule.FULL_END)
BLOCKS = tl.constexpr(schedule.BLOCKS)
RUN_START = tl.constexpr(schedule.RUN_START)
RUN_BLOCKS = tl.constexpr(schedule.RUN_BLOCKS)
RUN_END = tl.constexpr(schedule.RUN_END)
WINDOW = tl.constexpr(schedule.WINDOW)
PART = tl.constexpr(schedule.PART)
COLUMNS = tl.constexpr(schedule.COLUMNS)


def constants(mask: AttentionMask) -> dict[str, int]:
    """The mask as the compile-time constants that the kernels take."""
    side = mask.kernel_size // 2
    if mask.kind == "full":
        rule = FULL
    elif mask.kind == "row":
        rule = ROW_WINDOW if mask.row_mode == "window" else OWN_ROW
    elif mask.kind == "column":
        rule = COLUMN
    elif mask.conv_mode == "quadrant":
        rule, side = CONV_QUADRANT, mask.kernel_size - 1
    else:
        rule = {"raster": CONV_RASTER, "clip": CONV_CLIP, "torus": CONV_TORUS}[mask.conv_mode]
    return {
        "RULE": rule.value,
        "TEXT": mask.text_len,
        "HEIGHT": mask.grid_height,
        "WIDTH": mask.grid_width,
        "SIDE": side if mask.kind == "conv" else 0,
        "STEP": mask.dilation if mask.kind == "conv" else 1,
    }


@triton.jit
def _within(difference, limit: tl.constexpr):
    """Whether 0 <= difference <= limit, by one unsigned comparison."""
    return difference.to(tl.uint32, bitcast=True) <= limit


@triton.jit
def _near_on_ring(difference, size: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr):
    """Whether two places on a ring lie at most SIDE steps apart; 0 <= difference < 2 * size."""
    forward = difference % size
    backward = size - forward
    near = (forward % STEP == 0) & (forward <= SIDE * STEP)
    return near | ((backward % STEP == 0) & (backward <= SIDE * STEP))


@triton.jit
def allowed(
    query,
    key,
    RULE: tl.constexpr,
    TEXT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SIDE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Whether positions `query` may attend to positions `key`.

    Args:
        query: int32, [Q, 1] or [1, Q].
        key: int32, [1, K] or [K, 1].
        RULE: which mask.
        TEXT: T.
        HEIGHT: H.
        WIDTH: G.
        SIDE: how many steps a convolution's window extends to one side.
        STEP: the convolution's dilation.

    Returns:
        bool, [Q, K] or [K, Q].
    """
    if RULE == FULL:
        near = key <= query
    elif RULE == ROW_WINDOW:
        near = _within(query - key, WIDTH)
    elif RULE == CONV_RASTER:
        back = query - key
        near = _within(back, STEP * SIDE * (WIDTH + 1))
        steps = back.to(tl.uint32, bitcast=True)
        if STEP > 1:
            near = near & (steps % STEP == 0)
            steps = steps // STEP
        if 2 * SIDE + 1 < WIDTH:
            near = near & ((steps + SIDE) % WIDTH <= 2 * SIDE)
    else:
        # text queries lie so far up that nothing of the image is near; text keys are seen below, near or not
        query_row = tl.where(query < TEXT, -_FAR // (4 * (HEIGHT + WIDTH)), (query - TEXT) // WIDTH)
        query_column = tl.where(query < TEXT, -_FAR // (4 * (HEIGHT + WIDTH)), (query - TEXT) % WIDTH)
        key_row, key_column = (key - TEXT) // WIDTH, (key - TEXT) % WIDTH
        if RULE == OWN_ROW:
            # rows stand 2 G apart, so that only places of one row differ by less than G
            near = _within(query_row * (2 * WIDTH) + query_column - (key_row * (2 * WIDTH) + key_column), WIDTH - 1)
        elif RULE == COLUMN:
            near = _within(query_column * (2 * HEIGHT) + query_row - (key_column * (2 * HEIGHT) + key_row), HEIGHT - 1)
        elif RULE == CONV_TORUS:
            near_row = _near_on_ring(query_row - key_row + HEIGHT, HEIGHT, SIDE, STEP)
            near = near_row & _near_on_ring(query_column - key_column + WIDTH, WIDTH, SIDE, STEP) & (key <= query)
        else:
            near = _within(query_row - key_row, SIDE * STEP)
            if RULE == CONV_CLIP:
                near = near & _within(query_column + SIDE * STEP - key_column, 2 * SIDE * STEP) & (key <= query)
            else:
                near = near & _within(query_column - key_column, SIDE * STEP)
            if STEP > 1:
                on_lattice = (query_row - key_row) % STEP == 0
                near = near & on_lattice & ((query_column - key_column) % STEP == 0)
    return near | (tl.where(key < TEXT, key, _FAR) <= query)


@triton.jit
def visits(row):
    """What a row of the table says about its blocks: the full ones, all, and run and window that they lie in."""
    full_first, full_end = tl.load(row + FULL_FIRST), tl.load(row + FULL_END)
    run_start, run_blocks, run_end = tl.load(row + RUN_START), tl.load(row + RUN_BLOCKS), tl.load(row + RUN_END)
    return full_first, full_end, tl.load(row + BLOCKS), run_start, run_blocks, run_end, tl.load(row + WINDOW)


@triton.jit
def tile_positions(
    base, length, BLOCK: tl.constexpr, TILE_WIDTH: tl.constexpr, TEXT: tl.constexpr, WIDTH: tl.constexpr
):
    """The positions int32 [BLOCK] of an outer tile, and which of them exist."""
    offset = tl.arange(0, BLOCK)
    end = tl.where(base < TEXT, tl.minimum(TEXT, length), length)
    positions = base + offset
    valid = positions < end
    if TILE_WIDTH > 0:
        rectangle = base + offset // TILE_WIDTH * WIDTH + offset % TILE_WIDTH
        inside = (rectangle < end) & ((base - TEXT) % WIDTH + offset % TILE_WIDTH < WIDTH)
        positions = tl.where(base < TEXT, positions, rectangle)
        valid = tl.where(base < TEXT, valid, inside)
    return positions, valid


@triton.jit
def block_positions(
    index,
    run_start,
    run_blocks,
    run_end,
    window,
    entries,
    length,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
    WINDOW_WIDTH: tl.constexpr,
    TEXT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The positions int32 [BLOCK] of the block `index` of a table row, and which of them exist."""
    offset = tl.arange(0, BLOCK)
    if LISTED:
        start = tl.load(entries + run_start + index)
        positions = start + offset
        valid = positions < tl.where(start < TEXT, tl.minimum(TEXT, length), length)
    else:
        place = (index - run_blocks) * BLOCK + offset
        if WINDOW_WIDTH > 0:
            place = place // WINDOW_WIDTH * WIDTH + place % WINDOW_WIDTH
        of_window = TEXT + window + place
        of_run = run_start + index * BLOCK + offset
        positions = tl.where(index < run_blocks, of_run, of_window)
        valid = tl.where(index < run_blocks, of_run < run_end, (of_window >= TEXT) & (of_window < length))
    return positions, valid


@triton.jit
def full_block_positions(index, run_start, entries, BLOCK: tl.constexpr, LISTED: tl.constexpr):
    """`block_positions` of a block that is allowed whole, and so exists whole and lies in the run."""
    if LISTED:
        start = tl.load(entries + run_start + index)
    else:
        start = run_start + index * BLOCK
    return start + tl.arange(0, BLOCK)


@triton.jit
def member_and_index(step, blocks, GROUP: tl.constexpr):
    """Which head of a group and which of its blocks a step stands for, head by head."""
    if GROUP == 1:
        member, index = 0, step
    else:
        member, index = step // blocks, step % blocks
    return member, index


@triton.jit
def load_rows(
    base,
    positions,
    stride,
    valid,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    CHECKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The rows [n, PADDED_DIM] of a tensor at `positions`; zero beyond HEAD_DIM and, if CHECKED, where not valid."""
    channel = tl.arange(0, PADDED_DIM)
    pointers = base + positions[:, None] * stride + channel[None, :]
    if CHECKED and HEAD_DIM < PADDED_DIM:
        rows = tl.load(pointers, mask=valid[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
    elif CHECKED:
        rows = tl.load(pointers, mask=valid[:, None], other=0.0)
    elif HEAD_DIM < PADDED_DIM:
        rows = tl.load(pointers, mask=(channel < HEAD_DIM)[None, :], other=0.0)
    else:
        rows = tl.load(pointers)
    if UPCAST:
        rows = rows.to(tl.float32)
    return rows


@triton.jit
def store_rows(base, positions, stride, valid, rows, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Writes the rows [n, PADDED_DIM] that are valid, without the padding, in the tensor's dtype."""
    channel = tl.arange(0, PADDED_DIM)
    pointers = base + positions[:, None] * stride + channel[None, :]
    kept = valid[:, None] & (channel < HEAD_DIM)[None, :]
    tl.store(pointers, rows.to(base.dtype.element_ty), mask=kept)
