from pathlib import Path

import pytest

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


def test_one_image_is_too_few(image_folder: Path) -> None:
    request = Request(path=str(image_folder), image_size=(32, 32), device="cpu", overrides=("data.limit=1",))
    with pytest.raises(UserError, match="at least 2"):
        make_plan(request, cache_dir=None, say=lambda _: None)
