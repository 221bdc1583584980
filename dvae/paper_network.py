"""The dVAE network of the DALL-E paper (Ramesh et al. 2021, arXiv 2102.12092, appendix A.1).

Residual networks at full resolution without normalization: what keeps activations in range is the initialization, the
small gain of every residual path, and pixels that are squeezed away from 0 and 1. The decoder of the paper begins with
a 1x1 convolution over one-hot codes, whose weight is the codebook. Here the quantizer holds it, and the decoder begins
with that convolution's bias.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvae.pixels import squeeze_pixels
from tessera.errors import UserError

# B batch, H W image pixels, h w code grid, C channels, K codebook size, f downsampling factor.

_STEM_KERNEL_SIZE = 7
_ENCODER_KERNEL_SIZES = (3, 3, 3, 1)
_DECODER_KERNEL_SIZES = (1, 3, 3, 3)
_BOTTLENECK = 4  # width of a block over that of its inner convolutions


class BottleneckBlock(nn.Module):
    """Four convolutions, each after a ReLU, whose sum is added to the input with a small gain.

    Args:
        in_channels: where they differ from `out_channels`, a 1x1 convolution takes the place of the identity.
        out_channels: a multiple of 4; the inner convolutions have a quarter as many.
        kernel_sizes: sides of the four convolutions, odd.
        gain: factor of the residual path.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel_sizes: tuple[int, int, int, int], gain: float
    ) -> None:
        super().__init__()
        self.gain = gain
        inner = out_channels // _BOTTLENECK
        first, second, third, fourth = kernel_sizes
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        self.conv1 = nn.Conv2d(in_channels, inner, first, padding=first // 2)
        self.conv2 = nn.Conv2d(inner, inner, second, padding=second // 2)
        self.conv3 = nn.Conv2d(inner, inner, third, padding=third // 2)
        self.conv4 = nn.Conv2d(inner, out_channels, fourth, padding=fourth // 2)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        y = self.conv1(F.relu(x))
        y = self.conv2(F.relu(y))
        y = self.conv3(F.relu(y))
        # a 64th of a step is lost in the eight digits of bf16: under autocast the sum stays in fp32
        return self.skip(x).float() + self.gain * self.conv4(F.relu(y)).float()


class PaperEncoder(nn.Module):
    """Images [B, 3, H, W] in [0, 1] to logits [B, K, H/f, W/f].

    Args:
        widths: channels per resolution, finest first, multiples of 4; f = 2^(len(widths) - 1).
        blocks: residual blocks per resolution, at least 1 each.
        codebook_size: K.

    Raises:
        UserError: if widths and blocks do not fit.
    """

    def __init__(self, *, widths: tuple[int, ...], blocks: tuple[int, ...], codebook_size: int) -> None:
        super().__init__()
        check_sizes(widths, blocks)
        self.stem = nn.Conv2d(3, widths[0], _STEM_KERNEL_SIZE, padding=_STEM_KERNEL_SIZE // 2)
        self.groups = _groups(widths[0], widths, blocks, kernel_sizes=_ENCODER_KERNEL_SIZES)
        self.vocabulary_head = nn.Conv2d(widths[-1], codebook_size, 1)
        init_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(squeeze_pixels(images))  # [B, widths[0], H, W]
        for level, group in enumerate(self.groups):
            x = group(F.max_pool2d(x, 2) if level > 0 else x)
        # bf16 has too few digits to order the logits of thousands of codes
        with torch.autocast(x.device.type, enabled=False):
            return self.vocabulary_head(F.relu(x).float())


class PaperDecoder(nn.Module):
    """Embeddings [B, C, h, w] to what pixels are made of, [B, out_channels, H, W], unbounded.

    Args:
        widths: channels per resolution, finest first as for the encoder, multiples of 4.
        blocks: residual blocks per resolution, at least 1 each.
        embedding_dim: C.
        out_channels: 6 for the paper's likelihood, a location and a log scale per color.

    Raises:
        UserError: if widths and blocks do not fit.
    """

    def __init__(
        self, *, widths: tuple[int, ...], blocks: tuple[int, ...], embedding_dim: int, out_channels: int
    ) -> None:
        super().__init__()
        check_sizes(widths, blocks)
        self.codebook_bias = nn.Parameter(torch.empty(embedding_dim))
        self.groups = _groups(embedding_dim, widths[::-1], blocks[::-1], kernel_sizes=_DECODER_KERNEL_SIZES)
        self.pixel_head = nn.Conv2d(widths[0], out_channels, 1)
        init_weights(self)

    def forward(self, embedding: Tensor) -> Tensor:
        x = embedding + self.codebook_bias[:, None, None]
        for level, group in enumerate(self.groups):
            x = group(F.interpolate(x, scale_factor=2.0, mode="nearest") if level > 0 else x)
        return self.pixel_head(F.relu(x))


def check_sizes(widths: tuple[int, ...], blocks: tuple[int, ...]) -> None:
    """Raises UserError unless every resolution has a width divisible by 4 and at least one block."""
    if not widths or len(widths) != len(blocks) or any(width < 1 or width % _BOTTLENECK for width in widths):
        raise UserError(
            f"the paper's network needs one width, a multiple of {_BOTTLENECK}, and one number of blocks per "
            f"resolution; got widths={widths}, blocks={blocks}"
        )
    if min(blocks) < 1:
        raise UserError(f"the paper's network needs at least one block per resolution; got blocks={blocks}")


def init_weights(module: nn.Module) -> None:
    """Draws the weights of a `PaperEncoder` or `PaperDecoder`.

    | what                       | distribution                              |
    |----------------------------|-------------------------------------------|
    | weights of convolutions    | normal, standard deviation 1/sqrt(fan in) |
    | biases, the codebook's too | 0                                         |

    The codebook's own fan in is K: a quantizer that holds it for this decoder draws it with deviation 1/sqrt(K).
    """
    for name, parameter in module.named_parameters():
        if name.endswith("weight"):
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.zeros_(parameter)


def _groups(
    in_channels: int, widths: tuple[int, ...], blocks: tuple[int, ...], *, kernel_sizes: tuple[int, int, int, int]
) -> nn.ModuleList:
    """One sequence of blocks per resolution, in the order in which the data meets them."""
    gain = 1 / sum(blocks) ** 2
    groups = nn.ModuleList()
    for width, count in zip(widths, blocks, strict=True):
        layers = []
        for _ in range(count):
            layers.append(BottleneckBlock(in_channels, width, kernel_sizes=kernel_sizes, gain=gain))
            in_channels = width
        groups.append(nn.Sequential(*layers))
    return groups
