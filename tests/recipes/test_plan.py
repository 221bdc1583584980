"""Minutes become stages: their shares, numbers of steps, memory, and the table that shows them."""

from dataclasses import replace

import pytest

from dvae.model import DiscreteVAEConfig
from recipes.plan import (
    STAGES,
    Plan,
    Speed,
    draft,
    estimate_text_len,
    peak_memory_gib,
    seconds_for,
    stage_seconds,
    timed,
)
from recipes.plan_sizes import DataFacts, Machine
from recipes.plan_table import clock, expected_steps, plan_lines, steps_made
from tessera.data.config import DataConfig
from tessera.errors import UserError
from tessera.training.process_memory import process_gib

AMX = Machine(kind="cpu", memory_gib=24.0, flops=4e11, precision="bf16")
SCENES = DataFacts(name="scenes", num_images=20_000, image_size=(64, 64), text_len=24)
SPEED = Speed(dvae_step=0.1, prior_step=0.4, scorer_step=0.2, image=0.002)


def drafted(facts: DataFacts = SCENES, *, minutes: float = 10.0) -> Plan:
    data = DataConfig(image_size=facts.image_size)
    return draft(data, facts, AMX, minutes=minutes, device="cpu", seed=3)


def test_the_stages_share_the_budget_and_leave_some_slack() -> None:
    shares = stage_seconds(600.0)
    assert tuple(shares) == STAGES
    assert 0.95 * 600 < sum(shares.values()) < 600


def test_what_a_stage_leaves_over_or_overdraws_is_shared_by_the_later_ones() -> None:
    planned = stage_seconds(600.0)
    assert seconds_for("dvae", 600.0) == pytest.approx(planned["dvae"])
    left = 600.0 - planned["dvae"] - planned["encode"]
    assert seconds_for("prior", left) == pytest.approx(planned["prior"])
    assert seconds_for("prior", left / 2) == pytest.approx(planned["prior"] / 2)
    assert seconds_for("tuning", -5.0) > 0


def test_however_late_a_stage_begins_the_later_ones_still_fit() -> None:
    left = 200.0
    for stage in ("prior", "scorer", "tuning"):
        left -= seconds_for(stage, left)
        assert left > 0


def test_few_images_limit_batches_and_steps_to_some_hundred_epochs() -> None:
    facts = replace(SCENES, num_images=28)
    plan = timed(drafted(facts, minutes=20.0), facts, SPEED)
    for trainer in (plan.dvae.trainer, plan.prior.trainer, plan.scorer.trainer):
        assert trainer.batch_size <= 28
        assert trainer.max_steps * trainer.batch_size <= 400 * 28


def test_many_images_are_limited_by_the_clock_alone() -> None:
    plan = timed(drafted(), SCENES, SPEED)
    trainer = plan.prior.trainer
    assert trainer.budget_seconds is not None
    assert trainer.budget_seconds == pytest.approx(stage_seconds(600.0)["prior"], abs=0.1)
    assert trainer.max_steps * SPEED.prior_step > trainer.budget_seconds
    assert expected_steps(plan, "prior") == int(trainer.budget_seconds / SPEED.prior_step)
    assert plan.prior.trainer.seed == 3


def test_evaluation_takes_its_time_from_training_but_never_most_of_it() -> None:
    with_evaluation = timed(drafted(), SCENES, SPEED, evaluation_images=9_600)
    assert with_evaluation.training_seconds == pytest.approx(600 - with_evaluation.evaluation_seconds)
    assert 9_600 * 2 * SPEED.image < with_evaluation.evaluation_seconds < 150.0
    short = timed(drafted(minutes=1.0), SCENES, SPEED, evaluation_images=9_600)
    assert short.evaluation_seconds <= 15.0
    assert timed(drafted(), SCENES, SPEED).evaluation_seconds == 0


def test_memory_grows_with_batch_and_codebook() -> None:
    plan = drafted()
    larger = replace(plan, prior=replace(plan.prior, trainer=replace(plan.prior.trainer, batch_size=512)))
    assert 1.0 < peak_memory_gib(plan, SCENES, AMX) < 6.0
    assert peak_memory_gib(larger, SCENES, AMX) > peak_memory_gib(plan, SCENES, AMX)


def test_a_large_dvae_takes_the_memory_of_what_it_trains_on_at_once() -> None:
    plan = drafted()
    large = replace(plan.dvae, model=DiscreteVAEConfig(widths=(512, 1024), blocks=(4, 4)), crop=32)

    def memory(*, crop: int | None = 32, batch_size: int = 64, accumulate: int = 1) -> float:
        settings = replace(large.trainer, batch_size=batch_size, accumulate=accumulate)
        return peak_memory_gib(replace(plan, dvae=replace(large, crop=crop, trainer=settings)), SCENES, AMX)

    assert memory(accumulate=4) == pytest.approx(memory(batch_size=16))
    assert memory(accumulate=4) < memory()
    assert memory(crop=None, accumulate=4) == pytest.approx(memory()), "whole pictures have four times the pixels"


def test_the_process_itself_takes_less_of_a_gpu() -> None:
    plan = drafted()
    large = replace(plan.dvae, model=DiscreteVAEConfig(widths=(512, 1024), blocks=(4, 4)))  # more than the prior
    cpu, gpu = (peak_memory_gib(replace(plan, dvae=large), SCENES, replace(AMX, kind=kind)) for kind in ("cpu", "cuda"))
    assert cpu - gpu == pytest.approx(process_gib("cpu") - process_gib("cuda"))


def test_text_length_covers_nearly_all_captions() -> None:
    assert estimate_text_len(["a red star"] * 10) == 8
    assert estimate_text_len(["word " * 500]) == 256
    assert estimate_text_len(["", ""]) == 8
    assert estimate_text_len([]) == 8


def test_minutes_must_be_positive() -> None:
    with pytest.raises(UserError, match="minutes must be positive"):
        Plan(minutes=0.0)


def test_the_table_names_every_stage_with_time_and_steps() -> None:
    plan = timed(drafted(), SCENES, SPEED)
    text = "\n".join(plan_lines(plan, SCENES, AMX))
    for stage in STAGES:
        assert f"\n{stage} " in text
    assert "20,000 images" in text
    assert "at most 10:00" in text
    assert "of 24 GiB" in text
    assert f"{expected_steps(plan, 'dvae'):,}" in text


def test_a_stage_that_came_short_of_the_plan_says_so() -> None:
    plan = timed(drafted(), SCENES, SPEED)
    expected = expected_steps(plan, "prior")
    assert expected is not None
    assert steps_made(plan, "prior", int(0.9 * expected)) == f"{int(0.9 * expected):,} steps"
    assert steps_made(plan, "prior", 205) == f"205 steps of {expected:,} expected: there was no time for more"


def test_the_time_of_a_frozen_dvae_goes_to_prior_and_scorer() -> None:
    planned = stage_seconds(600.0)
    without = stage_seconds(600.0, stages=STAGES[1:])
    assert tuple(without) == STAGES[1:]
    assert sum(without.values()) == pytest.approx(sum(planned.values()))
    assert without["encode"] == planned["encode"]
    assert without["prior"] / without["scorer"] == pytest.approx(planned["prior"] / planned["scorer"])
    left = 600.0 - without["encode"]
    assert seconds_for("prior", left, stages=STAGES[1:]) == pytest.approx(without["prior"])


def test_clock_shows_minutes_and_seconds() -> None:
    assert [clock(value) for value in (0, 59.6, 125, 3600)] == ["0:00", "1:00", "2:05", "60:00"]
