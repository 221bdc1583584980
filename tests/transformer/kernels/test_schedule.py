"""Read as the kernels read them, schedules reach every allowed pair once and give every position to one tile."""

from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple, get_args

import numpy as np
import pytest

from transformer.kernels.schedule import (
    BASE,
    BLOCKS,
    FULL_END,
    FULL_FIRST,
    PART,
    RUN_BLOCKS,
    RUN_END,
    RUN_START,
    WINDOW,
    Schedule,
    best_tile_width,
    is_analytic,
    key_schedule,
    query_schedule,
    visited_ratio,
)
from transformer.masks import AttentionMask, ConvMode, MaskKind

CUTS = [(8, 8), (4, 16), (16, 8)]  # queries and keys of a block


def grid(height: int, width: int, *, text_len: int, kernel_size: int = 3) -> list[AttentionMask]:
    """The masks of all kinds and modes on one grid."""
    sizes = {"text_len": text_len, "grid_height": height, "grid_width": width}
    convs = [
        AttentionMask(kind="conv", conv_mode=mode, kernel_size=kernel_size, dilation=dilation, **sizes)
        for mode in get_args(ConvMode)
        for dilation in (1, 2)
    ]
    rows = [AttentionMask(kind="row", row_mode=mode, **sizes) for mode in ("window", "own_row")]
    return [AttentionMask(kind="full", **sizes), AttentionMask(kind="column", **sizes), *rows, *convs]


# an odd grid behind a short odd text, one wide enough for rectangles without text, and a kernel wider than the grid
MASKS = [*grid(7, 5, text_len=5), *grid(4, 15, text_len=0), *grid(2, 3, text_len=17, kernel_size=9)]


def name_of(mask: AttentionMask) -> str:
    mode = {"row": mask.row_mode, "conv": f"{mask.conv_mode}-{mask.dilation}"}.get(mask.kind, "causal")
    return f"{mask.text_len}+{mask.grid_height}x{mask.grid_width}-{mask.kind}-{mode}"


def lengths_of(mask: AttentionMask) -> list[int]:
    """All positions; a last row that is cut; one image position; the text alone; a part of it."""
    text_len = mask.text_len
    lengths = {mask.seq_len, mask.seq_len - mask.grid_width - 1, text_len + 1, text_len, text_len - 2}
    return sorted(length for length in lengths if length > 0)


def tile_widths_of(mask: AttentionMask, tile: int) -> list[int | None]:
    """The tile widths that a mask may be given: windows are no wider than the grid."""
    halo = {"column": 0, "conv": (mask.kernel_size - 1) * mask.dilation}.get(mask.kind)
    if halo is None or not is_analytic(mask):
        return [None]
    return [None, 0, *(width for width in (1, 2, 4, 8) if width <= tile and width + halo <= mask.grid_width)]


class Schedules(NamedTuple):
    """One schedule and which side its tiles are on."""

    schedule: Schedule
    outer: int
    inner: int
    transposed: bool


@cache
def schedules_of(mask: AttentionMask, length: int) -> list[Schedules]:
    schedules = []
    for block_q, block_k in CUTS:
        for width in tile_widths_of(mask, block_q):
            schedule = query_schedule(mask, length, block_q=block_q, block_k=block_k, tile_width=width)
            schedules.append(Schedules(schedule, block_q, block_k, False))
        # parts change nothing about the image: one width will do
        for width, parts in [*((width, 1) for width in tile_widths_of(mask, block_k)), (None, 3)]:
            schedule = key_schedule(mask, length, block_q=block_q, block_k=block_k, tile_width=width, parts=parts)
            schedules.append(Schedules(schedule, block_k, block_q, True))
    return schedules


class Visit(NamedTuple):
    """What one program does with one block: the positions of both sides that exist, and whether it tests the mask."""

    base: int
    part: int
    outer: list[int]
    inner: list[int]
    is_full: bool


def visits(schedule: Schedule, mask: AttentionMask, length: int, *, outer: int, inner: int) -> Iterator[Visit]:
    """Reads a schedule as a kernel does, one row of the table after the other."""
    for row in schedule.table.tolist():
        tile = tile_positions(schedule, mask, length, row[BASE], outer)
        for block in range(row[BLOCKS]):
            is_full = row[FULL_FIRST] <= block < row[FULL_END]
            yield Visit(row[BASE], row[PART], tile, block_positions(schedule, mask, length, row, block, inner), is_full)


