"""What a scorer is: images and texts in, one number per pair out; and how scores become an order."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# N pairs, H W pixels, M texts, E embedding width.


class Scorer(Protocol):
    """Says how well images fit texts. A pair's score depends on that pair alone, not on the others in the call."""

    name: str

    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Scores uint8 [N, 3, H, W] against N texts: float32 [N], higher is better. Scales differ between scorers."""
        ...


class Embedder(Protocol):
    """Places images and texts in one space, where an image lies near the texts that describe it."""

    def embed_images(self, images: Tensor) -> Tensor:
        """Embeds uint8 [N, 3, H, W] as float32 [N, E] of unit length."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeds M texts as float32 [M, E] of unit length."""
        ...


def rank(scores: Tensor | Sequence[float]) -> Tensor:
    """Orders candidates, best first.

    Args:
        scores: [N], higher is better.

    Returns:
        int64 [N], indices into `scores`; equal scores keep their order, and NaN comes last.
    """
    values = torch.as_tensor(scores, dtype=torch.float64)
    is_nan = values.isnan()
    order = torch.argsort(values.masked_fill(is_nan, -torch.inf), descending=True, stable=True)
    return order[torch.argsort(is_nan[order].long(), stable=True)]


def combine_ranks(scores: Sequence[Tensor | Sequence[float]], *, weights: Sequence[float] | None = None) -> Tensor:
    """Combines scorers by the rank that each gives a candidate, so that no scorer's scale outweighs another's.

    Args:
        scores: one [N] per scorer, higher is better; NaN counts as the worst.
        weights: one per scorer, not negative; all equal if None.

    Returns:
        float32 [N] in [0, 1]: the weighted mean share of other candidates that a candidate is better than, where an
        equal one counts half.

    Raises:
        ValueError: if lengths differ, there is no scorer, or weights are negative or all zero.
    """
    all_values = [torch.as_tensor(values, dtype=torch.float64).nan_to_num(nan=-torch.inf) for values in scores]
    shares = [1.0] * len(all_values) if weights is None else list(weights)
    lengths = {len(values) for values in all_values}
    if len(lengths) != 1:
        raise ValueError(f"scorers must score the same candidates; got lengths {sorted(lengths)}")
    if len(shares) != len(all_values) or min(shares) < 0 or sum(shares) == 0:
        raise ValueError(f"{len(all_values)} scorers need as many weights, none negative, not all zero; got {shares}")
    combined = torch.zeros_like(all_values[0])
    for values, share in zip(all_values, shares, strict=True):
        ascending = values.sort().values
        below = torch.searchsorted(ascending, values)  # [N] how many are worse
        not_above = torch.searchsorted(
            ascending, values, right=True
        )  # [N] how many are worse or equal, itself included
        better_than = (below + not_above - 1) / 2
        combined += share / sum(shares) * better_than / max(1, len(values) - 1)
    return combined.float()
