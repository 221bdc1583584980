"""Scores become an order: ties keep their place, NaN comes last, and no scorer's scale counts."""

import math

import pytest
import torch

from scorer.api import combine_ranks, rank


def test_best_comes_first() -> None:
    assert rank([0.1, 3.0, -2.0]).tolist() == [1, 0, 2]


def test_equal_scores_keep_their_order() -> None:
    assert rank([1.0, 2.0, 1.0, 2.0, 1.0]).tolist() == [1, 3, 0, 2, 4]


def test_nan_comes_last_even_after_minus_infinity() -> None:
    assert rank([math.nan, -math.inf, 0.0, math.nan, math.inf]).tolist() == [4, 2, 1, 0, 3]


def test_no_candidates_have_an_empty_order() -> None:
    assert rank([]).tolist() == []


def test_permuting_candidates_permutes_the_order() -> None:
    scores = torch.randn(20, generator=torch.Generator().manual_seed(0))
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert torch.equal(shuffled[rank(scores[shuffled])], rank(scores))


def test_combination_depends_on_ranks_alone() -> None:
    first, second = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.4, 0.1, 0.2, 0.3])
    combined = combine_ranks([first, second])
    assert torch.equal(combined, combine_ranks([first.exp() * 1e6, second - 100]))
    assert combined.tolist() == pytest.approx([0.5, 1 / 6, 0.5, 5 / 6])
    assert combined.dtype == torch.float32


def test_weights_decide_between_scorers_that_disagree() -> None:
    scores = [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]
    assert rank(combine_ranks(scores, weights=[2, 1])).tolist() == [2, 1, 0]
    assert rank(combine_ranks(scores, weights=[1, 2])).tolist() == [0, 1, 2]
    assert combine_ranks(scores, weights=[1, 0]).tolist() == [0.0, 0.5, 1.0]


def test_equal_candidates_share_their_rank_and_nan_is_worst() -> None:
    assert combine_ranks([[5.0, 5.0, 5.0]]).tolist() == [0.5, 0.5, 0.5]
    assert combine_ranks([[math.nan, 1.0, 0.0]]).tolist() == [0.0, 1.0, 0.5]
    assert combine_ranks([[7.0]]).tolist() == [0.0]


@pytest.mark.parametrize(
    ("scores", "weights"),
    [([[1.0, 2.0], [1.0]], None), ([[1.0]], [1.0, 2.0]), ([[1.0]], [-1.0]), ([[1.0]], [0.0]), ([], None)],
)
def test_scores_that_cannot_be_combined_are_refused(scores: list[list[float]], weights: list[float] | None) -> None:
    with pytest.raises(ValueError, match="scorers"):
        combine_ranks(scores, weights=weights)
