"""Settings are checked when they are made, and guidance comes in as its schedule says."""

import math

import pytest
import torch

from sampling.settings import SamplingSettings
from tessera.errors import UserError


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": 2.0},
        {"guidance": -1.0},
        {"guidance": math.inf},
        {"guidance_schedule": "cosine"},
        {"guidance_power": 0.0},
        {"guidance_threshold": -1.0},
    ],
)
def test_settings_out_of_range_are_refused_when_they_are_made(wrong: dict) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(UserError, match=f"^{name} is {value!r}, expected"):
        SamplingSettings(**wrong)


def test_a_constant_weight_is_the_same_everywhere() -> None:
    assert SamplingSettings(guidance=3.0).guidance_weights(4).tolist() == [3.0] * 4


@pytest.mark.parametrize("schedule", ["linear", "power-cosine"])
@pytest.mark.parametrize("guidance", [0.0, 5.0])
def test_a_ramp_goes_from_1_to_the_weight(schedule: str, guidance: float) -> None:
    weights = SamplingSettings(guidance=guidance, guidance_schedule=schedule).guidance_weights(9)  # type: ignore[arg-type]
    assert weights[0] == 1
    assert weights[-1] == pytest.approx(guidance)
    steps = weights.diff()
    assert (steps > 0).all() if guidance > 1 else (steps < 0).all()


def test_ramps_have_their_shapes() -> None:
    linear = SamplingSettings(guidance=5.0, guidance_schedule="linear")
    assert linear.guidance_weights(5).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    cosine = SamplingSettings(guidance=3.0, guidance_schedule="power-cosine", guidance_power=2.0)
    assert cosine.guidance_weights(3)[1] == pytest.approx(1 + 2 * (1 - math.cos(math.pi / 4)) / 2)


def test_guidance_is_off_below_the_threshold() -> None:
    settings = SamplingSettings(guidance=5.0, guidance_schedule="linear", guidance_threshold=3.0)
    assert settings.guidance_weights(5).tolist() == [1.0, 1.0, 3.0, 4.0, 5.0]
    assert settings.guided
    never = SamplingSettings(guidance=2.0, guidance_threshold=3.0)
    assert never.guidance_weights(3).tolist() == [1.0, 1.0, 1.0]
    assert not never.guided


def test_an_image_of_one_code_has_a_weight() -> None:
    assert SamplingSettings(guidance=2.0, guidance_schedule="linear").guidance_weights(1).tolist() == [1.0]
    assert not SamplingSettings().guided
    assert torch.equal(SamplingSettings().guidance_weights(2), torch.ones(2))
