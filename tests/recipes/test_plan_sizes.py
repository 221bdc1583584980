"""Sizes follow from images, memory and time, the smallest ones whatever there is."""

from dataclasses import replace

import pytest

from dvae.model import DiscreteVAEConfig
from recipes.plan_sizes import (
    PRIOR_ROWS,
    DataFacts,
    Machine,
    Sizes,
    affordable_sizes,
    batch_for,
    crop_for,
    dvae_memory_gib,
    layout_for,
    trained_size,
)
from tessera.errors import UserError
from transformer.model import PriorConfig

SLOW = Machine(kind="cpu", memory_gib=8.0, flops=5e10, precision="fp32")
AMX = Machine(kind="cpu", memory_gib=24.0, flops=4e11, precision="bf16")
H200 = Machine(kind="cuda", memory_gib=139.0, flops=6e14, precision="bf16")
SCENES = DataFacts(name="scenes", num_images=20_000, image_size=(64, 64), text_len=24)
MANY = replace(SCENES, num_images=2_000_000)


def chosen(facts: DataFacts = SCENES, machine: Machine = AMX, *, minutes: float = 10.0) -> Sizes:
    return affordable_sizes(facts, machine, dvae_seconds=12 * minutes, prior_seconds=36 * minutes)


def test_the_models_grow_with_speed_and_time() -> None:
    resources = ((SLOW, 1.0), (AMX, 10.0), (H200, 10.0), (H200, 600.0))
    sizes = [chosen(MANY, machine, minutes=minutes) for machine, minutes in resources]
    dims = [size.prior.dim for size in sizes]
    assert dims == sorted(dims) and len(set(dims)) >= 3
    assert dims[-1] == PRIOR_ROWS[-1].dim
    widths = [size.vae.widths for size in sizes]
    assert widths == sorted(widths) and widths[0] < widths[-1]


def test_few_images_get_small_models_however_much_time_there_is() -> None:
    few = chosen(replace(SCENES, num_images=30), H200, minutes=600.0)
    assert few.prior.dim < 512
    assert few.vae.widths < chosen(MANY, H200, minutes=600.0).vae.widths


def test_a_model_that_does_not_fit_the_memory_is_not_chosen() -> None:
    small_gpu = replace(H200, memory_gib=4.0)
    assert chosen(MANY, small_gpu, minutes=600.0).prior.dim < chosen(MANY, H200, minutes=600.0).prior.dim


def test_every_row_of_the_table_builds() -> None:
    for row in PRIOR_ROWS:
        PriorConfig(dim=row.dim, depth=row.depth, heads=row.heads, attention=row.attention)


@pytest.mark.parametrize("image_size, codes", [((64, 64), 64), ((128, 128), 256), ((256, 256), 256), ((64, 96), 96)])
def test_large_images_get_more_downsampling_rather_than_more_codes(image_size: tuple[int, int], codes: int) -> None:
    facts = replace(SCENES, image_size=image_size)
    assert layout_for(facts, chosen(facts).vae).image_len == codes


def test_an_image_size_that_does_not_divide_is_refused_with_one_that_does() -> None:
    with pytest.raises(UserError, match=r"100x64.*divisible by 8.*96"):
        chosen(replace(SCENES, image_size=(100, 64)))


@pytest.mark.parametrize("image_size, crop", [((64, 64), 32), ((64, 128), 32), ((32, 32), None)])
def test_crops_are_half_of_the_shorter_side_or_none(image_size: tuple[int, int], crop: int | None) -> None:
    found = crop_for(image_size, DiscreteVAEConfig(widths=(48, 96), blocks=(1, 2)))
    assert found == crop
    assert trained_size(image_size, found) == ((crop, crop) if crop else image_size)


def test_the_memory_of_a_dvae_follows_pixels_and_images_at_once() -> None:
    config = DiscreteVAEConfig(widths=(48, 96), blocks=(1, 2))
    one = dvae_memory_gib(config, (32, 32), 8)
    assert dvae_memory_gib(config, (64, 32), 8) == pytest.approx(2 * one)
    assert dvae_memory_gib(config, (32, 32), 24) == pytest.approx(3 * one)


def test_few_images_limit_the_batch() -> None:
    assert [batch_for(64, replace(SCENES, num_images=count)) for count in (2, 30, 500)] == [4, 30, 64]
