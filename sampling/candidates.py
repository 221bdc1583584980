"""The candidates of one request, as they are drawn batch by batch: codes and scores of all, pixels of none.

Codes of 10,000 candidates take 40 MB at 1,024 codes each, their pixels hundreds of times as much: the few that win are
decoded once more.

Legend: B images, I image tokens.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sampling.request import Request
from scorer.api import combine_ranks, rank


class Candidate(NamedTuple):
    """One candidate and how it fared."""

    image_index: int
    codes: Tensor
    """int64 [I]."""
    scores: dict[str, float]


class Candidates:
    """What has been drawn for a request so far.

    Args:
        request: what they are for.

    Attributes:
        num_drawn: how many candidates have ended, finished or given up.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.num_drawn = 0
        self._image_index: list[int] = []
        self._codes: list[Tensor] = []
        self._scores: dict[str, list[Tensor]] = {}

    def __len__(self) -> int:
        """How many can be ranked."""
        return len(self._image_index)

    @property
    def is_complete(self) -> bool:
        """Whether none is still to come."""
        return self.num_drawn == self.request.num_candidates

    def add(self, image_index: list[int], codes: Tensor, scores: Mapping[str, Tensor], *, num_drawn: int) -> None:
        """Add finished candidates.

        Args:
            image_index: of each.
            codes: int64 [B, I].
            scores: float [B] by scorer, the same scorers every time.
            num_drawn: how many ended, those that were given up included.
        """
        self.num_drawn += num_drawn
        self._image_index += image_index
        self._codes.append(codes.to("cpu", torch.int32))
        for name, values in scores.items():
            self._scores.setdefault(name, []).append(values.cpu())

    def best(self, scorer: str | None) -> list[Candidate]:
        """The n best, best first: by one scorer, by the ranks of all ("combined"), or by index (None)."""
        codes = torch.cat(self._codes).long()  # [B, I]
        scores = {name: torch.cat(parts) for name, parts in self._scores.items()}
        if scorer == "combined":
            scores["combined"] = combine_ranks(list(scores.values()))
        order = range(len(self)) if scorer is None else rank(scores[scorer]).tolist()
        return [
            Candidate(
                self._image_index[place], codes[place], {name: float(values[place]) for name, values in scores.items()}
            )
            for place in order[: self.request.n]
        ]
