"""Schedules at their ends, in the middle, and with settings that cannot be meant."""

import pytest

from dvae.schedule import ScheduleConfig, kl_weight, relaxation_temperature
from tessera.errors import UserError


def test_schedules_start_end_and_stay() -> None:
    assert relaxation_temperature(0.0) == 1
    assert relaxation_temperature(0.05) == pytest.approx(1 / 16)
    assert relaxation_temperature(1.0) == pytest.approx(1 / 16)
    assert relaxation_temperature(0.025) == pytest.approx((1 + 1 / 16) / 2)
    assert kl_weight(0.0) == 0
    assert kl_weight(1.0) == pytest.approx(6.6)
    values = [kl_weight(step / 1000, share=0.5) for step in range(1001)]
    assert values == sorted(values)


def test_the_papers_schedules_are_shares_of_three_million_updates() -> None:
    assert kl_weight(5_000 / 3_000_000) == pytest.approx(6.6)
    assert kl_weight(4_000 / 3_000_000) < 6.6
    assert relaxation_temperature(149_000 / 3_000_000) > 1 / 16


def test_shares_beyond_the_training_are_refused() -> None:
    with pytest.raises(UserError, match=r"shares in \[0, 1\]; got 0.0625, 1.5 and 0.1"):
        ScheduleConfig(temperature_share=1.5)
    with pytest.raises(UserError, match="final_temperature > 0"):
        ScheduleConfig(final_temperature=0.0)
