"""Which blocks of a mask hold allowed pairs: for each block of one side, the blocks of the other that matter to it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# N positions, T of them text; "outer" is the side whose blocks are listed for (queries, or keys when transposed).


@dataclass(frozen=True, eq=False)
class BlockLists:
    """For each outer block the inner blocks with at least one allowed pair, those allowed whole first.

    Text and image are cut separately: the last text block ends at T, and the first image block starts there.

    Attributes:
        outer: positions of an outer block.
        inner: positions of an inner block.
        outer_starts: int32 [blocks], first position of each outer block, ascending.
        first: int32 [blocks], where the list of each outer block starts in `starts`.
        num_full: int32 [blocks], how many entries from there on are allowed whole; short blocks never count as such.
        num: int32 [blocks], how many entries the list has.
        starts: int32 [entries], first position of each inner block, ascending among the full and among the others.
    """

    outer: int
    inner: int
    outer_starts: NDArray[np.int32]
    first: NDArray[np.int32]
    num_full: NDArray[np.int32]
    num: NDArray[np.int32]
    starts: NDArray[np.int32]


def block_starts(length: int, text_len: int, block: int) -> NDArray[np.int32]:
    """First positions of the blocks of `length` positions, text and image cut separately."""
    text = np.arange(0, min(text_len, length), block)
    return np.concatenate([text, np.arange(text_len, length, block)]).astype(np.int32)


def block_lists(
    allowed: Callable[[Tensor, Tensor], Tensor], length: int, text_len: int, *, outer: int, inner: int
) -> BlockLists:
    """Lists the blocks of any mask.

    Args:
        allowed: from outer positions and inner positions, broadcast, to bool.
        length: N, positions.
        text_len: T, how many of them are text.
        outer: positions of an outer block.
        inner: positions of an inner block.
    """
    position = torch.arange(length, device="cpu")
    inner_starts = block_starts(length, text_len, inner)
    ends = np.append(inner_starts[1:], length)
    is_whole = ends - inner_starts == inner
    outer_starts = block_starts(length, text_len, outer)
    full, partial = [], []
    for start, end in zip(outer_starts, np.append(outer_starts[1:], length), strict=True):
        pairs = allowed(position[start:end, None], position[None, :])  # [outer, N]
        # each inner position counts how many outer ones it is allowed with; reduceat sums whole blocks
        sums = np.add.reduceat(pairs.sum(dim=0).numpy(), inner_starts)
        is_full = is_whole & (sums == inner * (end - start))
        full.append(inner_starts[is_full])
        partial.append(inner_starts[(sums > 0) & ~is_full])
    num_full = np.array([len(starts) for starts in full], dtype=np.int32)
    num = num_full + np.array([len(starts) for starts in partial], dtype=np.int32)
    lists = [starts for both in zip(full, partial, strict=True) for starts in both]
    return BlockLists(
        outer=outer,
        inner=inner,
        outer_starts=outer_starts,
        first=(np.cumsum(num) - num).astype(np.int32),
        num_full=num_full,
        num=num.astype(np.int32),
        starts=np.concatenate(lists).astype(np.int32),
    )
