"""What the losses at five rates per width say about the rule that predicts the rate of another width."""

import pytest

from benchmarks.learning_rate import FULL, QUICK, REFERENCE_WIDTH, Scale, lowest_between, rates_of, rows_of, scaled_rate
from benchmarks.record import Row
from tessera.config import load
from transformer.train import TrainConfig


def losses_with_best(place: int, lowest: float = 1.0) -> list[float]:
    """Losses at five rates, a tenth more for each factor of two away from the best."""
    return [lowest + 0.1 * abs(other - place) for other in range(5)]


def judged(rows: list[Row]) -> dict[str, bool | None]:
    return {row.name: row.holds for row in rows if row.goal is not None}


@pytest.mark.parametrize("scale", [FULL, QUICK])
def test_the_rates_of_all_widths_correspond(scale: Scale) -> None:
    for width in scale.widths:
        rates = rates_of(width, scale)
        assert [later / earlier for earlier, later in zip(rates, rates[1:], strict=False)] == pytest.approx([2.0] * 4)
        of_reference = rates_of(REFERENCE_WIDTH, scale)
        moved = [scaled_rate(rate, width=REFERENCE_WIDTH, to_width=width) for rate in of_reference]
        assert moved == pytest.approx(rates)


def test_a_rule_that_predicts_the_best_rates_holds() -> None:
    rows = rows_of({width: losses_with_best(2) for width in FULL.widths}, FULL)
    verdicts = judged(rows)
    assert len(verdicts) == 4
    assert all(verdicts.values())
    slope = next(row.value for row in rows if row.name.startswith("slope"))
    assert slope == pytest.approx(-0.5)


def test_a_rate_two_steps_off_fails_and_one_that_costs_more_than_a_hundredth_fails() -> None:
    losses = {64: losses_with_best(1), 128: losses_with_best(2), 256: losses_with_best(4)}
    assert judged(rows_of(losses, FULL)) == {
        "width 64: rate predicted from width 128": True,
        "width 64: loss at the predicted rate": False,
        "width 256: rate predicted from width 128": False,
        "width 256: loss at the predicted rate": False,
    }


def test_the_optimum_between_rates_is_that_of_a_parabola() -> None:
    rates = [1.0, 2.0, 4.0, 8.0, 16.0]
    exponents = [0, 1, 2, 3, 4]
    assert lowest_between(rates, [(place - 2.25) ** 2 for place in exponents]) == pytest.approx(2.0**2.25)
    assert lowest_between(rates, [float(place) for place in exponents]) == 1.0


@pytest.mark.parametrize("file", ["5m", "50m", "350m", "1300m"])
def test_the_recipes_follow_the_rule(file: str) -> None:
    config = load(TrainConfig, [f"configs/prior/{file}.yaml"], prog="tessera")
    expected = scaled_rate(3e-3, width=REFERENCE_WIDTH, to_width=config.model.dim)
    assert config.optim.learning_rate == pytest.approx(expected, rel=0.01)
