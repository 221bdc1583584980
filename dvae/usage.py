"""How much of the codebook is in use: the quantity to watch in any discrete VAE."""

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
    if codes.numel() == 0:
        raise ValueError("usage of no codes at all is undefined")
    counts = torch.bincount(codes.flatten(), minlength=codebook_size).double()
    used = int((counts > 0).sum())
    probability = counts[counts > 0] / counts.sum()
    perplexity = float(torch.exp(-(probability * probability.log()).sum()))
    return Usage(share=used / codebook_size, perplexity=perplexity, dead=codebook_size - used)
