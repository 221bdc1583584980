"""Who reads what in the sparse kernels: a table with one row per program, saying its tile and the blocks it visits.

Every program owns one outer tile (of queries, or of keys in the pass for their gradients) and visits inner blocks of
the other side. Text and image are cut separately. There are two ways to say what a program visits:

    analytic  a run of consecutive positions (the text), then one window of the image, both given by a few numbers from
              which the program computes addresses. A window is a run of raster positions, or a rectangle of the grid:
              `window_width` positions, then a step to the next row. Rows and convolutions read just what they need,
              columns read their columns out of the raster where it lies, without a permuted copy.
    listed    block lists (`AttentionMask.block_lists`), good for every mask.

An inner block may hold pairs that the mask forbids; the kernels test each pair there. "Full" blocks are allowed whole
and skip the test.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from transformer.masks import AttentionMask

# N positions, T text, H x G image grid.

# Columns of the table.
BASE = 0  # first position of the outer tile
FULL_FIRST, FULL_END = 1, 2  # the blocks FULL_FIRST .. FULL_END - 1 are full
BLOCKS = 3  # all blocks
RUN_START = 4  # analytic: first position of the run; listed: first entry of the list
RUN_BLOCKS = 5  # analytic: blocks of the run, before those of the window
RUN_END = 6  # analytic: end of the run
WINDOW = 7  # analytic: where the window starts in the raster of the image; may lie before its first position
PART = 8  # which share of a tile's blocks this row is; -1 for rows that have a tile to themselves
COLUMNS = 9


class Schedule(NamedTuple):
    """The work of one kernel launch, per batch entry and head.

    Attributes:
        table: int32 [programs, COLUMNS], the largest amount of work first.
        entries: int32 [entries], first positions of listed blocks; a single 0 when analytic.
        is_listed: whether blocks are listed.
        tile_width: columns of an outer tile that is a rectangle of the grid; 0 for a run of raster positions.
        window_width: columns of a window that is a rectangle; 0 for a run of raster positions.
        parts: into how many rows each text tile was split; 1 for no split.
        visited_pairs: pairs (query, key) that are computed, allowed or not.
    """

    table: NDArray[np.int32]
    entries: NDArray[np.int32]
    is_listed: bool
    tile_width: int
    window_width: int
    parts: int
    visited_pairs: int


class _Reach(NamedTuple):
    """How far an image position's window extends, in rows and columns of the grid."""

    up: int
    left: int
    right: int


