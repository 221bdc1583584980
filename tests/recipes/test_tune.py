from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.tune import DEFAULT_SETTINGS, Trial, choose, search, tune
from tessera.data.config import DataConfig


class Clock:
    """Time that passes when a trial is run."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def costing(
        self, seconds_per_prompt: float, value: Callable[[float, float], float]
    ) -> Callable[[float, float, range], float]:
        def run(temperature: float, guidance: float, span: range) -> float:
            self.now += seconds_per_prompt * len(span)
            return value(temperature, guidance)

        return run


def peak(temperature: float, guidance: float) -> float:
    return 1.0 - (temperature - 0.45) ** 2 - 0.05 * (guidance - 2.5) ** 2


def test_the_search_finds_the_best_settings_in_time() -> None:
    clock = Clock()
    trials = search(clock.costing(0.02, peak), most_prompts=160, deadline=25.0, clock=clock)
    assert clock.now <= 25.0
    assert len(trials) == 16
    best = choose(trials)
    assert (best.temperature, best.guidance) == (0.5, 2.0)
    assert best.prompts > 100


def test_most_prompts_go_to_the_best_and_each_setting_sees_a_prompt_once() -> None:
    seen: dict[tuple[float, float], list[int]] = {}
    clock = Clock()

    def value(temperature: float, guidance: float, span: range) -> float:
        clock.now += 0.02 * len(span)
        seen.setdefault((temperature, guidance), []).extend(span)
        # what the first prompts say of the best setting is wrong, what the others say is right
        unlucky = (temperature, guidance) == (0.5, 2.0) and span.start == 0
        return peak(temperature, guidance) - (0.05 if unlucky else 0.0)

    trials = search(value, most_prompts=160, deadline=25.0, clock=clock)
    assert (choose(trials).temperature, choose(trials).guidance) == (0.5, 2.0)
    seen[(0.75, 2.0)] = seen[(0.75, 2.0)][6:]  # the call that measures the cost of a prompt
    assert all(len(set(prompts)) == len(prompts) for prompts in seen.values())
    assert len(seen[(0.5, 2.0)]) > 3 * len(seen[(1.0, 1.0)])


def test_a_slow_machine_tries_the_first_round_only() -> None:
    clock = Clock()
    trials = search(clock.costing(0.2, peak), most_prompts=160, deadline=25.0, clock=clock)
    assert [trial.prompts for trial in trials] == [6] * 16
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
        Trial(0.75, 2.0, 0.99, 6),  # lucky with few prompts
    ]
    assert choose(trials) == trials[2]


def test_what_a_prompt_costs_is_learned_from_the_trials() -> None:
    clock = Clock()

    def value(temperature: float, guidance: float, span: range) -> float:
        clock.now += 0.3 + 0.005 * len(span)  # a part is paid per call, as by a sampler that starts up
        return peak(temperature, guidance)

    trials = search(value, most_prompts=1000, deadline=25.0, clock=clock)
    # by the first call of six prompts alone one seemed to cost 0.055: at most 7 + 14 + 28 + 57 of them
    assert choose(trials).prompts > 200
    assert clock.now <= 27.0


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
