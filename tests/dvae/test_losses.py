"""Pixel losses against closed forms, schedules at their ends, metrics on known pictures."""

import math

import pytest
import torch

from dvae.losses import (
    kl_weight,
    logit_laplace_nll,
    pixel_loss,
    psnr,
    relaxation_temperature,
    squeeze_pixels,
    ssim,
    stretch_pixels,
    to_pixels,
)


def test_logit_laplace_is_a_density() -> None:
    """exp(-nll), integrated over the squeezed interval (0, 1), is one."""
    squeezed = torch.linspace(0, 1, 200_002, dtype=torch.float64)[1:-1]
    images = stretch_pixels(squeezed).float().view(1, 1, 1, -1)
    total = 0.0
    output = torch.tensor([0.4, math.log(0.7)]).view(1, 2, 1, 1).expand(1, 2, 1, images.shape[-1])
    location, log_scale = output.double().chunk(2, dim=1)
    x = squeeze_pixels(images.double())
    density = torch.exp(-(torch.logit(x) - location).abs() / log_scale.exp()) / (2 * log_scale.exp() * x * (1 - x))
    total = float(torch.trapezoid(density.flatten(), squeezed))
    assert total == pytest.approx(1, abs=1e-3)
    one = images[..., 1000:1001]
    nll = logit_laplace_nll(output[..., :1].repeat_interleave(3, dim=1), one.expand(1, 3, 1, 1))
    assert float(nll) == pytest.approx(-math.log(float(density[..., 1000])), rel=1e-4)


def test_pixels_survive_the_squeeze_and_the_likelihoods_best_location() -> None:
    images = torch.rand(1, 3, 4, 4)
    torch.testing.assert_close(stretch_pixels(squeeze_pixels(images)), images)
    output = torch.cat([torch.logit(squeeze_pixels(images)), torch.zeros(1, 3, 4, 4)], dim=1)
    torch.testing.assert_close(to_pixels(output, "logit_laplace"), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["mixed", "l1", "l2"])
def test_a_perfect_picture_costs_nothing(kind: str) -> None:
    images = torch.rand(2, 3, 4, 4)
    assert float(pixel_loss(images, images, kind)) == 0  # type: ignore[arg-type]
    assert float(pixel_loss(images + 0.1, images, kind)) > 0  # type: ignore[arg-type]


def test_losses_are_means_over_the_batch() -> None:
    images, output = torch.rand(1, 3, 8, 8), torch.randn(1, 6, 8, 8)
    alone = float(logit_laplace_nll(output, images))
    assert float(logit_laplace_nll(output.expand(5, -1, -1, -1), images.expand(5, -1, -1, -1))) == pytest.approx(alone)


def test_schedules_start_end_and_stay() -> None:
    assert relaxation_temperature(0.0) == 1
    assert relaxation_temperature(0.05) == pytest.approx(1 / 16)
    assert relaxation_temperature(1.0) == pytest.approx(1 / 16)
    assert relaxation_temperature(0.025) == pytest.approx((1 + 1 / 16) / 2)
    assert kl_weight(0.0) == 0
    assert kl_weight(1.0) == pytest.approx(6.6)
    values = [kl_weight(step / 1000, share=0.5) for step in range(1001)]
    assert values == sorted(values)


def test_psnr_and_ssim_of_known_pictures() -> None:
    images = torch.full((1, 3, 16, 16), 0.5)
    assert float(psnr(images + 0.1, images)) == pytest.approx(20, abs=1e-3)
    noisy = torch.rand(1, 3, 16, 16)
    assert float(ssim(noisy, noisy)) == pytest.approx(1, abs=1e-5)
    assert float(ssim(torch.rand(1, 3, 16, 16), noisy)) < 0.3
