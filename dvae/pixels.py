"""Pixels as files and memory hold them, and as networks take them."""

from torch import Tensor

# B batch, H W image pixels.


def to_float(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [0, 1]."""
    return images.permute(0, 3, 1, 2).float().div(255)


def to_uint8(images: Tensor) -> Tensor:
    """float [B, 3, H, W] in [0, 1] to uint8 [B, H, W, 3], rounded."""
    return (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
