"""How alike two pictures are: PSNR, SSIM (Wang et al. 2004) and multi-scale SSIM (Wang et al. 2003), also as losses.

All work in fp32, whatever autocast says. Pixels beyond [0, 1] count as lying at its ends, as they do in a picture file,
and get no gradient: bringing them back is the work of the pixel loss.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# B batch, C channels, H W image pixels.

# The Gaussian window of both papers: eleven pixels wide, sigma 1.5.
_WINDOW_REACH = 5
_WINDOW_SIGMA = 1.5
# K1 and K2 of the papers, squared, for pixels in [0, 1]
_C1, _C2 = 0.01**2, 0.03**2

# Wang et al. 2003, section 3.2: how much each scale counts, finest first; they sum to one.
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# Below it a power with such an exponent is too steep to train on, and below zero it does not exist.
_SMALLEST_FACTOR = 1e-3


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, float [B], for pixels in [0, 1]; at most 100."""
    error = (reconstruction.float().clamp(0, 1) - images).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error.clamp_min(1e-10))


def ssim(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Structural similarity of each image, float [B] (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5."""
    # a variance is a small difference of large numbers: autocast would make it one of bf16 numbers
    with torch.autocast(images.device.type, enabled=False):
        return _compared(reconstruction.float().clamp(0, 1), images.float()).similarity


def num_scales(height: int, width: int) -> int:
    """How many of the five scales fit a picture: as many as leave eleven pixels, one window, along each side.

    Below 22 pixels that is one, from 176 pixels on all five.
    """
    side, scales = min(height, width), 1
    while scales < len(SCALE_WEIGHTS) and side // 2**scales >= 2 * _WINDOW_REACH + 1:
        scales += 1
    return scales


def ms_ssim(reconstruction: Tensor, images: Tensor, *, scales: int | None = None) -> Tensor:
    """Multi-scale structural similarity of each image (Wang et al. 2003).

    Each scale halves the picture. Contrast and structure are compared at all of them, luminance at the coarsest only,
    and the product weighs each by its exponent; where fewer than five scales are used, the exponents of these are
    divided by their sum. A factor below 0.001, negative ones among them, counts as 0.001 and gets no gradient.

    Args:
        reconstruction: float [B, C, H, W].
        images: float [B, C, H, W] in [0, 1].
        scales: how many scales, finest first; None for as many as fit (see `num_scales`).

    Returns:
        float32 [B] in [0.001, 1]; 1 for equal pictures.

    Raises:
        ValueError: if so many scales do not fit.
    """
    fitting = num_scales(images.shape[2], images.shape[3])
    chosen = fitting if scales is None else scales
    if not 1 <= chosen <= fitting:
        raise ValueError(
            f"a picture of {images.shape[2]}x{images.shape[3]} pixels has 1 to {fitting} scales; got {scales}"
        )
    exponents = [weight / sum(SCALE_WEIGHTS[:chosen]) for weight in SCALE_WEIGHTS[:chosen]]
    with torch.autocast(images.device.type, enabled=False):
        x, y = reconstruction.float().clamp(0, 1), images.float()
        product = torch.ones(len(images), device=images.device)
        for exponent in exponents[:-1]:
            product = product * _power(_compared(x, y).structure, exponent)
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return product * _power(_compared(x, y).similarity, exponents[-1])


class _Compared(NamedTuple):
    """Averages over the windows of each image, float [B]: `similarity` is `structure` with luminance in it."""

    similarity: Tensor
    structure: Tensor


def _compared(x: Tensor, y: Tensor) -> _Compared:
    channels = x.shape[1]
    reach = min(_WINDOW_REACH, (min(x.shape[2:]) - 1) // 2)  # a smaller window where eleven pixels do not fit
    offsets = torch.arange(-reach, reach + 1, device=x.device, dtype=torch.float32)
    window = torch.exp(-offsets.square() / (2 * _WINDOW_SIGMA**2))
    window = (window / window.sum()).expand(channels, 1, 1, -1)

    def blurred(z: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(z, window, groups=channels), window.mT, groups=channels)

    mean_x, mean_y = blurred(x), blurred(y)
    variance_x = blurred(x * x) - mean_x.square()
    variance_y = blurred(y * y) - mean_y.square()
    covariance = blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x.square() + mean_y.square() + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return _Compared((luminance * structure).mean(dim=(1, 2, 3)), structure.mean(dim=(1, 2, 3)))


def _power(factor: Tensor, exponent: float) -> Tensor:
    return factor.clamp_min(_SMALLEST_FACTOR).pow(exponent)
