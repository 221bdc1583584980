"""Filters keep exactly the codes that they should, guidance is exact at its ends, and no caller's tensor changes."""

import math

import pytest
import torch
from torch import Tensor

from sampling import logits as L
from tessera.errors import UserError

PROBABILITIES = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]])
LOGITS = PROBABILITIES.log()


def kept(logits: Tensor) -> list[set[int]]:
    return [set(row.isfinite().nonzero()[:, 0].tolist()) for row in logits]


def test_guidance_is_unconditional_at_0_and_conditional_at_1_bit_for_bit() -> None:
    conditional, unconditional = torch.randn(5, 7), torch.randn(5, 7)
    assert torch.equal(L.guidance(conditional, unconditional, weight=0.0), unconditional)
    assert torch.equal(L.guidance(conditional, unconditional, weight=1.0), conditional)


def test_guidance_extrapolates_from_unconditional_through_conditional() -> None:
    conditional, unconditional = torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 1.0]])
    assert L.guidance(conditional, unconditional, weight=2.0).tolist() == [[5.0, -3.0]]
    assert L.guidance(conditional, unconditional, weight=0.5).tolist() == [[2.0, 0.0]]


def test_no_function_changes_its_arguments() -> None:
    logits, other, uniform = torch.randn(4, 9), torch.randn(4, 9), torch.rand(4, dtype=torch.float64)
    before = [tensor.clone() for tensor in (logits, other, uniform)]
    L.guidance(logits, other, weight=3.0)
    L.temperature(logits, 0.0)
    L.temperature(logits, 0.5)
    L.top_k(logits, 3)
    L.top_p(logits, 0.5)
    L.min_p(logits, 0.5)
    L.choose(logits, uniform)
    for tensor, copy in zip((logits, other, uniform), before, strict=True):
        assert torch.equal(tensor, copy)


def test_temperature_divides_and_zero_keeps_the_first_of_the_most_likely() -> None:
    assert torch.equal(L.temperature(LOGITS, 0.5), LOGITS * 2)
    assert kept(L.temperature(torch.tensor([[1.0, 5.0, 5.0], [2.0, 0.0, 1.0]]), 0)) == [{1}, {0}]


@pytest.mark.parametrize(
    ("k", "expected"), [(0, {0, 1, 2, 3}), (1, {1}), (2, {1, 3}), (3, {1, 2, 3}), (4, {0, 1, 2, 3}), (9, {0, 1, 2, 3})]
)
def test_top_k_keeps_exactly_the_k_largest(k: int, expected: set[int]) -> None:
    result = L.top_k(LOGITS, k)
    assert kept(result)[0] == expected
    assert torch.equal(result[0, list(expected)], LOGITS[0, list(expected)])


def test_top_k_keeps_all_equals_of_the_last_one_kept() -> None:
    assert kept(L.top_k(torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]]), 2)) == [{1, 2, 3}]


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (1e-9, [{1}, {0}]),
        (0.4, [{1}, {0}]),
        (0.41, [{1, 3}, {0}]),
        (0.7, [{1, 3}, {0}]),  # 0.4 + 0.3 reach 0.7, though not in floating point
        (0.75, [{1, 2, 3}, {0}]),
        (0.98, [{0, 1, 2, 3}, {0, 1}]),  # the lowest number among equals
        (1.0, [{0, 1, 2, 3}, {0, 1, 2, 3}]),
    ],
)
def test_top_p_keeps_exactly_the_smallest_set_that_reaches_p(p: float, expected: list[set[int]]) -> None:
    assert kept(L.top_p(LOGITS, p)) == expected


@pytest.mark.parametrize(
    ("p", "expected"), [(0.0, {0, 1, 2, 3}), (0.2, {0, 1, 2, 3}), (0.26, {1, 2, 3}), (0.6, {1, 3}), (1.0, {1})]
)
def test_min_p_keeps_codes_relative_to_the_most_likely(p: float, expected: set[int]) -> None:
    assert kept(L.min_p(LOGITS, p))[0] == expected


@pytest.mark.parametrize(
    ("check", "wrong"),
    [
        (L.check_temperature, -0.1),
        (L.check_temperature, math.nan),
        (L.check_temperature, math.inf),
        (L.check_top_k, -1),
        (L.check_top_k, 2.5),
        (L.check_top_p, 0.0),
        (L.check_top_p, 1.01),
        (L.check_top_p, math.nan),
        (L.check_min_p, -0.1),
        (L.check_min_p, 1.5),
        (L.check_min_p, math.nan),
        (L.check_guidance, -1.0),
        (L.check_guidance, math.nan),
        (L.check_guidance, math.inf),
    ],
)
def test_values_out_of_range_are_refused_with_what_was_given_and_what_is_right(check, wrong: float) -> None:
    with pytest.raises(UserError, match=rf"is {wrong}, expected"):
        check(wrong)


def test_guidance_refuses_tensors_of_different_shape() -> None:
    with pytest.raises(UserError, match=r"\(2, 3\).*\(2, 4\)"):
        L.guidance(torch.zeros(2, 3), torch.zeros(2, 4), weight=2.0)


def test_choose_follows_the_distribution() -> None:
    # Evenly spaced numbers visit each code in exact proportion to its probability, but for one at each border.
    count = 100_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    codes = L.choose(LOGITS[:1].expand(count, -1), uniform)
    assert torch.bincount(codes, minlength=4).tolist() == pytest.approx((PROBABILITIES[0] * count).tolist(), abs=2)


def test_choose_never_draws_what_was_filtered_out_even_at_the_ends_of_the_interval() -> None:
    logits = torch.full((2, 5), -math.inf)
    logits[:, 1], logits[:, 3] = 0.0, 0.0
    uniform = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert L.choose(logits, uniform).tolist() == [1, 3]


def test_choose_treats_each_row_alone() -> None:
    logits, uniform = torch.randn(64, 33) * 3, torch.rand(64, dtype=torch.float64)
    together = L.choose(logits, uniform)
    alone = torch.cat([L.choose(logits[i : i + 1], uniform[i : i + 1]) for i in range(64)])
    assert torch.equal(together, alone)