@lru_cache(maxsize=256)
def query_schedule(
    mask: AttentionMask, length: int, *, block_q: int, block_k: int, tile_width: int | None = None
) -> Schedule:
    """Tiles of queries that visit blocks of keys: the forward pass and the gradient of the queries.

    Args:
        mask: the mask.
        length: N, positions in use, from the first on.
        block_q: queries of a tile.
        block_k: keys of a block.
        tile_width: columns of an image tile, 0 for raster runs; None takes `best_tile_width`.
    """
    _check(mask, length, block_q, block_k)
    if not is_analytic(mask):
        return _listed(mask, length, outer=block_q, inner=block_k, transposed=False, parts=1)
    if tile_width is None:
        tile_width = best_tile_width(mask, block_q=block_q, block_k=block_k)
    text_end = min(mask.text_len, length)
    rows = []
    for start in range(0, text_end, block_q):
        last = min(start + block_q, text_end) - 1
        blocks = last // block_k + 1
        rows.append([start, 0, start // block_k, blocks, 0, blocks, text_end, 0, -1])
    window_width = 0
    if length > mask.text_len:
        windows = _windows(mask, length, tile=block_q, inner=block_k, tile_width=tile_width, transposed=False)
        window_width = windows.width
        run_blocks = math.ceil(mask.text_len / block_k)
        for base, window, blocks in windows.rows:
            full = mask.text_len // block_k
            rows.append([base, 0, full, run_blocks + blocks, 0, run_blocks, mask.text_len, window, -1])
    return _schedule(rows, block_q * block_k, tile_width=tile_width, window_width=window_width, parts=1)


@lru_cache(maxsize=256)
def key_schedule(
    mask: AttentionMask, length: int, *, block_q: int, block_k: int, tile_width: int | None = None, parts: int = 1
) -> Schedule:
    """Tiles of keys that visit blocks of queries: the gradients of keys and values.

    Args:
        mask: the mask.
        length: N, positions in use, from the first on.
        block_q: queries of a block.
        block_k: keys of a tile.
        tile_width: columns of an image tile, 0 for raster runs; None takes `best_tile_width`.
        parts: rows into which the work of each text tile is split. All queries see the text, so that its tiles have
            many times the work of the others; where they are few, they alone would decide how long the pass takes.
    """
    _check(mask, length, block_q, block_k)
    if not is_analytic(mask):
        return _listed(mask, length, outer=block_k, inner=block_q, transposed=True, parts=parts)
    if tile_width is None:
        tile_width = best_tile_width(mask, block_q=block_q, block_k=block_k, transposed=True)
    rows = []
    for start in range(0, min(mask.text_len, length), block_k):
        # queries of the text and, right behind them, of the image: past the tile's own positions all see all of it
        blocks = math.ceil((length - start) / block_q)
        full_first = min(math.ceil(block_k / block_q), blocks)
        full_end = max(full_first, (length - start) // block_q)
        for part, (first, end) in enumerate(_shares(blocks, parts)):
            full = [min(max(bound - first, 0), end - first) for bound in (full_first, full_end)]
            run_start = start + first * block_q
            rows.append([start, *full, end - first, run_start, end - first, length, 0, part if parts > 1 else -1])
    window_width = 0
    if length > mask.text_len:
        windows = _windows(mask, length, tile=block_k, inner=block_q, tile_width=tile_width, transposed=True)
        window_width = windows.width
        rows += [[base, 0, 0, blocks, 0, 0, 0, window, -1] for base, window, blocks in windows.rows]
    return _schedule(rows, block_q * block_k, tile_width=tile_width, window_width=window_width, parts=parts)


def is_analytic(mask: AttentionMask) -> bool:
    """Whether runs and windows describe the mask; the others take block lists."""
    return mask.kind != "full" and not (mask.kind == "conv" and mask.conv_mode == "torus")


@lru_cache(maxsize=256)
def best_tile_width(mask: AttentionMask, *, block_q: int, block_k: int, transposed: bool = False) -> int:
    """The tile width with the fewest visited pairs: 0 (raster runs) or a power of two.

    Columns want tiles of whole columns. Convolutions want square tiles on wide grids, where the run of a raster tile
    would hold many whole rows; on narrow ones the run is shorter than the rounded rectangle.
    """
    build = key_schedule if transposed else query_schedule
    tile = block_k if transposed else block_q
    widths = [0]
    if mask.kind == "column":
        whole = tile // 2 ** (mask.grid_height - 1).bit_length()  # as many columns as fit a tile whole
        widths += [width for width in (max(1, whole), 2 * whole, 4 * whole) if 0 < width <= min(tile, mask.grid_width)]
    elif mask.kind == "conv":
        widths += [width for width in (8, 16) if width <= tile and _window_width(mask, width) <= mask.grid_width]
    visited = {
        width: build(mask, mask.seq_len, block_q=block_q, block_k=block_k, tile_width=width).visited_pairs
        for width in widths
    }
    return min(widths, key=lambda width: (visited[width], width))


def visited_ratio(mask: AttentionMask, length: int, *, block_q: int, block_k: int) -> float:
    """How many times more pairs a causal kernel with the same blocks computes than the sparse one does."""
    _check(mask, length, block_q, block_k)
    blocks_of_causal = sum(math.ceil(min(start + block_q, length) / block_k) for start in range(0, length, block_q))
    visited = query_schedule(mask, length, block_q=block_q, block_k=block_k).visited_pairs
    return blocks_of_causal * block_q * block_k / visited


def _check(mask: AttentionMask, length: int, *blocks: int) -> None:
    if mask.checked_length(length) == 0:
        raise ValueError("a schedule needs at least one position; got a length of 0")
    if min(blocks) < 1 or any(block & (block - 1) for block in blocks):
        raise ValueError(f"blocks of kernels are powers of two; got {' and '.join(map(str, blocks))}")


class _Windows(NamedTuple):
    """For each image tile its first position, where its window starts in the raster and how many blocks that is."""

    width: int
    rows: list[tuple[int, int, int]]


def _windows(mask: AttentionMask, length: int, *, tile: int, inner: int, tile_width: int, transposed: bool) -> _Windows:
    """The windows of all image tiles, found by asking the mask: the smallest that holds every allowed pair."""
    image_len, width = length - mask.text_len, mask.grid_width
    image = np.arange(image_len)
    rows: list[tuple[int, int, int]] = []
    if tile_width == 0:
        for start in range(0, image_len, tile):
            wanted = image[_wanted(mask, image[start : start + tile], image, transposed)]
            first, count = int(wanted[0]), int(wanted[-1]) - int(wanted[0]) + 1
            rows.append((mask.text_len + start, first, math.ceil(count / inner)))
        return _Windows(0, rows)
    reach = _reach(mask)
    window_width = _window_width(mask, tile_width)
    left = reach.right if transposed else reach.left
    for top in range(0, math.ceil(image_len / width), tile // tile_width):
        bottom = min(top + tile // tile_width, math.ceil(image_len / width))
        window_top, window_bottom = (top, bottom + reach.up) if transposed else (top - reach.up, bottom)
        for column in range(0, width, tile_width):
            own = np.arange(top, bottom)[:, None] * width + np.arange(column, min(column + tile_width, width))
            own = own[own < image_len]
            if len(own) == 0:
                continue
            # virtual columns left and right of the grid are positions of the neighboring rows, as in the raster mode
            window = np.arange(window_top, window_bottom)[:, None] * width
            window = window + np.arange(column - left, column - left + window_width)
            inside = (window >= 0) & (window < image_len)
            wanted = np.zeros_like(inside)
            wanted[inside] = _wanted(mask, own, window[inside], transposed)
            every = _wanted(mask, own, image, transposed)
            assert wanted.sum() == every.sum(), f"a window of width {window_width} misses pairs of {mask}"
            used = np.flatnonzero(wanted.any(axis=1))
            start = int(window[used[0], 0])
            count = int(np.flatnonzero(wanted.ravel())[-1]) + 1 - int(used[0]) * window_width
            rows.append((mask.text_len + top * width + column, start, math.ceil(count / inner)))
    return _Windows(window_width, rows)


def _wanted(
    mask: AttentionMask, tile: NDArray[np.int64], others: NDArray[np.int64], transposed: bool
) -> NDArray[np.bool_]:
    """Which image positions `others` pair with any position of a tile; both count from the first image position."""
    own, other = torch.from_numpy(tile)[:, None] + mask.text_len, torch.from_numpy(others)[None, :] + mask.text_len
    allowed = mask.allowed(other, own) if transposed else mask.allowed(own, other)
    return allowed.any(dim=0).numpy()


def _reach(mask: AttentionMask) -> _Reach:
    if mask.kind == "column":
        return _Reach(mask.grid_height - 1, 0, 0)
    assert mask.kind == "conv", "rows are runs of the raster"
    half = mask.kernel_size // 2 * mask.dilation
    if mask.conv_mode == "quadrant":
        side = (mask.kernel_size - 1) * mask.dilation
        return _Reach(side, side, 0)
    return _Reach(half, half, half)


def _window_width(mask: AttentionMask, tile_width: int) -> int:
    reach = _reach(mask)
    return tile_width + reach.left + reach.right


def _listed(mask: AttentionMask, length: int, *, outer: int, inner: int, transposed: bool, parts: int) -> Schedule:
    block_q, block_k = (inner, outer) if transposed else (outer, inner)
    lists = mask.block_lists(block_q, block_k, length=length, transposed=transposed)
    rows = []
    for start, first, num_full, num in zip(lists.outer_starts, lists.first, lists.num_full, lists.num, strict=True):
        shares = _shares(int(num), parts if start < mask.text_len else 1)
        for part, (begin, end) in enumerate(shares):
            full_end = min(max(int(num_full) - begin, 0), end - begin)
            rows.append([start, 0, full_end, end - begin, first + begin, 0, 0, 0, part if len(shares) > 1 else -1])
    return _schedule(rows, inner * outer, tile_width=0, window_width=0, parts=parts, entries=lists.starts)


def _shares(blocks: int, parts: int) -> list[tuple[int, int]]:
    """`blocks` cut into `parts` spans, as even as can be; spans may be empty."""
    return [(blocks * part // parts, blocks * (part + 1) // parts) for part in range(parts)]


def _schedule(
    rows: list[list[int]],
    pairs_of_block: int,
    *,
    tile_width: int,
    window_width: int,
    parts: int,
    entries: NDArray[np.int32] | None = None,
) -> Schedule:
    # largest first: what starts last should end soon
    table = np.array(sorted(rows, key=lambda row: -row[BLOCKS]), dtype=np.int32).reshape(-1, COLUMNS)
    return Schedule(
        table=table,
        entries=np.zeros(1, dtype=np.int32) if entries is None else entries,
        is_listed=entries is not None,
        tile_width=tile_width,
        window_width=window_width,
        parts=parts,
        visited_pairs=int(table[:, BLOCKS].sum()) * pairs_of_block,
    )
