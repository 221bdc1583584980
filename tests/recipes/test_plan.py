from dataclasses import replace

import pytest

from recipes.plan import (
    PRIOR_ROWS,
    STAGES,
    DataFacts,
    Machine,
    Plan,
    Speed,
    draft,
    estimate_text_len,
    layout_for,
    peak_memory_gib,
    prior_parameters,
    seconds_for,
    stage_seconds,
    timed,
)
from recipes.plan_table import clock, expected_steps, plan_lines
from tessera.data.config import DataConfig
from tessera.errors import UserError
from transformer.model import Prior, PriorConfig, SequenceLayout

AMX = Machine(kind="cpu", memory_gib=24.0, flops=4e11, precision="bf16")
SLOW = Machine(kind="cpu", memory_gib=8.0, flops=5e10, precision="fp32")
H200 = Machine(kind="cuda", memory_gib=139.0, flops=6e14, precision="bf16")
SCENES = DataFacts(name="scenes", num_images=20_000, image_size=(64, 64), text_len=24)
SPEED = Speed(dvae_step=0.1, prior_step=0.4, scorer_step=0.2, image=0.002)


def drafted(facts: DataFacts = SCENES, machine: Machine = AMX, *, minutes: float = 10.0) -> Plan:
    data = DataConfig(image_size=facts.image_size)
    return draft(data, facts, machine, minutes=minutes, device="cpu", seed=3)


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


def test_the_models_grow_with_speed_and_time() -> None:
    facts = replace(SCENES, num_images=2_000_000)
    resources = ((SLOW, 1.0), (AMX, 10.0), (H200, 10.0), (H200, 600.0))
    plans = [drafted(facts, machine, minutes=minutes) for machine, minutes in resources]
    dims = [plan.prior.model.dim for plan in plans]
    assert dims == sorted(dims) and len(set(dims)) >= 3
    assert dims[-1] == PRIOR_ROWS[-1].dim
    widths = [plan.dvae.model.widths for plan in plans]
    assert widths == sorted(widths) and widths[0] < widths[-1]


def test_few_images_get_small_models_however_much_time_there_is() -> None:
    few = drafted(replace(SCENES, num_images=30), H200, minutes=600.0)
    assert few.prior.model.dim < 512
    assert few.dvae.model.widths < drafted(replace(SCENES, num_images=2_000_000), H200, minutes=600.0).dvae.model.widths


def test_a_model_that_does_not_fit_the_memory_is_not_chosen() -> None:
    facts = replace(SCENES, num_images=2_000_000)
    small_gpu = replace(H200, memory_gib=4.0)
    assert (
        drafted(facts, small_gpu, minutes=600.0).prior.model.dim < drafted(facts, H200, minutes=600.0).prior.model.dim
    )


def test_every_row_of_the_table_builds() -> None:
    for row in PRIOR_ROWS:
        PriorConfig(dim=row.dim, depth=row.depth, heads=row.heads, attention=row.attention)


def test_parameters_are_counted_as_the_model_counts_them() -> None:
    config = PriorConfig(layout=SequenceLayout(text_len=8, text_vocab_size=300, codebook_size=100), dim=64, depth=3)
    counted = sum(parameter.numel() for parameter in Prior(config).parameters())
    assert prior_parameters(config) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("image_size, codes", [((64, 64), 64), ((128, 128), 256), ((256, 256), 256), ((64, 96), 96)])
def test_large_images_get_more_downsampling_rather_than_more_codes(image_size: tuple[int, int], codes: int) -> None:
    facts = replace(SCENES, image_size=image_size)
    plan = drafted(facts)
    assert layout_for(facts, plan.dvae.model).image_len == codes


def test_an_image_size_that_does_not_divide_is_refused_with_one_that_does() -> None:
    with pytest.raises(UserError, match=r"100x64.*divisible by 8.*96"):
        drafted(replace(SCENES, image_size=(100, 64)))


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
    assert 1.0 < peak_memory_gib(plan, SCENES) < 6.0
    assert peak_memory_gib(larger, SCENES) > peak_memory_gib(plan, SCENES)


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


def test_clock_shows_minutes_and_seconds() -> None:
    assert [clock(value) for value in (0, 59.6, 125, 3600)] == ["0:00", "1:00", "2:05", "60:00"]
