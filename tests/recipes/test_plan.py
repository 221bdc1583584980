from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dvae.model import DiscreteVAEConfig
from recipes.origin import Base, Origin, open_base
from recipes.plan import (
    CONTINUED_RATE,
    MOST_CONTINUED_EPOCHS,
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
    seconds_for,
    stage_seconds,
    timed,
)
from recipes.plan_table import clock, expected_steps, plan_lines
from scorer.model import ClipScorerConfig
from tessera.data.config import DataConfig
from tessera.errors import UserError
from transformer.model import PriorConfig, SequenceLayout

AMX = Machine(kind="cpu", memory_gib=24.0, flops=4e11, precision="bf16")
SLOW = Machine(kind="cpu", memory_gib=8.0, flops=5e10, precision="fp32")
H200 = Machine(kind="cuda", memory_gib=139.0, flops=6e14, precision="bf16")
SCENES = DataFacts(name="scenes", num_images=20_000, image_size=(64, 64), text_len=24)
SPEED = Speed(dvae_step=0.1, prior_step=0.4, scorer_step=0.2, image=0.002)


def drafted(facts: DataFacts = SCENES, machine: Machine = AMX, *, minutes: float = 10.0) -> Plan:
    data = DataConfig(image_size=facts.image_size)
    return draft(data, facts, machine, minutes=minutes, device="cpu", seed=3)


@pytest.fixture
def base(scenes_model: Path) -> Base:
    """What a model of a row's sizes holds; its tokenizer is never asked."""
    vae = DiscreteVAEConfig(widths=(48, 96), blocks=(1, 2))
    layout = SequenceLayout(text_len=16, grid_height=8, grid_width=8, text_vocab_size=600, codebook_size=vae.num_codes)
    return Base(
        origin=Origin(path="/models/m", sha256="abc", parts=("dvae", "prior", "scorer")),
        image_size=(64, 64),
        vae=vae,
        prior=PriorConfig(layout=layout, dim=128, depth=4, heads=4),
        scorer=ClipScorerConfig(image_size=(64, 64), text_len=16, text_vocab_size=600, dim=96),
        tokenizer=open_base(scenes_model).tokenizer,
    )


def replace_origin(base: Base, **changes: Any) -> Base:
    return base._replace(origin=replace(base.origin, **changes))


def continued(base: Base, *, minutes: float = 10.0, machine: Machine = AMX) -> Plan:
    return draft(DataConfig(), SCENES, machine, minutes=minutes, device="cpu", seed=3, base=base)


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
    assert 1.0 < peak_memory_gib(plan, SCENES, AMX) < 6.0
    assert peak_memory_gib(larger, SCENES, AMX) > peak_memory_gib(plan, SCENES, AMX)


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


def test_the_time_of_a_frozen_dvae_goes_to_prior_and_scorer() -> None:
    planned = stage_seconds(600.0)
    without = stage_seconds(600.0, stages=STAGES[1:])
    assert tuple(without) == STAGES[1:]
    assert sum(without.values()) == pytest.approx(sum(planned.values()))
    assert without["encode"] == planned["encode"]
    assert without["prior"] / without["scorer"] == pytest.approx(planned["prior"] / planned["scorer"])
    left = 600.0 - without["encode"]
    assert seconds_for("prior", left, stages=STAGES[1:]) == pytest.approx(without["prior"])


def test_a_model_that_goes_on_keeps_its_sizes_whatever_the_budget(base: Base) -> None:
    plan = continued(base, minutes=600.0, machine=H200)
    assert (plan.dvae.model, plan.prior.model, plan.scorer.model) == (base.vae, base.prior, base.scorer)
    assert plan.encode.text_len == base.prior.layout.text_len
    assert plan.stages == STAGES[1:]
    assert (plan.dvae.init_from, plan.prior.init_from, plan.scorer.init_from) == (None, "/models/m", "/models/m")


def test_weights_that_go_on_learn_at_a_share_of_the_rate_for_new_ones(base: Base) -> None:
    new, plan = drafted(), continued(replace_origin(base, train_dvae=True))
    assert plan.stages == STAGES and plan.dvae.init_from == "/models/m"
    for stage in ("dvae", "prior", "scorer"):
        rate = getattr(new, stage).optim.learning_rate
        assert getattr(plan, stage).optim.learning_rate == pytest.approx(CONTINUED_RATE * rate)


def test_weights_that_go_on_see_few_images_less_often_than_new_ones(base: Base) -> None:
    facts = replace(SCENES, num_images=400)
    new, plan = (timed(plan, facts, SPEED) for plan in (drafted(facts, minutes=200.0), continued(base, minutes=200.0)))
    assert plan.prior.trainer.max_steps * plan.prior.trainer.batch_size == MOST_CONTINUED_EPOCHS * 400
    assert 30 * plan.prior.trainer.max_steps < new.prior.trainer.max_steps
    assert plan.scorer.trainer.max_steps < new.scorer.trainer.max_steps
    relearning = timed(continued(replace_origin(base, train_dvae=True), minutes=200.0), facts, SPEED)
    for stage in ("dvae", "prior"):  # the codes come to mean something else
        assert getattr(relearning, stage).trainer.max_steps == getattr(new, stage).trainer.max_steps


def test_a_scorer_that_is_new_learns_at_the_usual_rate(base: Base) -> None:
    without = replace_origin(base._replace(scorer=None), parts=("dvae", "prior"))
    plan = continued(without)
    assert plan.scorer.init_from is None and plan.scorer.optim == drafted().scorer.optim
    assert "scorer     new: m has none" in "\n".join(plan_lines(timed(plan, SCENES, SPEED), SCENES, AMX))


def test_a_model_too_large_for_the_memory_gets_smaller_batches(base: Base) -> None:
    large = base._replace(prior=replace(base.prior, dim=512, depth=12, heads=8))
    plan = continued(large, machine=replace(H200, memory_gib=6.0))
    assert plan.prior.model.dim == 512
    assert 1 < plan.prior.trainer.batch_size < continued(large, machine=H200).prior.trainer.batch_size


def test_a_frozen_dvae_takes_no_memory_for_its_training(base: Base) -> None:
    wide = base._replace(vae=replace(base.vae, widths=(256, 512), blocks=(4, 4)))
    frozen, trained = (continued(replace_origin(wide, train_dvae=train)) for train in (False, True))
    assert peak_memory_gib(frozen, SCENES, AMX) < peak_memory_gib(trained, SCENES, AMX)


def test_the_table_says_where_each_part_comes_from(base: Base) -> None:
    text = "\n".join(plan_lines(timed(continued(base), SCENES, SPEED), SCENES, AMX))
    assert "from    /models/m, sha256 abc" in text
    for line in ("tokenizer  from m, frozen", "dvae       from m, frozen", "prior      from m, trained on"):
        assert f"\n{line}\n" in text
    assert text.count("\ndvae ") == 1  # no row in the table of stages
    trained = timed(continued(replace_origin(base, train_dvae=True)), SCENES, SPEED)
    text = "\n".join(plan_lines(trained, SCENES, AMX))
    assert "dvae       from m, trained on: its codes change, and the prior has to relearn them" in text
    assert "from " not in "\n".join(plan_lines(timed(drafted(), SCENES, SPEED), SCENES, AMX))


def test_clock_shows_minutes_and_seconds() -> None:
    assert [clock(value) for value in (0, 59.6, 125, 3600)] == ["0:00", "1:00", "2:05", "60:00"]
