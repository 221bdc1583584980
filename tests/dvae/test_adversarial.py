"""The adversarial loss: closed forms, finite differences, and which gradient reaches whom."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvae.adversarial import (
    AdversarialConfig,
    AdversarialLosses,
    Adversary,
    LeCam,
    PatchDiscriminator,
    adaptive_weight,
    feature_matching_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    ramp_weight,
)
from tessera.errors import UserError

SMALL = AdversarialConfig(weight=0.5, feature_matching=2.0, width=4, layers=2, start=0.2, ramp=0.4)
FULL, HALF, BEFORE = 1.0, 0.4, 0.1  # shares of training: after, in the middle of and before SMALL's ramp


class Setting:
    """A decoder of one layer, an adversary, and one training step of them."""

    def __init__(self, config: AdversarialConfig = SMALL, *, progress: float = FULL) -> None:
        self.images = torch.rand(3, 3, 16, 24)
        self.decoder = nn.Conv2d(5, 3, 3, padding=1)
        self.latents = torch.randn(3, 5, 16, 24)
        self.adversary = Adversary(config)
        self.reconstruction = torch.sigmoid(self.decoder(self.latents))
        self.reconstruction_loss = F.mse_loss(self.reconstruction, self.images)
        self.losses = self.judged(progress)

    def judged(self, progress: float) -> AdversarialLosses:
        return self.adversary.losses(
            self.images,
            self.reconstruction,
            reconstruction_loss=self.reconstruction_loss,
            last_layer=self.decoder.weight,
            progress=progress,
        )

    def gradients(self, loss: Tensor, module: nn.Module) -> list[Tensor | None]:
        return list(torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True))


def test_hinge_losses_match_their_closed_forms() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert float(hinge_discriminator_loss(real, fake)) == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3) / 2)
    assert float(hinge_generator_loss(fake)) == pytest.approx(2 / 3)


def test_gradients_of_hinge_and_lecam_are_those_of_finite_differences() -> None:
    real = torch.tensor([2.0, 0.5, -1.3, 0.2], dtype=torch.float64, requires_grad=True)
    fake = torch.tensor([-3.0, 0.1, 1.4, -0.6], dtype=torch.float64, requires_grad=True)
    lecam = LeCam().eval()
    lecam.real_mean.fill_(0.7)
    lecam.fake_mean.fill_(-0.4)
    assert torch.autograd.gradcheck(hinge_discriminator_loss, (real, fake))
    assert torch.autograd.gradcheck(hinge_generator_loss, (fake,))
    assert torch.autograd.gradcheck(lecam, (real, fake))


def test_lecam_matches_its_closed_form() -> None:
    lecam = LeCam().eval()
    lecam.real_mean.fill_(1.0)
    lecam.fake_mean.fill_(-1.0)
    real, fake = torch.tensor([2.0, -3.0]), torch.tensor([0.0, 4.0])
    assert float(lecam(real, fake)) == pytest.approx((3**2 + 0) / 2 + (1**2 + 0) / 2)


def test_lecams_means_follow_the_logits_in_training_only() -> None:
    lecam = LeCam(decay=0.9)
    real, fake = torch.full((4,), 2.0, requires_grad=True), torch.full((4,), -1.0)
    lecam.train()(real, fake)
    assert [float(mean) for mean in lecam.buffers()] == pytest.approx([0.2, -0.1])
    lecam(real, fake)
    assert [float(mean) for mean in lecam.buffers()] == pytest.approx([0.38, -0.19])
    lecam.eval()(real, fake)
    assert [float(mean) for mean in lecam.buffers()] == pytest.approx([0.38, -0.19])
    assert set(lecam.state_dict()) == {"real_mean", "fake_mean"}


def test_lecams_means_forget_a_step_that_is_not_finite() -> None:
    lecam = LeCam(decay=0.5)
    lecam(torch.full((2,), 1.0), torch.full((2,), -1.0))
    lecam(torch.tensor([float("nan"), 1.0]), torch.tensor([float("inf"), 1.0]))
    assert [float(mean) for mean in lecam.buffers()] == pytest.approx([0.5, -0.5])


def test_feature_matching_is_the_mean_over_layers_and_leaves_the_target_alone() -> None:
    fake = [torch.zeros(2, 4, 3, 3, requires_grad=True), torch.zeros(2, 8, 1, 1, requires_grad=True)]
    real = [torch.full((2, 4, 3, 3), 1.0, requires_grad=True), torch.full((2, 8, 1, 1), -3.0, requires_grad=True)]
    loss = feature_matching_loss(fake, real)
    assert float(loss.detach()) == pytest.approx((1 + 3) / 2)
    loss.backward()
    assert all(layer.grad is None for layer in real)
    torch.testing.assert_close(fake[1].grad, torch.full((2, 8, 1, 1), 1 / 2 / 16))


def test_feature_matching_refuses_other_layers() -> None:
    with pytest.raises(ValueError, match="same layers of both; got 1 and 2"):
        feature_matching_loss([torch.zeros(1)], [torch.zeros(1)] * 2)


def test_the_ramp_starts_rises_and_stays() -> None:
    values = [ramp_weight(progress, start=0.2, length=0.4) for progress in (0.0, 0.2, 0.3, 0.4, 0.6, 1.0)]
    assert values == pytest.approx([0, 0, 0.25, 0.5, 1, 1])
    assert [ramp_weight(progress, start=0.5, length=0.0) for progress in (0.49, 0.5)] == [0, 1]


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    first, second = (weight.square().sum(), (weight * 7).sum())
    ratio = adaptive_weight(first, second, weight, most=1e4)
    assert float(ratio) == pytest.approx(float((2 * weight).norm().detach()) / (7 * 12**0.5), rel=1e-6)
    assert not ratio.requires_grad
    (first + second).backward()  # both graphs are still there
    assert float(adaptive_weight(weight.square().sum(), 1e-9 * weight.sum(), weight, most=50.0)) == 50
    assert float(adaptive_weight(weight.square().sum(), 0 * weight.sum(), weight, most=50.0)) == 50


@pytest.mark.parametrize(
    ("layers", "size", "grid"),
    [
        (3, (16, 16), (2, 2)),
        (3, (64, 40), (8, 5)),
        (3, (17, 100), (2, 12)),
        (4, (16, 16), (1, 1)),
        (1, (16, 20), (8, 10)),
    ],
)
def test_the_discriminator_takes_any_size(layers: int, size: tuple[int, int], grid: tuple[int, int]) -> None:
    discriminator = PatchDiscriminator(width=4, layers=layers)
    verdict = discriminator(torch.rand(2, 3, *size))
    assert verdict.logits.shape == (2, 1, *grid)
    assert len(verdict.features) == layers + 1
    assert verdict.features[0].shape == (2, 4, size[0] // 2, size[1] // 2)
    assert verdict.features[-1].shape[2:] == grid
    assert verdict.features[0].is_contiguous(memory_format=torch.channels_last)


def test_images_that_are_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 8 pixels; got \(1, 3, 16, 7\)"):
        PatchDiscriminator(width=4, layers=3)(torch.rand(1, 3, 16, 7))


def test_a_patch_of_the_default_discriminator_is_54_pixels_wide() -> None:
    config = AdversarialConfig()
    discriminator = PatchDiscriminator(width=4, layers=config.layers)
    images = torch.rand(1, 3, 128, 128, requires_grad=True)
    (gradient,) = torch.autograd.grad(discriminator(images).logits[0, 0, 8, 8], images)
    seen = gradient[0].abs().sum(dim=0)
    assert int((seen.sum(dim=0) > 0).sum()) == 54
    assert int((seen.sum(dim=1) > 0).sum()) == 54


def test_an_image_is_judged_the_same_alone_and_in_a_batch() -> None:
    discriminator = PatchDiscriminator(width=8, layers=2)  # in training mode, where batch statistics would act
    images = torch.rand(4, 3, 16, 16)
    together = discriminator(images)
    alone = discriminator(images[2:3])
    torch.testing.assert_close(alone.logits, together.logits[2:3], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(alone.features[-1], together.features[-1][2:3], atol=1e-6, rtol=1e-5)
    (gradient,) = torch.autograd.grad(discriminator(images.requires_grad_()).logits[2].sum(), images)
    assert (gradient[[0, 1, 3]] == 0).all()


def test_the_decoders_terms_give_the_discriminator_no_gradient() -> None:
    step = Setting()
    for loss in (step.losses.generator, step.losses.feature_matching):
        assert all(gradient is None for gradient in step.gradients(loss, step.adversary))
        assert all(gradient is not None and gradient.any() for gradient in step.gradients(loss, step.decoder))


def test_the_discriminators_terms_give_the_decoder_no_gradient() -> None:
    step = Setting()
    for loss in (step.losses.discriminator, step.losses.lecam):
        assert all(gradient is None for gradient in step.gradients(loss, step.decoder))
        assert any(gradient is not None and gradient.any() for gradient in step.gradients(loss, step.adversary))


def test_one_backward_pass_gives_each_its_own_gradient() -> None:
    step = Setting()
    for_decoder = step.gradients(
        step.reconstruction_loss + step.losses.generator + step.losses.feature_matching, step.decoder
    )
    for_discriminator = step.gradients(step.losses.discriminator + step.losses.lecam, step.adversary)
    (step.reconstruction_loss + step.losses.total).backward()
    for parameter, expected in zip(step.decoder.parameters(), for_decoder, strict=True):
        torch.testing.assert_close(parameter.grad, expected)
    for parameter, expected in zip(step.adversary.parameters(), for_discriminator, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize(("progress", "ramp"), [(HALF, 0.5), (FULL, 1.0)])
def test_the_terms_carry_weight_ramp_and_adaptive_weight(progress: float, ramp: float) -> None:
    step = Setting(progress=progress)
    real, fake = (step.adversary.discriminator(pictures) for pictures in (step.images, step.reconstruction))
    adversarial = -fake.logits.mean()
    (wanted,) = torch.autograd.grad(step.reconstruction_loss, step.decoder.weight, retain_graph=True)
    (unwanted,) = torch.autograd.grad(adversarial, step.decoder.weight, retain_graph=True)
    balance = wanted.norm() / unwanted.norm()
    torch.testing.assert_close(step.losses.adaptive_weight, balance)
    torch.testing.assert_close(step.losses.generator, ramp * 0.5 * balance * adversarial)
    matching = torch.stack([(a - b).abs().mean() for a, b in zip(fake.features, real.features, strict=True)]).mean()
    torch.testing.assert_close(step.losses.feature_matching, ramp * 2.0 * matching)
    torch.testing.assert_close(step.losses.discriminator, hinge_discriminator_loss(real.logits, fake.logits))
    assert float(step.losses.real_accuracy) == float((real.logits > 0).float().mean())
    assert float(step.losses.fake_accuracy) == float((fake.logits < 0).float().mean())


def test_without_the_adaptive_weight_the_terms_have_the_configs() -> None:
    config = AdversarialConfig(weight=0.5, width=4, layers=2, adaptive=False, start=0, ramp=0)
    step = Setting(config, progress=0.0)
    fake = step.adversary.discriminator(step.reconstruction)
    torch.testing.assert_close(step.losses.generator, -0.5 * fake.logits.mean())
    assert float(step.losses.adaptive_weight) == 1
    assert float(step.losses.feature_matching) == 0


def test_before_the_ramp_the_discriminator_learns_and_the_decoder_pays_nothing() -> None:
    step = Setting()
    passes: list[int] = []
    step.adversary.discriminator.stem.register_forward_hook(lambda *_: passes.append(1))
    losses = step.judged(BEFORE)
    assert len(passes) == 1
    assert all(float(value) == 0 for value in (losses.generator, losses.feature_matching, losses.adaptive_weight))
    assert float(losses.discriminator.detach()) > 0
    assert all(gradient is None for gradient in step.gradients(losses.total, step.decoder))
    assert all(gradient is not None for gradient in step.gradients(losses.total, step.adversary))
    step.judged(HALF)
    assert len(passes) == 3


def test_losses_are_float32_under_bf16_autocast() -> None:
    step = Setting()
    with torch.autocast("cpu", torch.bfloat16):
        step.reconstruction = torch.sigmoid(step.decoder(step.latents)).float()
        step.reconstruction_loss = F.mse_loss(step.reconstruction, step.images)
        losses = step.judged(FULL)
    assert all(value.dtype == torch.float32 for value in losses)
    (step.reconstruction_loss + losses.total).backward()
    gradients = [p.grad for module in (step.decoder, step.adversary) for p in module.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(losses.discriminator, step.losses.discriminator, atol=0.02, rtol=0.02)


def test_a_discriminator_learns_to_tell_blurred_from_sharp_and_then_pulls_towards_sharp() -> None:
    adversary = Adversary(AdversarialConfig(weight=1.0, width=8, layers=2, start=0.5, ramp=0.0))
    optimizer = torch.optim.AdamW(adversary.parameters(), lr=3e-3)
    sharpness = torch.tensor(0.1, requires_grad=True)  # a decoder with one weight

    def losses(progress: float) -> AdversarialLosses:
        sharp = (torch.rand(8, 3, 16, 16) > 0.5).float()
        blurred = F.avg_pool2d(sharp, 3, stride=1, padding=1, count_include_pad=False)
        reconstruction = torch.lerp(blurred, sharp, sharpness)
        error = F.mse_loss(reconstruction, sharp)
        return adversary.losses(
            sharp, reconstruction, reconstruction_loss=error, last_layer=sharpness, progress=progress
        )

    for _ in range(30):
        optimizer.zero_grad()
        losses(0.0).total.backward()
        optimizer.step()
    assert sharpness.grad is None
    result = losses(1.0)
    assert float(result.real_accuracy) > 0.95
    assert float(result.fake_accuracy) > 0.95
    (gradient,) = torch.autograd.grad(result.generator, sharpness)
    assert float(gradient) < 0


def test_pictures_of_different_shapes_are_refused() -> None:
    adversary = Adversary(SMALL)
    with pytest.raises(ValueError, match=r"one shape; got \(2, 3, 16, 16\) and \(1, 3, 16, 16\)"):
        adversary.losses(
            torch.rand(2, 3, 16, 16),
            torch.rand(1, 3, 16, 16),
            reconstruction_loss=torch.zeros(()),
            last_layer=torch.zeros(()),
            progress=0.0,
        )


def test_a_weight_of_zero_means_no_adversary() -> None:
    assert not AdversarialConfig().is_on
    assert SMALL.is_on
    with pytest.raises(ValueError, match=r"weight above 0; got 0\.0"):
        Adversary(AdversarialConfig())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight": -0.1}, "at least 0; got -0.1"),
        ({"lecam": float("nan")}, "at least 0; got 0.0, 0.0 and nan"),
        ({"layers": 0}, "must be positive; got 64, 0"),
        ({"learning_rate": 0.0}, "must be positive; got 64, 3 and 0.0"),
        ({"start": 0.7, "ramp": 0.5}, "together at most 1; got 0.7 and 0.5"),
        ({"ramp": -0.5}, "together at most 1; got 0.25 and -0.5"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AdversarialConfig(**values)  # type: ignore[arg-type]