def tile_positions(schedule: Schedule, mask: AttentionMask, length: int, base: int, outer: int) -> list[int]:
    if base < mask.text_len:
        return list(range(base, min(base + outer, mask.text_len, length)))
    if schedule.tile_width == 0:
        return list(range(base, min(base + outer, length)))
    left = (base - mask.text_len) % mask.grid_width
    steps = [divmod(place, schedule.tile_width) for place in range(outer)]
    places = [base + down * mask.grid_width + right for down, right in steps if left + right < mask.grid_width]
    return [place for place in places if place < length]


def block_positions(
    schedule: Schedule, mask: AttentionMask, length: int, row: list[int], block: int, inner: int
) -> list[int]:
    if schedule.is_listed:
        start = int(schedule.entries[row[RUN_START] + block])
        return list(range(start, min(start + inner, mask.text_len if start < mask.text_len else length, length)))
    if block < row[RUN_BLOCKS]:
        start = row[RUN_START] + block * inner
        return list(range(start, min(start + inner, row[RUN_END])))
    places = range((block - row[RUN_BLOCKS]) * inner, (block - row[RUN_BLOCKS] + 1) * inner)
    if schedule.window_width > 0:
        steps = [divmod(place, schedule.window_width) for place in places]
        offsets = [down * mask.grid_width + right for down, right in steps]
    else:
        offsets = list(places)
    positions = [mask.text_len + row[WINDOW] + offset for offset in offsets]
    return [position for position in positions if mask.text_len <= position < length]


@pytest.mark.parametrize("mask", MASKS, ids=name_of)
def test_every_allowed_pair_is_visited_once(mask: AttentionMask) -> None:
    for length in lengths_of(mask):
        allowed = mask.dense(length).numpy()
        for schedule, outer, inner, transposed in schedules_of(mask, length):
            wanted = allowed.T if transposed else allowed
            seen = np.zeros((length, length), dtype=int)
            blocks = 0
            for visit in visits(schedule, mask, length, outer=outer, inner=inner):
                blocks += 1
                assert len(set(visit.inner)) == len(visit.inner)
                pairs = np.ix_(visit.outer, visit.inner)
                if visit.is_full:
                    assert len(visit.inner) == inner, "a full block exists whole: kernels read it unchecked"
                    assert wanted[pairs].all()
                seen[pairs] += wanted[pairs]
            assert np.array_equal(seen, wanted), (length, outer, inner, schedule)
            assert schedule.visited_pairs == blocks * outer * inner


@pytest.mark.parametrize("mask", MASKS, ids=name_of)
def test_every_position_belongs_to_one_tile_whose_parts_are_complete(mask: AttentionMask) -> None:
    for length in lengths_of(mask):
        for schedule, outer, _, _ in schedules_of(mask, length):
            parts = defaultdict(list)
            for row in schedule.table.tolist():
                parts[row[BASE]].append(row[PART])
            owned = [place for base in parts for place in tile_positions(schedule, mask, length, base, outer)]
            assert sorted(owned) == list(range(length))
            for base, numbers in parts.items():
                is_split = schedule.parts > 1 and base < mask.text_len
                assert sorted(numbers) == (list(range(schedule.parts)) if is_split else [-1])


@pytest.mark.parametrize("mask", MASKS, ids=name_of)
def test_the_largest_work_comes_first(mask: AttentionMask) -> None:
    for schedule, *_ in schedules_of(mask, mask.seq_len):
        assert (np.diff(schedule.table[:, BLOCKS]) <= 0).all()
        assert (schedule.table.dtype, schedule.entries.dtype) == (np.int32, np.int32)


@pytest.mark.parametrize("mask", MASKS, ids=name_of)
def test_full_blocks_of_a_run_lie_in_the_run(mask: AttentionMask) -> None:
    for length in lengths_of(mask):
        for schedule, *_ in schedules_of(mask, length):
            table = schedule.table
            assert (table[:, FULL_FIRST] >= 0).all()
            assert (table[:, FULL_FIRST] <= table[:, FULL_END]).all()
            limit = BLOCKS if schedule.is_listed else RUN_BLOCKS
            assert (table[:, FULL_END] <= table[:, limit]).all()


@pytest.mark.parametrize("mask", MASKS, ids=name_of)
def test_no_program_visits_a_last_block_in_vain(mask: AttentionMask) -> None:
    for length in lengths_of(mask):
        allowed = mask.dense(length).numpy()
        for schedule, outer, inner, transposed in schedules_of(mask, length):
            wanted = allowed.T if transposed else allowed
            read = visits(schedule, mask, length, outer=outer, inner=inner)
            last = {(visit.base, visit.part): visit for visit in read}
            assert all(wanted[np.ix_(visit.outer, visit.inner)].any() for visit in last.values())


