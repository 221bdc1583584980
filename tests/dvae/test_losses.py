"""Loss terms against closed forms, and the settings that cannot be meant."""

import math

import pytest
import torch

from dvae.losses import LossConfig, logit_laplace_nll, reconstruction_terms, weighted_sum
from dvae.pixels import squeeze_pixels, stretch_pixels
from tessera.errors import UserError


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


def test_the_likelihoods_gradient_is_that_of_finite_differences() -> None:
    images = torch.rand(1, 3, 2, 2, dtype=torch.float64)
    output = torch.randn(1, 6, 2, 2, dtype=torch.float64)
    single = output.float().requires_grad_()
    (gradient,) = torch.autograd.grad(logit_laplace_nll(single, images.float()), single)

    def exactly(values: torch.Tensor) -> torch.Tensor:
        location, log_scale = values.chunk(2, dim=1)
        x = squeeze_pixels(images)
        scale = log_scale.exp()
        density = torch.exp(-(torch.logit(x) - location).abs() / scale) / (2 * scale * x * (1 - x))
        return -density.log().mean()

    step = 1e-6
    for place in range(output.numel()):
        shift = torch.zeros_like(output)
        shift.view(-1)[place] = step
        slope = (exactly(output + shift) - exactly(output - shift)) / (2 * step)
        assert float(gradient.flatten()[place]) == pytest.approx(float(slope), rel=1e-3, abs=1e-5)


def test_a_perfect_picture_costs_nothing_and_a_wrong_one_something() -> None:
    config = LossConfig(l1=1.0, l2=1.0, ssim=1.0, ms_ssim=1.0)
    images = torch.rand(2, 3, 24, 32)
    terms = reconstruction_terms(images, images, pixels="rgb", config=config)
    assert set(terms) == {"l1", "l2", "ssim", "ms_ssim"}
    assert max(abs(float(term)) for term in terms.values()) < 1e-5
    worse = reconstruction_terms(torch.rand(2, 3, 24, 32), images, pixels="rgb", config=config)
    assert min(float(term) for term in worse.values()) > 0.05


def test_terms_without_a_weight_are_not_computed() -> None:
    images = torch.rand(1, 3, 16, 16)
    assert set(reconstruction_terms(images, images, pixels="rgb", config=LossConfig(l2=0.0))) == {"l1"}


def test_losses_are_means_over_the_batch() -> None:
    images, output = torch.rand(1, 3, 24, 24), torch.randn(1, 6, 24, 24)
    config = LossConfig(l1=1.0, l2=1.0, ssim=1.0, ms_ssim=1.0, logit_laplace=1.0)
    alone = reconstruction_terms(output, images, pixels="logit_laplace", config=config)
    five = [tensor.expand(5, -1, -1, -1) for tensor in (output, images)]
    together = reconstruction_terms(*five, pixels="logit_laplace", config=config)
    assert len(alone) == 5
    for name, term in alone.items():
        assert float(together[name]) == pytest.approx(float(term), rel=1e-4), name


def test_the_sum_weighs_every_term_by_its_name() -> None:
    terms = {"l1": torch.tensor(2.0), "commitment": torch.tensor(3.0)}
    assert float(weighted_sum(terms, {"l1": 0.5, "commitment": 0.25, "l2": 9.0})) == pytest.approx(1.75)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"l1": -1.0}, "loss.l1 must be a finite weight of at least 0; got -1"),
        ({"l2": math.nan}, "loss.l2 must be a finite weight"),
        ({"l1": 0.0, "l2": 0.0}, "needs a reconstruction loss"),
        ({"lpips": 1.0}, "two local files: loss.lpips_backbone .*; nothing is downloaded"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LossConfig(**weights)  # type: ignore[arg-type]


def test_the_likelihood_and_the_decoder_must_fit() -> None:
    with pytest.raises(UserError, match="needs a decoder with model.pixels=logit_laplace; got rgb"):
        LossConfig(logit_laplace=1.0).check("rgb")
    with pytest.raises(UserError, match="learns its scales from loss.logit_laplace, which is 0"):
        LossConfig().check("logit_laplace")
    LossConfig(logit_laplace=1.0).check("logit_laplace")
