"""Time spans as people read them."""

import pytest

from tessera.duration import duration


@pytest.mark.parametrize(
    "seconds, shown",
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (3_569, "59 min"), (3_571, "1 h 0 min"), (93_600, "1 d 2 h")],
)
def test_durations_are_shown_in_their_two_largest_units(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
