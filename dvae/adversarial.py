"""The adversarial loss of VQGAN (Esser et al. 2021, section 3.1) with LeCam regularization (Tseng et al. 2021).

A patch discriminator learns to tell reconstructions from images, and the decoder learns to mislead it: that is what
makes textures sharp where a pixel loss averages. Nothing is downloaded; the discriminator starts from nothing.

It trains from the first step, but its gradient reaches the decoder only later and little by little: switched on at
once, a discriminator that knows nothing yet, or one that knows far too much, ruins reconstructions that were good.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from dvae.model import ChannelNorm
from tessera.errors import UserError

# B batch, H W image pixels, C channels, h w grid of patches.

_LEAK = 0.2
_WIDEST = 8  # channels of a layer as a multiple of the first one's (Isola et al. 2017, section 6.1.2)
# Where the discriminator's gradient has died away, the ratio of norms alone would blow up what is left of it.
_LARGEST_ADAPTIVE_WEIGHT = 100.0
# Decay of LeCam's averages: a hundred steps, so that they also follow in runs of a few thousand.
_LECAM_DECAY = 0.99


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """Weights, schedule and size of an `Adversary`."""

    weight: float = 0.0
    """weight of the adversarial term; 0 switches off everything else here too"""
    feature_matching: float = 0.0
    """weight of the distance between reconstruction and image in the discriminator's own activations"""
    lecam: float = 0.05
    """weight of LeCam regularization, which keeps a discriminator that has seen few images from running away"""
    width: int = 64
    """channels of the discriminator's first layer"""
    layers: int = 3
    """layers of the discriminator that halve the resolution; 3 make patches of 54 x 54 pixels"""
    learning_rate: float = 2e-4
    """peak learning rate of the discriminator, in an AdamW group of its own"""
    start: float = 0.25
    """share of training, 0 to 1, before the discriminator's gradient reaches the decoder; it trains itself meanwhile"""
    ramp: float = 0.25
    """share of training, 0 to 1, over which that gradient rises to its full weight"""
    adaptive: bool = True
    """scale the adversarial term: its gradient at the decoder's last layer becomes as large as the reconstruction's"""

    def __post_init__(self) -> None:
        weights = (self.weight, self.feature_matching, self.lecam)
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise UserError(
                f"adversarial weight, feature_matching and lecam must be finite and at least 0; "
                f"got {self.weight}, {self.feature_matching} and {self.lecam}"
            )
        if self.feature_matching and not self.weight:
            raise UserError("adversarial.feature_matching needs a discriminator: set adversarial.weight above 0")
        if self.width < 1 or self.layers < 1 or self.learning_rate <= 0:
            raise UserError(
                f"adversarial width, layers and learning_rate must be positive; "
                f"got {self.width}, {self.layers} and {self.learning_rate}"
            )
        if self.start < 0 or self.ramp < 0 or self.start + self.ramp > 1:
            raise UserError(
                f"adversarial start and ramp are shares of training, together at most 1; "
                f"got {self.start} and {self.ramp}"
            )

    @property
    def is_on(self) -> bool:
        """Whether there is an adversary at all."""
        return self.weight > 0


