from pathlib import Path

import numpy as np
import pytest

from recipes import accuracy
from recipes.accuracy import (
    Judged,
    best,
    fresh_scenes,
    interleaved_prompts,
    judge,
    judge_prompts,
    oracle,
    single,
    tally,
)
from sampling.pipeline import Pipeline
from tessera.data.scenes import PROMPT_CLASSES, sample_prompts

SIZE = (64, 64)


@pytest.fixture(scope="module")
def pipeline(scenes_model: Path) -> Pipeline:
    return Pipeline.load(scenes_model, device="cpu", precision="fp32")


def test_tables_average_over_prompts_of_a_split_and_class() -> None:
    seen, unseen = sample_prompts(12, seed=1), sample_prompts(6, seed=1, pairs="unseen")
    verdicts = [np.array([index == 0, True, False, False]) for index in range(12)]
    judged = [Judged(prompt, "seen", [], verdict) for prompt, verdict in zip(seen, verdicts, strict=True)]
    judged += [Judged(prompt, "unseen", [], np.array([True, False])) for prompt in unseen]
    assert tally(judged, single)["seen"]["all"] == pytest.approx((0.5 + 11 * 0.25) / 12, abs=1e-4)
    assert tally(judged, best)["seen"] == {
        "all": pytest.approx(1 / 12, abs=1e-4),
        **{name: 0.5 if name == PROMPT_CLASSES[0] else 0.0 for name in PROMPT_CLASSES},
    }
    assert tally(judged, best)["unseen"]["all"] == 1.0
    assert tally(judged, oracle)["seen"]["all"] == 1.0


def test_any_beginning_of_the_prompts_holds_both_splits() -> None:
    prompts = interleaved_prompts(60, seed=5)
    assert len(prompts) == 120
    assert len({prompt.text for _, prompt in prompts}) > 100
    beginning = [pairs for pairs, _ in prompts[:48]]
    assert beginning.count("seen") == beginning.count("unseen")


@pytest.mark.parametrize("in_processes", [False, True])
def test_the_judge_accepts_true_renders_and_refuses_others(in_processes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "usable_cores", lambda: 2)
    images, specs = fresh_scenes(20, seed=3, pairs="unseen", image_size=SIZE)
    with judge(1_000_000 if in_processes else 1) as verdicts:
        assert verdicts(list(images), specs).mean() >= 0.95
        assert verdicts(list(images), specs[1:] + specs[:1]).mean() <= 0.2


def test_each_prompt_gets_its_candidates_with_the_pick_first(pipeline: Pipeline) -> None:
    prompts = interleaved_prompts(2, seed=0)
    judged = judge_prompts(pipeline, prompts, candidates=3, seed=0)
    assert [result.prompt for result in judged] == [prompt for _, prompt in prompts]
    for result in judged:
        assert result.satisfied.shape == (3,)
        scores = [image.scores["clip"] for image in result.images]
        assert scores == sorted(scores, reverse=True)


def test_the_deadline_ends_the_judging_between_prompts(pipeline: Pipeline) -> None:
    judged = judge_prompts(pipeline, interleaved_prompts(40, seed=0), candidates=1, seed=0, deadline=0.0)
    assert 0 < len(judged) < 80
