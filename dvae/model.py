"""The discrete VAE: a small convolutional autoencoder around a quantizer (Ramesh et al. 2021, section 2.1).

The stem cuts the image into patches at once, so that no convolution runs at full resolution: on a CPU this is what
makes a training step affordable, and the quality lost at patch borders is won back by the last convolution.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvae.paper_network import PaperDecoder, PaperEncoder, check_sizes
from dvae.pixels import Pixels, out_channels, to_pixels
from dvae.quantizers.api import Quantizer
from dvae.quantizers.fsq import FiniteScalarQuantizer, FSQActivation
from dvae.quantizers.gumbel import GumbelQuantizer
from dvae.quantizers.vq import VectorQuantizer, VQConfig
from tessera.config import from_plain
from tessera.data.shards import MAX_CODEBOOK_SIZE
from tessera.errors import UserError
from tessera.model_folder import ModelFolder

# B batch, H W image pixels, h w code grid, C channels, K codebook size, f downsampling factor.

# What a pixel may lie outside of [0, 1]: filters of image libraries overshoot at edges.
_OVERSHOOT = 0.01


@dataclass(frozen=True, kw_only=True)
class DiscreteVAEConfig:
    """Sizes of a `DiscreteVAE`."""

    quantizer: Literal["fsq", "gumbel", "vq"] = "fsq"
    """how latents become codes: fsq (no codebook, cannot collapse), vq (nearest of learned unit vectors) or gumbel (the
    DALL-E paper's relaxation)"""
    levels: tuple[int, ...] = (8, 5, 5, 5)
    """fsq: bins per latent channel; the codebook size is their product"""
    fsq_activation: FSQActivation = "ifsq"
    """fsq: what bounds the latents: ifsq (a sigmoid that fills the bins of normal latents evenly) or tanh"""
    codebook_size: int = 1024
    """all but fsq: number of codes"""
    embedding_dim: int = 8
    """all but fsq: channels of one code's embedding"""
    tied: bool = True
    """gumbel: logits are the cosines of latents and embeddings, so that small models do not collapse; false for the
    paper's encoder, which puts out a logit per code"""
    vq: VQConfig = VQConfig()
    """vq: how its codebook learns"""
    network: Literal["patches", "paper"] = "patches"
    """patches cuts the image into patches at once; paper is the network of the DALL-E paper, at full resolution"""
    patch_size: int = 4
    """side in pixels of the patches that the stem cuts; 1 for the paper's network"""
    widths: tuple[int, ...] = (96, 192)
    """channels per resolution, finest first; each further entry halves the resolution, so f = patch_size * 2^(n-1)"""
    blocks: tuple[int, ...] = (2, 3)
    """residual blocks per resolution, in the encoder and again in the decoder"""
    encoder_kernel_size: Literal[1, 3] = 1
    """side of the encoder's convolutions: 1 makes a code a function of its own f x f pixels, 3 lets it look around;
    the paper's network looks around in any case"""
    pixels: Pixels = "rgb"
    """what the decoder puts out: rgb is a color, logit_laplace a location and a log scale per color (the paper)"""

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.blocks) or not self.widths:
            raise UserError(
                f"dvae widths and blocks need one entry per resolution each; "
                f"got widths={self.widths}, blocks={self.blocks}"
            )
        if self.network == "paper":
            check_sizes(self.widths, self.blocks)
        if self.network == "paper" and self.patch_size != 1:
            raise UserError(f"the paper's network cuts no patches: patch_size must be 1; got {self.patch_size}")
        if self.network == "patches" and self.encoder_kernel_size > 1 and self.patch_size % 2:
            raise UserError(f"overlapping patches need an even patch_size; got {self.patch_size}")
        if not self.levels or min(self.levels) < 2 or not 2 <= self.num_codes <= MAX_CODEBOOK_SIZE:
            raise UserError(
                f"a dvae needs 2 to {MAX_CODEBOOK_SIZE} codes and fsq levels of at least 2; "
                f"got levels={self.levels}, codebook_size={self.codebook_size}"
            )
        if self.quantizer != "fsq" and self.embedding_dim < 2:
            raise UserError(
                f"codes are told apart by their directions: embedding_dim must be at least 2; got {self.embedding_dim}"
            )
        if min(self.widths) < 1 or min(self.blocks) < 0 or self.patch_size < 1:
            raise UserError(
                f"dvae sizes must be positive; "
                f"got patch_size={self.patch_size}, widths={self.widths}, blocks={self.blocks}"
            )

    @property
    def num_codes(self) -> int:
        """K: the product of the levels for fsq, `codebook_size` otherwise."""
        return math.prod(self.levels) if self.quantizer == "fsq" else self.codebook_size

    @property
    def code_digits(self) -> tuple[int, ...]:
        """How many values each digit of a code has, least significant first; empty where codes have no digits."""
        return self.levels if self.quantizer == "fsq" else ()

    @property
    def downsampling(self) -> int:
        """f: side in pixels of the square that one code stands for."""
        return self.patch_size * 2 ** (len(self.widths) - 1)