class Verdict(NamedTuple):
    """What a discriminator thinks of images.

    Attributes:
        logits: float [B, 1, h, w], one per patch; positive where it takes the patch for real.
        features: the activations of each layer, finest first.
    """

    logits: Tensor
    features: tuple[Tensor, ...]


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of an image, each by itself (PatchGAN, Isola et al. 2017, section 3.2.2).

    Channels are normalized at each position: no image depends on its batch-mates, as with batch normalization, and no
    patch on what lies outside it, as with group normalization. Spectral normalization would carry a state that changes
    at every pass, so that the decoder and the discriminator would be judged by different functions in one step; and it
    leaves the activations without a scale, which feature matching needs.

    Args:
        width: channels of the first layer.
        layers: how many layers halve the resolution; images need sides of at least 2^layers pixels.
    """

    def __init__(self, *, width: int, layers: int) -> None:
        super().__init__()
        self.smallest_side = 2**layers
        self.stem = nn.Conv2d(3, width, 4, stride=2, padding=1)
        widths = [width * min(2**level, _WIDEST) for level in range(layers)]
        blocks = [
            nn.Sequential(nn.Conv2d(before, after, 4, stride=2, padding=1), ChannelNorm(after))
            for before, after in zip(widths, widths[1:], strict=False)
        ]
        blocks.append(nn.Sequential(nn.Conv2d(widths[-1], widths[-1], 3, padding=1), ChannelNorm(widths[-1])))
        self.blocks = nn.ModuleList(blocks)
        self.logit_head = nn.Conv2d(widths[-1], 1, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Verdict:
        """Judges images float [B, 3, H, W] in [0, 1].

        Raises:
            ValueError: if the shape is not [B, 3, H, W], or the sides are too small for the layers.
        """
        if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[2:]) < self.smallest_side:
            raise ValueError(
                f"the discriminator needs images [batch, 3, height, width] with sides of at least "
                f"{self.smallest_side} pixels; got {tuple(images.shape)}"
            )
        x = F.leaky_relu(self.stem((2 * images - 1).contiguous(memory_format=torch.channels_last)), _LEAK)
        features = [x]  # [B, width, H/2, W/2]
        for block in self.blocks:
            x = F.leaky_relu(block(x), _LEAK)
            features.append(x)  # [B, C, h, w]
        return Verdict(self.logit_head(x), tuple(features))


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The hinge loss of a discriminator (Lim and Ye 2017): real patches above 1, fake ones below -1; scalar."""
    return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """The loss of what made the fakes: their mean logit, negated; scalar."""
    return -fake_logits.mean()


def feature_matching_loss(fake_features: Sequence[Tensor], real_features: Sequence[Tensor]) -> Tensor:
    """Mean absolute distance of activations, averaged over layers (Salimans et al. 2016; Wang et al. 2018, pix2pixHD).

    The real features, which are the target, get no gradient.

    Raises:
        ValueError: if the numbers of layers differ.
    """
    if len(fake_features) != len(real_features) or not fake_features:
        raise ValueError(
            f"feature matching needs the same layers of both; got {len(fake_features)} and {len(real_features)}"
        )
    distances = [
        F.l1_loss(fake.float(), real.detach().float()) for fake, real in zip(fake_features, real_features, strict=True)
    ]
    return torch.stack(distances).mean()


class LeCam(nn.Module):
    """Regularization of a discriminator on little data (Tseng et al. 2021, equation 5), rectified as in its code.

    Real logits are pulled down towards the running mean of fake ones, and fake logits up towards that of real ones.

    Args:
        decay: of the running means, which start at zero: no opinion.
    """

    def __init__(self, *, decay: float = _LECAM_DECAY) -> None:
        super().__init__()
        self.decay = decay
        self.real_mean: Tensor
        self.fake_mean: Tensor
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """The penalty, a scalar, measured against the means so far; in training mode these then take in the logits."""
        above = F.relu(real_logits - self.fake_mean).square().mean()
        below = F.relu(self.real_mean - fake_logits).square().mean()
        if self.training:
            self._update(self.real_mean, real_logits)
            self._update(self.fake_mean, fake_logits)
        return above + below

    @torch.no_grad()
    def _update(self, average: Tensor, logits: Tensor) -> None:
        mean = logits.mean().to(average.dtype)
        # a step that is skipped for a value that is not finite must leave no trace here
        average.lerp_(torch.where(mean.isfinite(), mean, average), 1 - self.decay)


def adaptive_weight(
    reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor, *, most: float
) -> Tensor:
    """How much larger the reconstruction's gradient is than the adversary's (Esser et al. 2021, equation 7).

    Both graphs remain for the backward pass.

    Args:
        reconstruction_loss: scalar.
        adversarial_loss: scalar.
        last_layer: the decoder's last weight, through which both losses' gradients flow.
        most: the largest weight that is returned.

    Returns:
        The ratio of the gradients' norms at `last_layer`, a scalar in [0, most] without a gradient.
    """
    # a backward pass belongs outside autocast, which would otherwise reach its matrix products
    with torch.autocast(last_layer.device.type, enabled=False):
        (reconstruction_gradient,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
        (adversarial_gradient,) = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)
    smallest = torch.finfo(adversarial_gradient.dtype).tiny
    return (reconstruction_gradient.norm() / adversarial_gradient.norm().clamp_min(smallest)).clamp(0, most)


