from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.tune import DEFAULT_SETTINGS, Trial, around, choose, search, tune
from tessera.data.config import DataConfig


class Clock:
    """Time that passes when a trial is run."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def costing(
        self, seconds_per_prompt: float, value: Callable[[float, float], float]
    ) -> Callable[[float, float, int], float]:
        def run(temperature: float, guidance: float, count: int) -> float:
            self.now += seconds_per_prompt * count
            return value(temperature, guidance)

        return run


def peak(temperature: float, guidance: float) -> float:
    return 1.0 - (temperature - 0.45) ** 2 - 0.05 * (guidance - 2.5) ** 2


def test_the_search_closes_in_on_the_best_settings_in_time() -> None:
    clock = Clock()
    trials = search(clock.costing(0.02, peak), most_prompts=96, deadline=25.0, clock=clock)
    assert clock.now <= 26.0
    best = choose(trials)
    assert best.temperature == pytest.approx(0.45, abs=0.11) and best.guidance == pytest.approx(2.5, abs=0.5)
    assert best.prompts > 12


def test_a_slow_machine_tries_the_coarse_grid_only() -> None:
    clock = Clock()
    trials = search(clock.costing(0.3, peak), most_prompts=96, deadline=25.0, clock=clock)
    assert len(trials) == 9
    assert clock.now < 40.0


def test_without_time_there_are_no_trials() -> None:
    clock = Clock()
    assert search(clock.costing(10.0, peak), most_prompts=96, deadline=25.0, clock=clock) == []


def test_of_settings_within_the_noise_the_gentlest_is_chosen() -> None:
    trials = [
        Trial(0.3, 3.0, 0.805, 50),
        Trial(0.3, 1.5, 0.80, 50),
        Trial(0.6, 1.5, 0.80, 50),
        Trial(0.9, 1.0, 0.6, 50),
    ]
    assert choose(trials) == trials[2]


def test_neighbors_stay_in_range_and_begin_with_the_center() -> None:
    pairs = around(Trial(0.1, 1.0, 0.5, 10))
    assert pairs[0] == (0.1, 1.0)
    assert len(pairs) == len(set(pairs))
    assert all(temperature > 0 and guidance >= 1 for temperature, guidance in pairs)


def test_what_a_prompt_costs_is_learned_from_the_trials() -> None:
    clock = Clock()

    def value(temperature: float, guidance: float, count: int) -> float:
        clock.now += 0.3 + 0.02 * count  # a part is paid per call, as by a sampler that starts up
        return peak(temperature, guidance)

    trials = search(value, most_prompts=96, deadline=25.0, clock=clock)
    assert trials[0].prompts > 40  # by the first call of six prompts alone, a prompt seemed to cost 0.07: 25 at most
    assert clock.now <= 26.0


def test_scenes_are_tuned_by_the_parser(scenes_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.tune._MOST_PROMPTS", 6)
    tuned = tune(scenes_model, DataConfig(path="scenes"), seconds=300.0, device="cpu")
    assert set(tuned.settings) >= {"temperature", "guidance"}
    assert "parser" in tuned.how


def test_a_handful_of_captions_gets_the_defaults(scenes_model: Path, image_folder: Path) -> None:
    data = DataConfig(path=str(image_folder), image_size=(16, 16), limit=5)
    tuned = tune(scenes_model, data, seconds=5.0, device="cpu")
    assert tuned.settings == DEFAULT_SETTINGS
    assert "too few" in tuned.how


def test_other_corpora_are_tuned_by_the_scorer(
    scenes_model: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.tune._LEAST_CAPTIONS", 10)
    data = DataConfig(path=str(image_folder), image_size=(16, 16))
    monkeypatch.setattr("recipes.tune._MOST_PROMPTS", 10)
    tuned = tune(scenes_model, data, seconds=300.0, device="cpu")
    assert "scorer finds the caption" in tuned.how