class ChannelNorm(nn.Module):
    """Layer normalization over the channels of each position (as in ConvNeXt, Liu et al. 2022).

    Statistics over one position only: a code depends on its receptive field, not on the size of the image around it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        # in channels_last memory the permuted view is contiguous: this normalizes without a copy
        return F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), self.weight.to(x.dtype)).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """Two convolutions with pre-normalization; the second starts at zero, so that the block starts as identity.

    Args:
        channels: in and out.
        kernel_size: 3, or 1 for a block that mixes channels only.
    """

    def __init__(self, channels: int, *, kernel_size: int) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.norm1 = ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, kernel_size, padding=padding, padding_mode="replicate")
        self.norm2 = ChannelNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size, padding=padding, padding_mode="replicate")
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


class Encoder(nn.Module):
    """Images [B, 3, H, W] to latents [B, D, H/f, W/f].

    With kernels of 1 a code depends on the f x f pixels that it stands for and on nothing else: the same detail has the
    same code wherever it occurs. An encoder that looks around codes every detail together with its surroundings, which
    the decoder does not need, and the prior has to predict all of that.
    """

    def __init__(self, config: DiscreteVAEConfig, latent_dim: int) -> None:
        super().__init__()
        patch, widths, kernel_size = config.patch_size, config.widths, config.encoder_kernel_size
        overlap = patch // 2 if kernel_size > 1 else 0
        self.stem = nn.Conv2d(
            3, widths[0], patch + 2 * overlap, stride=patch, padding=overlap, padding_mode="replicate"
        )
        layers: list[nn.Module] = []
        for level, (width, count) in enumerate(zip(widths, config.blocks, strict=True)):
            if level > 0:
                layers.append(nn.Conv2d(widths[level - 1], width, 2, stride=2))
            layers.extend(ResidualBlock(width, kernel_size=kernel_size) for _ in range(count))
        self.layers = nn.Sequential(*layers)
        self.norm = ChannelNorm(widths[-1])
        self.latent_head = nn.Conv2d(widths[-1], latent_dim, 1)
        # unit latents at the start: they fill the bins of fsq and spread the logits of gumbel
        nn.init.normal_(self.latent_head.weight, std=widths[-1] ** -0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.latent_head(self.norm(self.layers(self.stem(2 * images - 1))))


class Decoder(nn.Module):
    """Embeddings [B, C, h, w] to pixels [B, out_channels, H, W], unbounded."""

    def __init__(self, config: DiscreteVAEConfig, embedding_dim: int, out_channels: int) -> None:
        super().__init__()
        patch, widths = config.patch_size, config.widths
        self.stem = nn.Conv2d(embedding_dim, widths[-1], 1)
        layers: list[nn.Module] = []
        for level in reversed(range(len(widths))):
            layers.extend(ResidualBlock(widths[level], kernel_size=3) for _ in range(config.blocks[level]))
            if level > 0:
                layers.extend([nn.Conv2d(widths[level], 4 * widths[level - 1], 1), nn.PixelShuffle(2)])
        self.layers = nn.Sequential(*layers)
        self.norm = ChannelNorm(widths[0])
        self.pixel_head = nn.Conv2d(widths[0], out_channels * patch * patch, 3, padding=1)
        self.shuffle = nn.PixelShuffle(patch)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.shuffle(self.pixel_head(F.silu(self.norm(self.layers(self.stem(embedding))))))


class Reconstruction(NamedTuple):
    """What a training pass returns.

    Attributes:
        output: float32 [B, 3 or 6, H, W], what the decoder put out; `pixels.to_pixels` turns it into an image.
        codes: int64 [B, h, w].
        terms: the quantizer's own losses by name, float32 scalars before their weights.
    """

    output: Tensor
    codes: Tensor
    terms: dict[str, Tensor]


class DiscreteVAE(nn.Module):
    """Encodes images into a grid of codes and decodes codes into images.

    Args:
        config: sizes; see `DiscreteVAEConfig`.

    Example:
        >>> vae = DiscreteVAE(DiscreteVAEConfig(widths=(16, 32), blocks=(1, 1)))
        >>> vae.encode(torch.rand(2, 3, 64, 48)).shape
        torch.Size([2, 8, 6])
    """

    def __init__(self, config: DiscreteVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.quantizer: Quantizer = _quantizer(config)
        channels = out_channels(config.pixels)
        self.encoder: nn.Module
        self.decoder: nn.Module
        if config.network == "paper":
            self.encoder = PaperEncoder(
                widths=config.widths, blocks=config.blocks, codebook_size=self.quantizer.latent_dim
            )
            self.decoder = PaperDecoder(
                widths=config.widths,
                blocks=config.blocks,
                embedding_dim=self.quantizer.embedding_dim,
                out_channels=channels,
            )
        else:
            self.encoder = Encoder(config, self.quantizer.latent_dim)
            self.decoder = Decoder(config, self.quantizer.embedding_dim, channels)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def codebook_size(self) -> int:
        """K, the number of codes."""
        return self.quantizer.codebook_size

    @property
    def downsampling(self) -> int:
        """f, pixels per code along each side."""
        return self.config.downsampling

    @property
    def last_layer(self) -> Tensor:
        """The weight of the decoder's last convolution, through which every loss on pixels reaches the rest."""
        return self.decoder.pixel_head.weight  # type: ignore[union-attr, return-value]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The code grid (h, w) of an image of height x width pixels.

        Raises:
            ValueError: if a side is not a positive multiple of f.
        """
        f = self.downsampling
        if height <= 0 or width <= 0 or height % f or width % f:
            raise ValueError(f"image sides must be positive multiples of {f} pixels; got {height}x{width}")
        return height // f, width // f

    def forward(self, images: Tensor, *, temperature: float = 1.0) -> Reconstruction:
        """One training pass over images float [B, 3, H, W] in [0, 1]; `temperature` is the Gumbel tau.

        Raises:
            ValueError: as `encode`; values are looked at on CPUs only.
        """
        self._check_shape(images)
        if images.device.type == "cpu":  # elsewhere looking at values makes every step wait
            self._check_values(images)
        latents = self.encoder(images.contiguous(memory_format=torch.channels_last))
        quantized = self.quantizer(latents, temperature=temperature)
        return Reconstruction(self.decoder(quantized.embedding).float(), quantized.codes, quantized.terms)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The codes int64 [B, H/f, W/f] of images float [B, 3, H, W] in [0, 1].

        Raises:
            ValueError: if the shape is not [B, 3, H, W] with sides divisible by f, the type is not floating, or values
                are not finite or lie outside [0, 1].
        """
        self._check_shape(images)
        self._check_values(images)
        latents = self.encoder(images.contiguous(memory_format=torch.channels_last))
        return self.quantizer.codes(latents)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The images float32 [B, 3, h*f, w*f] in [0, 1] of codes int64 [B, h, w].

        Raises:
            ValueError: if codes are not integers [B, h, w] or lie outside [0, K).
        """
        if codes.dim() != 3 or codes.is_floating_point():
            raise ValueError(
                f"codes must be integers of shape [batch, rows, columns]; got {codes.dtype} {tuple(codes.shape)}"
            )
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.codebook_size):
            raise ValueError(
                f"codes must lie in [0, {self.codebook_size}), the size of this codebook; "
                f"got {int(codes.min())} to {int(codes.max())}"
            )
        embedding = self.quantizer.lookup(codes.long()).contiguous(memory_format=torch.channels_last)
        return to_pixels(self.decoder(embedding), self.config.pixels).clamp(0, 1)

    def _check_shape(self, images: Tensor) -> None:
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape [batch, 3, height, width]; got {tuple(images.shape)}")
        self.grid(images.shape[2], images.shape[3])
        if not images.is_floating_point():
            raise ValueError(
                f"images must be floating-point numbers in [0, 1]; got {images.dtype}: "
                "for uint8 [batch, height, width, 3] there is dvae.pixels.to_float"
            )

    @staticmethod
    def _check_values(images: Tensor) -> None:
        if images.numel() and not images.is_meta and not torch.compiler.is_compiling():
            lowest, highest = (float(value) for value in torch.aminmax(images.detach()))
            # written so that NaN, which compares false with everything, fails too; resizing may overshoot a little
            if not (lowest >= -_OVERSHOOT and highest <= 1 + _OVERSHOOT):
                raise ValueError(f"images must hold finite numbers in [0, 1]; got {lowest:g} to {highest:g}")


def _quantizer(config: DiscreteVAEConfig) -> FiniteScalarQuantizer | GumbelQuantizer | VectorQuantizer:
    if config.quantizer == "fsq":
        return FiniteScalarQuantizer(config.levels, activation=config.fsq_activation)
    if config.quantizer == "vq":
        return VectorQuantizer(config.codebook_size, config.embedding_dim, config.vq)
    # the paper's codebook is a convolution over one-hot codes, with a fan-in of K
    init_std = config.codebook_size**-0.5 if config.network == "paper" else 1.0
    return GumbelQuantizer(config.codebook_size, config.embedding_dim, tied=config.tied, init_std=init_std)


def load(folder: ModelFolder, *, device: torch.device | str = "cpu") -> DiscreteVAE:
    """The frozen dVAE of a model folder, in evaluation mode.

    Raises:
        UserError: if the folder has no dVAE.
    """
    if not folder.has("dvae"):
        raise UserError(f"{folder.path} has no dvae part: train one with `tessera train-dvae` or `tessera fit`")
    config = from_plain(DiscreteVAEConfig, folder.config("dvae"), source=f"{folder.path}/dvae/config.yaml")
    vae = DiscreteVAE(config)
    vae.load_state_dict(folder.tensors("dvae"))
    return vae.eval().requires_grad_(False).to(device)
