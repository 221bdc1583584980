"""Pixel losses of the dVAE: L1, L2, a mixture, and the logit-Laplace likelihood (Ramesh et al. 2021, appendix A.3)."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

# B batch, H W image pixels.

PixelLoss = Literal["mixed", "l1", "l2", "logit_laplace"]

# The paper's epsilon: pixels are squeezed from [0, 1] to [0.1, 0.9], away from the ends where the logit has no bound.
LOGIT_LAPLACE_EPSILON = 0.1

# "mixed": squared error finds small objects early, when an absolute error would settle for the median color, the
# background; absolute error keeps edges sharp once squared errors are small.
_MIXED_SQUARED, _MIXED_ABSOLUTE = 4.0, 0.3


def squeeze_pixels(images: Tensor) -> Tensor:
    """Maps [0, 1] to [epsilon, 1 - epsilon]."""
    return (1 - 2 * LOGIT_LAPLACE_EPSILON) * images + LOGIT_LAPLACE_EPSILON


def stretch_pixels(squeezed: Tensor) -> Tensor:
    """The inverse of `squeeze_pixels`."""
    return (squeezed - LOGIT_LAPLACE_EPSILON) / (1 - 2 * LOGIT_LAPLACE_EPSILON)


def out_channels(kind: PixelLoss) -> int:
    """Channels that the decoder must put out: a color, or a location and a log scale per color."""
    return 6 if kind == "logit_laplace" else 3


def to_pixels(output: Tensor, kind: PixelLoss) -> Tensor:
    """The image float32 [B, 3, H, W] that a decoder output [B, 3 or 6, H, W] stands for; in [0, 1] up to its error."""
    if kind == "logit_laplace":
        return stretch_pixels(torch.sigmoid(output[:, :3].float()))
    return output.float()


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


def pixel_loss(output: Tensor, images: Tensor, kind: PixelLoss) -> Tensor:
    """The reconstruction loss, averaged over the batch and all pixel values.

    Args:
        output: the decoder's float [B, 3, H, W], or [B, 6, H, W] for logit_laplace.
        images: float [B, 3, H, W] in [0, 1].
        kind: which loss.
    """
    if kind == "logit_laplace":
        return logit_laplace_nll(output, images)
    if kind == "l1":
        return F.l1_loss(output.float(), images)
    if kind == "l2":
        return F.mse_loss(output.float(), images)
    error = output.float() - images
    return _MIXED_SQUARED * error.square().mean() + _MIXED_ABSOLUTE * error.abs().mean()


def elbo_scale(image_shape: tuple[int, int]) -> float:
    """What brings a divergence summed over the code grid to the scale of `pixel_loss`: one over the pixel values.

    With it the weight of the KL term means the same for every batch size and resolution; the paper's 6.6 over 192 per
    grid position of an f = 8 model is this normalization.
    """
    height, width = image_shape
    return 1.0 / (3 * height * width)


def relaxation_temperature(progress: float, *, final: float = 1 / 16, share: float = 0.05) -> float:
    """The Gumbel tau at `progress` in [0, 1]: a cosine from 1 to `final` over the first `share` of training.

    The paper takes 150,000 of 3,000,000 updates, a twentieth. Short runs need a larger share.
    """
    done = min(1.0, progress / share) if share > 0 else 1.0
    return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2


def kl_weight(progress: float, *, final: float = 6.6, share: float = 1 / 600) -> float:
    """The weight beta of the KL term at `progress`: a cosine from 0 to `final` over the first `share`, then flat."""
    done = min(1.0, progress / share) if share > 0 else 1.0
    return final * (1 - math.cos(math.pi * done)) / 2


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, float [B], for pixels in [0, 1]."""
    error = (reconstruction.float().clamp(0, 1) - images).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error.clamp_min(1e-10))


def ssim(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Structural similarity of each image, float [B] (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5."""
    channels = images.shape[1]
    reach = min(5, (min(images.shape[2:]) - 1) // 2)  # a smaller window where eleven pixels do not fit
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=torch.float32)
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = (window / window.sum()).expand(channels, 1, 1, -1)

    def blurred(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, window, groups=channels), window.mT, groups=channels)

    # a variance is a small difference of large numbers: autocast would make it one of bf16 numbers
    with torch.autocast(images.device.type, enabled=False):
        x, y = reconstruction.float().clamp(0, 1), images.float()
        mean_x, mean_y = blurred(x), blurred(y)
        variance_x = blurred(x * x) - mean_x.square()
        variance_y = blurred(y * y) - mean_y.square()
        covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x.square() + mean_y.square() + c1) * (variance_x + variance_y + c2)
    )
    return similarity.mean(dim=(1, 2, 3))