def ramp_weight(progress: float, *, start: float, length: float) -> float:
    """The factor at `progress` in [0, 1] of training: 0 up to `start`, then linearly to 1 over `length`, then 1."""
    if length <= 0:
        return float(progress >= start)
    return min(1.0, max(0.0, (progress - start) / length))


class AdversarialLosses(NamedTuple):
    """Terms of one training step, float32 scalars that carry their weights: they are there to be added up.

    Attributes:
        generator: reaches the decoder only; ramped in and adaptively weighted. 0 before the start.
        feature_matching: reaches the decoder only; ramped in. 0 before the start.
        discriminator: reaches the discriminator only; the hinge loss.
        lecam: reaches the discriminator only.
        adaptive_weight: the ratio of gradient norms that is part of `generator`; 0 before the start. No gradient.
        real_accuracy: share of the images' patches that are taken for real, in [0, 1]. No gradient.
        fake_accuracy: share of the reconstructions' patches that are taken for fake, in [0, 1]. No gradient.
    """

    generator: Tensor
    feature_matching: Tensor
    discriminator: Tensor
    lecam: Tensor
    adaptive_weight: Tensor
    real_accuracy: Tensor
    fake_accuracy: Tensor

    @property
    def total(self) -> Tensor:
        """What is added to the reconstruction loss before the one backward pass of a step."""
        return self.generator + self.feature_matching + self.discriminator + self.lecam


class Adversary(nn.Module):
    """A discriminator and all that a training step takes from it.

    Decoder and discriminator want opposite things of the same logits, and one backward pass serves both: the terms for
    the decoder see the discriminator's weights as constants, the terms for the discriminator see the reconstruction as
    one.

    Args:
        config: weights, schedule and size; its weight must be positive.

    Raises:
        ValueError: if the config's weight is 0, which means that there shall be no adversary.
    """

    def __init__(self, config: AdversarialConfig) -> None:
        super().__init__()
        if not config.is_on:
            raise ValueError(f"an adversary needs a weight above 0; got {config.weight}")
        self.config = config
        self.discriminator = PatchDiscriminator(width=config.width, layers=config.layers)
        self.lecam = LeCam()

    def losses(
        self,
        images: Tensor,
        reconstruction: Tensor,
        *,
        reconstruction_loss: Tensor,
        last_layer: Tensor,
        progress: float,
    ) -> AdversarialLosses:
        """The terms of one training step; until the ramp begins, the decoder's cost no time.

        Args:
            images: float [B, 3, H, W] in [0, 1].
            reconstruction: float [B, 3, H, W], with the decoder's graph.
            reconstruction_loss: scalar with the same graph, what the adversarial gradient is measured against.
            last_layer: the decoder's last weight.
            progress: done share of training in [0, 1].

        Raises:
            ValueError: if images and reconstruction differ in shape.
        """
        if images.shape != reconstruction.shape:
            raise ValueError(
                f"images and reconstruction must have one shape; "
                f"got {tuple(images.shape)} and {tuple(reconstruction.shape)}"
            )
        config = self.config
        verdict = self.discriminator(torch.cat([images, reconstruction.detach()]))
        real_logits, fake_logits = verdict.logits.float().chunk(2)
        generator = matching = balance = torch.zeros((), device=images.device)
        ramp = ramp_weight(progress, start=config.start, length=config.ramp)
        if ramp > 0:
            constants = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
            fooled = functional_call(self.discriminator, constants, (reconstruction,))
            adversarial = hinge_generator_loss(fooled.logits.float())
            balance = torch.ones_like(balance)
            if config.adaptive:
                balance = adaptive_weight(
                    reconstruction_loss, adversarial, last_layer, most=_LARGEST_ADAPTIVE_WEIGHT
                ).float()
            generator = ramp * config.weight * balance * adversarial
            if config.feature_matching > 0:
                real_features = [feature.chunk(2)[0] for feature in verdict.features]
                matching = ramp * config.feature_matching * feature_matching_loss(fooled.features, real_features)
        return AdversarialLosses(
            generator=generator,
            feature_matching=matching,
            discriminator=hinge_discriminator_loss(real_logits, fake_logits),
            lecam=config.lecam * self.lecam(real_logits, fake_logits),
            adaptive_weight=balance,
            real_accuracy=(real_logits.detach() > 0).float().mean(),
            fake_accuracy=(fake_logits.detach() < 0).float().mean(),
        )
