from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes.origin import open_base
from recipes.plan import Plan
from recipes.planning import make_plan, overridden
from recipes.run_folder import Request
from tessera.errors import UserError


def test_overrides_change_the_plan_and_nothing_else() -> None:
    plan = overridden(Plan(), ["prior.model.depth=2", "dvae.flip=true"])
    assert (plan.prior.model.depth, plan.dvae.flip) == (2, True)
    assert plan.prior.model.dim == Plan().prior.model.dim


def test_an_unknown_override_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"did you mean 'prior.model.depth'"):
        overridden(Plan(), ["prior.model.dept=2"])


def test_a_plan_follows_overrides_of_sizes_and_steps(image_folder: Path, tiny: tuple[str, ...]) -> None:
    said: list[str] = []
    request = Request(path=str(image_folder), minutes=0.1, image_size=(32, 32), device="cpu", overrides=tiny)
    plan, facts, corpus, machine = make_plan(request, cache_dir=None, say=said.append)
    assert "kept 24" in said[0]
    assert plan.dvae.model.widths == (8, 16)
    assert plan.dvae.trainer.max_steps == 3
    assert facts.num_images == len(corpus) < 24
    assert machine.flops > 0
    assert plan.speed is not None and min(plan.speed.dvae_step, plan.speed.prior_step, plan.speed.image) > 0


def continuing(images: Path, model: Path, *overrides: str, **changes: Any) -> Request:
    base = open_base(model)
    request = Request(
        path=str(images),
        minutes=0.1,
        image_size=base.image_size,
        device="cpu",
        init_from=base.origin.path,
        init_sha256=base.origin.sha256,
        overrides=overrides,
    )
    return replace(request, **changes)


def test_a_plan_that_goes_on_from_a_model_takes_its_sizes_and_counts_captions(
    image_folder: Path, scenes_model: Path
) -> None:
    said: list[str] = []
    plan, facts, _, _ = make_plan(continuing(image_folder, scenes_model), cache_dir=None, say=said.append)
    base = open_base(scenes_model)
    assert (plan.origin, plan.prior.model) == (base.origin, base.prior)
    assert facts.text_len == plan.encode.text_len == 24
    assert "different captions, 0 have characters" in said[1] and "cut at 24 text positions" in said[1]


@pytest.mark.parametrize(
    "override, message",
    [
        ("prior.model.depth=2", "the sizes of the prior are those of"),
        ("scorer.model.dim=8", "the sizes of the scorer are those of"),
        ("dvae.flip=true", "--train-dvae trains it on"),
        ("encode.text_len=8", "captions are read as"),
        ("scorer.vocab_size=300", "captions are read as"),
        ("prior.init_from=elsewhere", "give --from"),
        ("origin.train_dvae=true", "follows from --from"),
        ("data.image_size=[32,32]", "--image-size 32x32: the model that --from names.*draws 16x16"),
    ],
)
def test_what_a_model_settles_cannot_be_overridden(
    override: str, message: str, image_folder: Path, scenes_model: Path
) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(continuing(image_folder, scenes_model, override), cache_dir=None, say=lambda _: None)


def test_a_model_that_changed_since_it_was_asked_for_is_refused(image_folder: Path, scenes_model: Path) -> None:
    request = continuing(image_folder, scenes_model, init_sha256="0" * 64)
    with pytest.raises(UserError, match="has changed: expected sha256 000000000000"):
        make_plan(request, cache_dir=None, say=lambda _: None)


def test_one_image_is_too_few(image_folder: Path) -> None:
    request = Request(path=str(image_folder), image_size=(32, 32), device="cpu", overrides=("data.limit=1",))
    with pytest.raises(UserError, match="at least 2"):
        make_plan(request, cache_dir=None, say=lambda _: None)
