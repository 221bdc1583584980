"""Block lists hold every allowed pair once, call full only what is allowed whole, and never mix text and image."""

from itertools import pairwise
from typing import NamedTuple, get_args

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from numpy.typing import NDArray

from transformer.block_lists import BlockLists, block_lists, block_starts
from transformer.masks import AttentionMask, ConvMode

TEXT_LEN, HEIGHT, WIDTH = 5, 7, 5  # as 257 text positions are to blocks of 64: one short text block, odd grids
LENGTHS = [40, 33, 6, 5, 4, 1]  # all, a last row that is cut, one image position, text only, part of the text
BLOCKS = [(4, 4), (4, 8), (8, 4), (3, 5), (64, 64)]


def masks() -> list[AttentionMask]:
    sizes = {"text_len": TEXT_LEN, "grid_height": HEIGHT, "grid_width": WIDTH}
    convs = [
        AttentionMask(kind="conv", conv_mode=mode, kernel_size=3, dilation=dilation, **sizes)
        for mode in get_args(ConvMode)
        for dilation in (1, 2)
    ]
    rows = [AttentionMask(kind="row", row_mode=mode, **sizes) for mode in ("window", "own_row")]
    return [AttentionMask(kind="full", **sizes), AttentionMask(kind="column", **sizes), *rows, *convs]


def name_of(mask: AttentionMask) -> str:
    mode = {"row": mask.row_mode, "conv": f"{mask.conv_mode}-{mask.dilation}"}.get(mask.kind)
    return mask.kind if mode is None else f"{mask.kind}-{mode}"


MASKS = masks()


class Entry(NamedTuple):
    """One listed block: the positions of both sides."""

    outer: range
    inner: range
    is_full: bool


def entries_of(lists: BlockLists, length: int, text_len: int) -> list[Entry]:
    """The listed blocks as the kernels read them: a block that starts in the text ends there."""

    def positions(start: int, block: int) -> range:
        return range(start, min(start + block, text_len if start < text_len else length, length))

    return [
        Entry(positions(start, lists.outer), positions(lists.starts[first + entry], lists.inner), entry < num_full)
        for start, first, num_full, num in zip(
            lists.outer_starts.tolist(), lists.first.tolist(), lists.num_full.tolist(), lists.num.tolist(), strict=True
        )
        for entry in range(num)
    ]


def check(lists: BlockLists, allowed: NDArray[np.bool_], length: int, text_len: int) -> None:
    """`allowed` [outer positions, inner positions] against its lists."""
    held = np.zeros_like(allowed, dtype=int)
    for outer, inner, is_full in entries_of(lists, length, text_len):
        pairs = allowed[np.ix_(outer, inner)]
        assert pairs.any()
        is_short = len(inner) < lists.inner
        assert is_full == (pairs.all() and not is_short)
        held[np.ix_(outer, inner)] += 1
    assert (held[allowed] == 1).all(), "every allowed pair lies in one listed block"
    assert held.max(initial=0) <= 1


@pytest.mark.parametrize("mask", MASKS, ids=name_of)
def test_lists_hold_every_allowed_pair_and_full_blocks_are_allowed_whole(mask: AttentionMask) -> None:
    for block_q, block_k in BLOCKS:
        for length in LENGTHS:
            allowed = mask.dense(length).numpy()
            check(mask.block_lists(block_q, block_k, length=length), allowed, length, TEXT_LEN)
            transposed = mask.block_lists(block_q, block_k, length=length, transposed=True)
            check(transposed, allowed.T, length, TEXT_LEN)


@pytest.mark.parametrize("mask", MASKS, ids=name_of)
def test_transposed_lists_hold_the_same_blocks(mask: AttentionMask) -> None:
    for block_q, block_k in BLOCKS:
        for length in LENGTHS:
            forward = entries_of(mask.block_lists(block_q, block_k, length=length), length, TEXT_LEN)
            transposed = mask.block_lists(block_q, block_k, length=length, transposed=True)
            turned = [Entry(inner, outer, full) for outer, inner, full in entries_of(transposed, length, TEXT_LEN)]
            assert {entry[:2] for entry in forward} == {entry[:2] for entry in turned}
            # what is short on one side only is full in just one of the two
            whole = [
                {entry for entry in entries if len(entry.outer) == block_q and len(entry.inner) == block_k}
                for entries in (forward, turned)
            ]
            assert whole[0] == whole[1]


@pytest.mark.parametrize("mask", MASKS, ids=name_of)
def test_full_blocks_come_first_and_both_groups_ascend(mask: AttentionMask) -> None:
    lists = mask.block_lists(4, 4)
    assert (np.diff(lists.outer_starts) > 0).all()
    for first, num_full, num in zip(lists.first, lists.num_full, lists.num, strict=True):
        assert 0 <= num_full <= num
        starts = lists.starts[first : first + num]
        assert (np.diff(starts[:num_full]) > 0).all()
        assert (np.diff(starts[num_full:]) > 0).all()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("block", [1, 3, 4, 8, 64])
def test_blocks_cover_all_positions_and_start_anew_with_the_image(block: int, length: int) -> None:
    starts = block_starts(length, TEXT_LEN, block)
    sizes = [end - start for start, end in pairwise([*starts.tolist(), length])]
    assert starts[0] == 0
    assert all(0 < size <= block for size in sizes)
    assert (TEXT_LEN in starts) == (length > TEXT_LEN)
    # only the last block of the text and the last of all may be short
    short = {start for start, size in zip(starts.tolist(), sizes, strict=True) if size < block}
    assert short <= {max(start for start in starts if start < TEXT_LEN), starts[-1]}


def test_no_text_leaves_the_image_alone() -> None:
    mask = AttentionMask(kind="row", text_len=0, grid_height=3, grid_width=4)
    lists = mask.block_lists(4, 4)
    assert lists.outer_starts.tolist() == [0, 4, 8]
    assert [entry[:2] for entry in entries_of(lists, 12, 0)] == [
        (range(4), range(4)),
        (range(4, 8), range(4)),
        (range(4, 8), range(4, 8)),
        (range(8, 12), range(4, 8)),
        (range(8, 12), range(8, 12)),
    ]


def test_equal_masks_share_their_lists() -> None:
    first, second = masks()[0], masks()[0]
    assert first is not second
    assert first.block_lists(4, 8) is second.block_lists(4, 8)
    assert first.block_lists(4, 8) is first.block_lists(4, 8, length=first.seq_len)
    assert first.block_lists(4, 8) is not first.block_lists(8, 4)


def test_lists_do_not_follow_the_default_device() -> None:
    mask = AttentionMask(kind="conv", text_len=6, grid_height=4, grid_width=3, kernel_size=3)
    with torch.device("meta"):
        lists, pairs = mask.block_lists(4, 4), mask.pairs()
    assert pairs == mask.dense().sum()
    check(lists, mask.dense().numpy(), mask.seq_len, 6)


@given(
    density=st.sampled_from([0.0, 0.03, 0.5, 0.97, 1.0]),
    length=st.integers(1, 24),
    text_len=st.integers(0, 24),
    outer=st.integers(1, 9),
    inner=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
def test_lists_of_any_mask(density: float, length: int, text_len: int, outer: int, inner: int, seed: int) -> None:
    allowed = np.random.default_rng(seed).random((length, length)) < density
    table = torch.from_numpy(allowed)
    lists = block_lists(lambda one, other: table[one, other], length, text_len, outer=outer, inner=inner)
    check(lists, allowed, length, text_len)
    assert len(lists.outer_starts) == len(lists.num) == len(block_starts(length, text_len, outer))
