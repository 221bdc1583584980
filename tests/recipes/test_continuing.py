"""Training goes on from a model with its sizes, gentler and for fewer passes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dvae.model import DiscreteVAEConfig
from recipes.continuing import CONTINUED_RATE, MOST_CONTINUED_EPOCHS, learns_anew, starts_from
from recipes.origin import Base, Origin, open_base
from recipes.plan import STAGES, Plan, Speed, draft, peak_memory_gib, timed
from recipes.plan_sizes import DataFacts, Machine
from recipes.plan_table import plan_lines
from scorer.model import ClipScorerConfig
from tessera.data.config import DataConfig
from transformer.model import PriorConfig, SequenceLayout

AMX = Machine(kind="cpu", memory_gib=24.0, flops=4e11, precision="bf16")
H200 = Machine(kind="cuda", memory_gib=139.0, flops=6e14, precision="bf16")
SCENES = DataFacts(name="scenes", num_images=20_000, image_size=(64, 64), text_len=24)
SPEED = Speed(dvae_step=0.1, prior_step=0.4, scorer_step=0.2, image=0.002)


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


def drafted(facts: DataFacts = SCENES, *, minutes: float = 10.0) -> Plan:
    return draft(DataConfig(), facts, AMX, minutes=minutes, device="cpu", seed=3)


def continued(base: Base, *, minutes: float = 10.0, machine: Machine = AMX) -> Plan:
    return draft(DataConfig(), SCENES, machine, minutes=minutes, device="cpu", seed=3, base=base)


def test_stages_start_from_the_parts_that_the_model_has() -> None:
    origin = Origin(path="/models/m", sha256="abc", parts=("dvae", "prior"))
    assert [starts_from(origin, stage) for stage in ("dvae", "prior", "scorer")] == [None, "/models/m", None]
    assert starts_from(replace(origin, train_dvae=True), "dvae") == "/models/m"
    assert starts_from(None, "prior") is None


def test_a_prior_learns_anew_where_its_codes_come_to_mean_others() -> None:
    origin = Origin(path="/models/m", sha256="abc", parts=("dvae", "prior", "scorer"))
    assert not learns_anew(origin, "prior") and learns_anew(replace(origin, train_dvae=True), "prior")
    assert not learns_anew(replace(origin, train_dvae=True), "scorer")
    assert learns_anew(replace(origin, parts=("dvae", "prior")), "scorer") and learns_anew(None, "scorer")


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
    assert 7 * plan.prior.trainer.max_steps < new.prior.trainer.max_steps
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
