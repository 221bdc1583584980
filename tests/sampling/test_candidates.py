"""Candidates as they come in, batch by batch: all are remembered, those given up are counted, the best come first."""

import math

import pytest
import torch

from sampling.candidates import Candidates
from sampling.request import Request


def candidates_of(n: int, num_candidates: int, *parts: list[float]) -> Candidates:
    """Candidates whose clip scores come in parts; their codes are their index."""
    collected = Candidates(Request(prompt="x", n=n, num_candidates=num_candidates))
    for part in parts:
        first = len(collected)
        index = list(range(first, first + len(part)))
        codes = torch.tensor(index)[:, None].expand(-1, 3)
        collected.add(index, codes, {"clip": torch.tensor(part)}, num_drawn=len(part))
    return collected


def test_the_best_come_first_whichever_batch_drew_them() -> None:
    collected = candidates_of(3, 5, [0.1, 0.9], [0.5, 0.95], [0.2])
    best = collected.best("clip")
    assert [candidate.image_index for candidate in best] == [3, 1, 2]
    assert [candidate.codes.tolist() for candidate in best] == [[3] * 3, [1] * 3, [2] * 3]
    assert [candidate.scores["clip"] for candidate in best] == pytest.approx([0.95, 0.9, 0.5])
    assert collected.is_complete and len(collected) == 5


def test_batches_may_come_in_any_order_and_without_a_scorer_the_first_come_first() -> None:
    collected = Candidates(Request(prompt="x", n=2, num_candidates=4))
    collected.add([0, 1], torch.zeros(2, 3, dtype=torch.int64), {}, num_drawn=2)
    assert not collected.is_complete
    collected.add([2, 3], torch.ones(2, 3, dtype=torch.int64), {}, num_drawn=2)
    assert [candidate.image_index for candidate in collected.best(None)] == [0, 1]


def test_those_that_were_given_up_are_waited_for_but_not_ranked() -> None:
    collected = Candidates(Request(prompt="x", n=1, num_candidates=4))
    collected.add([1, 3], torch.zeros(2, 3, dtype=torch.int64), {"clip": torch.tensor([0.2, 0.4])}, num_drawn=4)
    assert collected.is_complete and len(collected) == 2
    assert [candidate.image_index for candidate in collected.best("clip")] == [3]


def test_equal_scores_keep_their_order_and_what_is_not_a_number_comes_last() -> None:
    collected = candidates_of(4, 4, [math.nan, 0.5], [0.5, 0.7])
    assert [candidate.image_index for candidate in collected.best("clip")] == [3, 1, 2, 0]


def test_combined_is_the_mean_of_the_ranks_over_all_batches() -> None:
    collected = Candidates(Request(prompt="x", n=3, num_candidates=3))
    codes = torch.zeros(3, 3, dtype=torch.int64)
    clip, likelihood = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-5.0, 900.0, -7.0])
    collected.add([0, 1], codes[:2], {"clip": clip[:2], "likelihood": likelihood[:2]}, num_drawn=2)
    collected.add([2], codes[2:], {"clip": clip[2:], "likelihood": likelihood[2:]}, num_drawn=1)
    best = collected.best("combined")
    assert [candidate.image_index for candidate in best] == [1, 2, 0]  # ranks (2 + 3) / 2, (3 + 1) / 2, (1 + 2) / 2
    assert [candidate.scores["combined"] for candidate in best] == pytest.approx([0.75, 0.5, 0.25])


def test_codes_take_four_bytes_each_and_come_back_as_they_were() -> None:
    collected = Candidates(Request(prompt="x"))
    codes = torch.tensor([[0, 7, 2**31 - 1]])
    collected.add([0], codes, {}, num_drawn=1)
    (candidate,) = collected.best(None)
    assert candidate.codes.dtype == torch.int64 and candidate.codes.tolist() == codes[0].tolist()
