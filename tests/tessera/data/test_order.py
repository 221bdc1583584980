"""Keyed order: every epoch a permutation, every draw a function of seed, epoch and index alone."""

import numpy as np
import pytest

from tessera.data.order import mix, permuted, sample_keys


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 1000, 4097])
def test_every_epoch_is_a_permutation(size: int) -> None:
    order = permuted(np.arange(size), size=size, key=7)
    assert sorted(order.tolist()) == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    first, second = (sample_keys(start, 100, size=100, seed=0) for start in (0, 100))
    assert [key.index for key in first] != [key.index for key in second]
    assert [key.index for key in first] != [key.index for key in sample_keys(0, 100, size=100, seed=1)]
    assert sorted(key.index for key in second) == list(range(100))


def test_any_position_is_reached_directly() -> None:
    stream = sample_keys(0, 250, size=70, seed=3)
    assert sample_keys(133, 50, size=70, seed=3) == stream[133:183]


def test_the_order_is_fixed_for_all_time() -> None:
    # A change of these numbers would silently reshuffle every run that is resumed.
    assert [key.index for key in sample_keys(0, 6, size=10, seed=0)] == [3, 1, 9, 8, 5, 7]


def test_hashes_spread_over_their_range() -> None:
    values = mix(5, np.arange(20_000)).astype(np.float64) / 2.0**64
    assert abs(values.mean() - 0.5) < 0.01
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-square, 19 degrees of freedom, p about 0.001
