"""The loss of the dVAE: a weighted sum of named terms, each logged by its name.

Pixel terms are here, among them the logit-Laplace likelihood (Ramesh et al. 2021, appendix A.3); structural similarity,
LPIPS and the adversarial terms have files of their own, and quantizers bring theirs along.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dvae.lpips import Lpips
from dvae.pixels import Pixels, squeeze_pixels, to_pixels
from dvae.similarity import ms_ssim, ssim
from tessera.errors import UserError

# B batch, H W image pixels.


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the loss terms; 0 switches a term off, and a reconstruction term that is off is not computed."""

    l1: float = 0.3
    """mean absolute error: keeps edges sharp once errors are small"""
    l2: float = 4.0
    """mean squared error: finds small objects early, when an absolute error would settle for the background color"""
    logit_laplace: float = 0.0
    """the paper's negative log-likelihood, in nats per pixel value; needs model.pixels=logit_laplace"""
    ssim: float = 0.0
    """one minus the structural similarity"""
    ms_ssim: float = 0.0
    """one minus the multi-scale structural similarity"""
    lpips: float = 0.0
    """perceptual distance; needs lpips_backbone and lpips_heads"""
    lpips_backbone: str | None = None
    """file with torchvision's VGG16 weights"""
    lpips_heads: str | None = None
    """file with the LPIPS heads for VGG16"""
    kl: float = 1.0
    """gumbel: KL to the uniform prior after its ramp, divided by the number of pixel values; the paper's beta is 6.6"""
    commitment: float = 0.25
    """vq: pulls latents to their codes"""
    codebook: float = 1.0
    """vq with update=gradient: pulls codes to their latents"""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float | int) and not (math.isfinite(value) and value >= 0):
                raise UserError(f"loss.{field.name} must be a finite weight of at least 0; got {value}")
        if not any((self.l1, self.l2, self.logit_laplace, self.ssim, self.ms_ssim, self.lpips)):
            raise UserError(
                "a dvae needs a reconstruction loss: one of loss.l1, l2, logit_laplace, ssim, ms_ssim, lpips"
            )
        if self.lpips and not (self.lpips_backbone and self.lpips_heads):
            raise UserError(
                "loss.lpips needs two local files: loss.lpips_backbone (torchvision's vgg16-397923af.pth) and "
                "loss.lpips_heads (vgg.pth of the lpips package); nothing is downloaded"
            )

    def check(self, pixels: Pixels) -> None:
        """Raises UserError where the terms do not fit what the decoder puts out."""
        if self.logit_laplace and pixels != "logit_laplace":
            raise UserError("loss.logit_laplace needs a decoder with model.pixels=logit_laplace; got rgb")
        if pixels == "logit_laplace" and not self.logit_laplace:
            raise UserError("model.pixels=logit_laplace learns its scales from loss.logit_laplace, which is 0")


def logit_laplace_nll(output: Tensor, images: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats per pixel value.

    The density of x in (0, 1) is exp(-|logit(x) - mu| / b) / (2 b x (1 - x)).

    Args:
        output: float [B, 6, H, W]; three channels of mu, then three of ln b.
        images: float [B, 3, H, W] in [0, 1].
    """
    location, log_scale = output.float().chunk(2, dim=1)
    x = squeeze_pixels(images)
    distance = (torch.logit(x) - location).abs()
    return (distance * torch.exp(-log_scale) + log_scale + math.log(2) + torch.log(x * (1 - x))).mean()


def reconstruction_terms(
    output: Tensor, images: Tensor, *, pixels: Pixels, config: LossConfig, lpips: Lpips | None = None
) -> dict[str, Tensor]:
    """The reconstruction losses that have a weight: float32 scalars before their weights, means over the batch.

    Args:
        output: the decoder's float [B, 3 or 6, H, W].
        images: float [B, 3, H, W] in [0, 1].
        pixels: what the output means.
        config: terms of weight 0 are left out.
        lpips: the perceptual distance, where it has a weight.
    """
    terms: dict[str, Tensor] = {}
    if config.logit_laplace:
        terms["logit_laplace"] = logit_laplace_nll(output, images)
    reconstruction = to_pixels(output, pixels)
    if config.l1:
        terms["l1"] = F.l1_loss(reconstruction, images)
    if config.l2:
        terms["l2"] = F.mse_loss(reconstruction, images)
    if config.ssim:
        terms["ssim"] = 1 - ssim(reconstruction, images).mean()
    if config.ms_ssim:
        terms["ms_ssim"] = 1 - ms_ssim(reconstruction, images).mean()
    if config.lpips:
        assert lpips is not None
        terms["lpips"] = lpips(reconstruction, images).mean()
    return terms


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, Any]) -> Tensor:
    """The sum of terms, each times the weight that stands under its name."""
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


def elbo_scale(image_shape: tuple[int, int]) -> float:
    """What brings a divergence summed over the code grid to the scale of a mean over pixel values: 1 / their number.

    With it the weight of the KL term means the same for every batch size and resolution; the paper's 6.6 over 192 per
    grid position of an f = 8 model is this normalization.
    """
    height, width = image_shape
    return 1.0 / (3 * height * width)
