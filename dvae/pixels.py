"""Pixels: as files and memory hold them, as networks take them, and as decoders put them out."""

from typing import Literal

import torch
from torch import Tensor

# B batch, H W image pixels.

Pixels = Literal["rgb", "logit_laplace"]

# The epsilon of the DALL-E paper: pixels are squeezed from [0, 1] to [0.1, 0.9], away from the ends where the logit has
# no bound.
LOGIT_LAPLACE_EPSILON = 0.1


def to_float(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [0, 1].

    Raises:
        ValueError: for another type or shape.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
        raise ValueError(f"expected uint8 images [batch, height, width, 3]; got {images.dtype} {list(images.shape)}")
    return images.permute(0, 3, 1, 2).float().div(255)


def to_uint8(images: Tensor) -> Tensor:
    """float [B, 3, H, W] in [0, 1] to uint8 [B, H, W, 3], rounded.

    Raises:
        ValueError: for another type or shape.
    """
    if not images.is_floating_point() or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(
            f"expected floating-point images [batch, 3, height, width]; got {images.dtype} {list(images.shape)}"
        )
    return (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)


def squeeze_pixels(images: Tensor) -> Tensor:
    """Maps [0, 1] to [epsilon, 1 - epsilon]."""
    return (1 - 2 * LOGIT_LAPLACE_EPSILON) * images + LOGIT_LAPLACE_EPSILON


def stretch_pixels(squeezed: Tensor) -> Tensor:
    """The inverse of `squeeze_pixels`."""
    return (squeezed - LOGIT_LAPLACE_EPSILON) / (1 - 2 * LOGIT_LAPLACE_EPSILON)


def out_channels(pixels: Pixels) -> int:
    """Channels that the decoder must put out: a color, or a location and a log scale per color."""
    return 6 if pixels == "logit_laplace" else 3


def to_pixels(output: Tensor, pixels: Pixels) -> Tensor:
    """The image float32 [B, 3, H, W] that a decoder output [B, 3 or 6, H, W] stands for; in [0, 1] up to its error."""
    if pixels == "logit_laplace":
        return stretch_pixels(torch.sigmoid(output[:, :3].float()))
    return output.float()