def test_parts_share_the_work_of_a_text_tile_evenly() -> None:
    mask = AttentionMask(kind="row", text_len=24, grid_height=8, grid_width=8)
    whole = key_schedule(mask, mask.seq_len, block_q=8, block_k=8)
    split = key_schedule(mask, mask.seq_len, block_q=8, block_k=8, parts=3)
    assert split.visited_pairs == whole.visited_pairs
    for base in (0, 8, 16):
        (blocks,) = whole.table[whole.table[:, BASE] == base, BLOCKS]
        shares = split.table[split.table[:, BASE] == base, BLOCKS]
        assert len(shares) == 3
        assert shares.sum() == blocks
        assert np.ptp(shares) <= 1
    assert split.table[0, BLOCKS] < whole.table[0, BLOCKS]


def test_full_and_torus_masks_take_lists_and_the_others_windows() -> None:
    listed = [mask for mask in MASKS if query_schedule(mask, mask.seq_len, block_q=8, block_k=8).is_listed]
    assert listed == [mask for mask in MASKS if mask.kind == "full" or name_of(mask).split("-")[-2] == "torus"]


def test_rectangles_may_start_before_the_image() -> None:
    # what makes the kernels' check of a window's first position necessary
    mask = AttentionMask(kind="conv", text_len=17, grid_height=4, grid_width=21, kernel_size=3)
    schedule = query_schedule(mask, mask.seq_len, block_q=16, block_k=8, tile_width=8)
    assert (schedule.tile_width, schedule.window_width) == (8, 10)
    assert schedule.table[:, WINDOW].min() < 0


def test_a_window_wider_than_the_grid_is_refused() -> None:
    # its rows would overlap, and pairs would count twice
    mask = AttentionMask(kind="conv", text_len=0, grid_height=4, grid_width=9, kernel_size=3)
    with pytest.raises(AssertionError, match="a window of width 10 misses pairs"):
        query_schedule(mask, mask.seq_len, block_q=16, block_k=8, tile_width=8)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_best_tile_width_visits_the_fewest_pairs(transposed: bool) -> None:
    build = key_schedule if transposed else query_schedule
    for mask in MASKS:
        if not is_analytic(mask):
            continue
        for block_q, block_k in CUTS:
            tile = block_k if transposed else block_q
            chosen = best_tile_width(mask, block_q=block_q, block_k=block_k, transposed=transposed)
            by_itself = build(mask, mask.seq_len, block_q=block_q, block_k=block_k)
            assert by_itself.tile_width == chosen
            raster = build(mask, mask.seq_len, block_q=block_q, block_k=block_k, tile_width=0)
            assert by_itself.visited_pairs <= raster.visited_pairs
            assert chosen in {0, *tile_widths_of(mask, tile)}


@pytest.mark.parametrize(
    ("kind", "height", "width", "tile_width"),
    [
        ("row", 32, 32, 0),
        ("row", 8, 64, 0),
        ("column", 32, 32, 2),
        ("column", 64, 8, 1),
        ("column", 8, 64, 8),
        ("conv", 32, 32, 0),
        ("conv", 32, 48, 8),
    ],
)
def test_columns_take_whole_columns_and_wide_convolutions_rectangles(
    kind: MaskKind, height: int, width: int, tile_width: int
) -> None:
    mask = AttentionMask(kind=kind, text_len=64, grid_height=height, grid_width=width)
    assert best_tile_width(mask, block_q=64, block_k=64) == tile_width


def test_work_is_spared_where_the_mask_is_sparse_and_the_sequence_long() -> None:
    def ratio(kind: MaskKind, side: int) -> float:
        mask = AttentionMask(kind=kind, text_len=64, grid_height=side, grid_width=side)
        return visited_ratio(mask, mask.seq_len, block_q=64, block_k=64)

    assert ratio("full", 16) == 1
    # every tile of two columns reads the text block and its own block; the tile of the text reads itself
    tiles = 32 * 32 // 64
    assert ratio("column", 32) == pytest.approx(sum(range(1, tiles + 2)) / (1 + 2 * tiles))
    assert ratio("row", 16) < ratio("row", 32)
    assert ratio("column", 16) < ratio("column", 32)
    assert ratio("conv", 16) < ratio("conv", 32)


def test_schedules_that_cannot_be_are_refused() -> None:
    mask = AttentionMask(kind="row", text_len=3, grid_height=4, grid_width=4)
    with pytest.raises(ValueError, match="blocks of kernels are powers of two; got 10 and 8"):
        query_schedule(mask, 19, block_q=10, block_k=8)
    with pytest.raises(ValueError, match=r"a length must lie in \[0, 19\]"):
        key_schedule(mask, 20, block_q=8, block_k=8)
    with pytest.raises(ValueError, match="at least one position"):
        visited_ratio(mask, 0, block_q=8, block_k=8)
