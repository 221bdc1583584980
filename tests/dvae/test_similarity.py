"""PSNR, SSIM and multi-scale SSIM: values and gradients of torchmetrics, and the pictures where losses break."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from dvae.similarity import SCALE_WEIGHTS, ms_ssim, num_scales, psnr, ssim


def noisy_pair(*shape: int, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Smooth pictures and noisy versions of them, both strictly inside [0, 1]."""
    images = F.interpolate(torch.rand(shape[0], shape[1], 8, 8), shape[2:], mode="bicubic").clamp(0.2, 0.8)
    return images + noise * (torch.rand(shape) - 0.5), images


def torchmetrics_similarity(x: Tensor, y: Tensor) -> Tensor:
    """SSIM over the windows that lie inside the picture, as the paper has it."""
    _, everywhere = structural_similarity_index_measure(
        x, y, data_range=1.0, sigma=1.5, reduction="none", return_full_image=True
    )
    return everywhere[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))


def torchmetrics_structure(x: Tensor, y: Tensor) -> Tensor:
    _, structure = structural_similarity_index_measure(
        x, y, data_range=1.0, sigma=1.5, reduction="none", return_contrast_sensitivity=True
    )
    return structure


def torchmetrics_ms_ssim(x: Tensor, y: Tensor, scales: int) -> Tensor:
    exponents = [weight / sum(SCALE_WEIGHTS[:scales]) for weight in SCALE_WEIGHTS[:scales]]
    product = torch.ones(len(x), dtype=x.dtype)
    for exponent in exponents[:-1]:
        product = product * torchmetrics_structure(x, y) ** exponent
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return product * torchmetrics_similarity(x, y) ** exponents[-1]


def test_psnr_and_ssim_of_known_pictures() -> None:
    images = torch.full((1, 3, 16, 16), 0.5)
    assert float(psnr(images + 0.1, images)) == pytest.approx(20, abs=1e-3)
    noisy = torch.rand(1, 3, 16, 16)
    assert float(ssim(noisy, noisy)) == pytest.approx(1, abs=1e-5)
    assert float(ssim(torch.rand(1, 3, 16, 16), noisy)) < 0.3


@pytest.mark.parametrize("shape", [(2, 3, 32, 48), (1, 1, 24, 17)])
def test_ssim_is_that_of_torchmetrics_with_its_gradient(shape: tuple[int, ...]) -> None:
    reconstruction, images = noisy_pair(*shape)
    ours = reconstruction.clone().requires_grad_()
    theirs = reconstruction.double().requires_grad_()
    value, expected = ssim(ours, images), torchmetrics_similarity(theirs, images.double())
    torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(value.sum(), ours)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), theirs)
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(("shape", "scales"), [((2, 3, 64, 80), 3), ((2, 3, 45, 31), 2), ((1, 1, 176, 176), 5)])
def test_ms_ssim_is_the_product_of_torchmetrics_parts_with_its_gradient(shape: tuple[int, ...], scales: int) -> None:
    assert num_scales(shape[2], shape[3]) == scales
    reconstruction, images = noisy_pair(*shape)
    ours = reconstruction.clone().requires_grad_()
    theirs = reconstruction.double().requires_grad_()
    value, expected = ms_ssim(ours, images), torchmetrics_ms_ssim(theirs, images.double(), scales)
    torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(value.sum(), ours)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), theirs)
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("measure", [psnr, ssim, ms_ssim])
def test_gradients_are_those_of_finite_differences(measure) -> None:  # type: ignore[no-untyped-def]
    reconstruction, images = noisy_pair(1, 3, 32, 32, noise=0.2)
    direction = torch.randn_like(reconstruction)
    step = 1e-3
    slope = (
        measure(reconstruction + step * direction, images) - measure(reconstruction - step * direction, images)
    ) / (2 * step)
    (gradient,) = torch.autograd.grad(measure(reconstruction.requires_grad_(), images).sum(), reconstruction)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("measure", [psnr, ssim, ms_ssim])
@pytest.mark.parametrize("kind", ["equal", "flat", "inverted", "black"])
def test_gradients_are_finite_on_extreme_pictures(measure, kind: str) -> None:  # type: ignore[no-untyped-def]
    images = torch.rand(2, 3, 32, 32)
    reconstruction = {
        "equal": images.clone(),
        "flat": torch.full_like(images, 0.5),
        "inverted": 1 - images,
        "black": torch.zeros_like(images),
    }[kind].requires_grad_()
    value = measure(reconstruction, images)
    (gradient,) = torch.autograd.grad(value.sum(), reconstruction)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


def test_negative_similarity_has_the_least_value_and_one_such_scale_leaves_the_others_their_gradient() -> None:
    images = torch.rand(1, 3, 32, 32)
    assert float(ssim(1 - images, images)) < 0
    assert float(ms_ssim(1 - images, images)) == pytest.approx(1e-3)
    details = images - F.interpolate(F.avg_pool2d(images, 2), scale_factor=2)
    reconstruction = (images - 2 * details).clamp(0, 1).requires_grad_()  # inverted at the finest scale only
    assert float(torchmetrics_structure(reconstruction.detach(), images)) < 0
    value = ms_ssim(reconstruction, images)
    (gradient,) = torch.autograd.grad(value.sum(), reconstruction)
    better = ms_ssim((reconstruction + 0.1 * gradient / gradient.abs().max()).detach(), images)
    assert float(better) > float(value.detach()) + 0.001


def test_equal_pictures_have_similarity_one_at_every_number_of_scales() -> None:
    images = torch.rand(2, 3, 64, 48)
    for scales in (1, 2, 3, None):
        torch.testing.assert_close(ms_ssim(images, images, scales=scales), torch.ones(2))


def test_one_scale_is_plain_ssim() -> None:
    reconstruction, images = noisy_pair(2, 3, 24, 24)
    torch.testing.assert_close(ms_ssim(reconstruction, images, scales=1), ssim(reconstruction, images))


def test_as_many_scales_are_used_as_leave_one_window() -> None:
    assert [num_scales(side, 500) for side in (4, 21, 22, 43, 44, 88, 175, 176, 4096)] == [1, 1, 2, 2, 3, 4, 4, 5, 5]
    assert num_scales(500, 21) == 1


@pytest.mark.parametrize("scales", [0, 4])
def test_scales_that_do_not_fit_are_refused(scales: int) -> None:
    images = torch.rand(1, 3, 64, 64)
    with pytest.raises(ValueError, match=f"64x64 pixels has 1 to 3 scales; got {scales}"):
        ms_ssim(images, images, scales=scales)


@pytest.mark.parametrize("measure", [psnr, ssim, ms_ssim])
def test_autocast_changes_nothing(measure) -> None:  # type: ignore[no-untyped-def]
    reconstruction, images = noisy_pair(2, 3, 48, 48)
    expected = measure(reconstruction, images)
    with torch.autocast("cpu", torch.bfloat16):
        value = measure(reconstruction, images)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)


@pytest.mark.parametrize("measure", [psnr, ssim, ms_ssim])
def test_each_image_is_measured_by_itself(measure) -> None:  # type: ignore[no-untyped-def]
    reconstruction, images = noisy_pair(3, 3, 48, 48)
    alone = torch.cat([measure(reconstruction[i : i + 1], images[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(measure(reconstruction, images), alone)
