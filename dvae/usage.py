"""How much of the codebook is in use: the quantity to watch in any discrete VAE."""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor


class Usage(NamedTuple):
    """Codebook statistics of a window of codes.

    Attributes:
        share: codes that occurred at all, over K, in [0, 1].
        perplexity: exp of the entropy of the code histogram, in [1, K].
        dead: number of codes that never occurred.
    """

    share: float
    perplexity: float
    dead: int


def code_usage(codes: Tensor, codebook_size: int) -> Usage:
    """Counts codes int64 of any shape.

    Raises:
        ValueError: if there are no codes.
    """
    return usage_of_counts(torch.bincount(codes.flatten(), minlength=codebook_size))


def usage_of_counts(counts: Tensor) -> Usage:
    """The statistics of a histogram: how often each of K codes occurred, integer [K].

    Raises:
        ValueError: if no code occurred.
    """
    total = int(counts.sum())
    if total == 0:
        raise ValueError("usage of no codes at all is undefined")
    used = counts[counts > 0]
    probability = used.double() / total
    perplexity = float(torch.exp(-(probability * probability.log()).sum()))
    return Usage(share=len(used) / len(counts), perplexity=perplexity, dead=len(counts) - len(used))


class UsageWindow:
    """Counts the codes of the last batches; the same for every quantizer.

    Args:
        codebook_size: K.
        length: batches that the window holds.
    """

    def __init__(self, codebook_size: int, *, length: int) -> None:
        self.codebook_size = codebook_size
        self._batches: deque[Tensor] = deque(maxlen=length)

    def add(self, codes: Tensor) -> None:
        """Adds the codes int64 of one batch; the oldest batch leaves a full window."""
        self._batches.append(codes.detach().flatten())

    def usage(self) -> Usage:
        """The statistics of what the window holds.

        Raises:
            ValueError: if it holds nothing.
        """
        if not self._batches:
            raise ValueError("usage of no codes at all is undefined")
        return code_usage(torch.cat(list(self._batches)), self.codebook_size)
