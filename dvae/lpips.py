"""LPIPS, the distance between two pictures as VGG16 sees them (Zhang et al. 2018, arXiv 1801.03924).

Built from two weights files that the user has; nothing is ever downloaded. The backbone is trained on ImageNet, the
heads on human judgements of which of two distortions looks closer to the original.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from tessera.errors import UserError

# B batch, C channels, H W image pixels, h w positions of a layer.

# Channels after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, and where these stand in torchvision's VGG16.
_CHANNELS = (64, 128, 256, 512, 512)
_TAPS = (3, 8, 15, 22, 29)
SMALLEST_SIDE = 16  # four poolings lie before the last tap
# The means and deviations of ImageNet as LPIPS applies them, to pixels in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
# Under the root, where it gives the gradient of an all-zero position a value; outside, that would be NaN.
_EPSILON = 1e-8


class Lpips(nn.Module):
    """The perceptual distance between images: 0 for equal ones, about 1 for unrelated ones.

    Its weights are frozen, and it computes in fp32, whatever autocast says.

    Args:
        backbone: torchvision's VGG16 weights for ImageNet (`vgg16-397923af.pth`), or the same as safetensors.
        heads: the linear heads for VGG16 (`vgg.pth` of the PyPI package lpips, version 0.1), or the same as
            safetensors.

    Raises:
        UserError: if a file is missing, cannot be read without running code from it, or holds something else.
    """

    def __init__(self, *, backbone: Path, heads: Path) -> None:
        super().__init__()
        from torchvision.models import vgg16

        with torch.device("meta"):  # the classifier, nine tenths of the weights, is not even allocated
            self.features = vgg16(weights=None).features[: _TAPS[-1] + 1]  # type: ignore[index]
        expected = {f"features.{name}": weight.shape for name, weight in self.features.state_dict().items()}
        weights = _read(backbone, expected, what="torchvision's VGG16 weights")
        self.features.load_state_dict(
            {name.removeprefix("features."): weight for name, weight in weights.items()}, assign=True
        )
        shapes = {f"lin{layer}.model.1.weight": (1, channels, 1, 1) for layer, channels in enumerate(_CHANNELS)}
        loaded = _read(heads, shapes, what="LPIPS heads for VGG16")
        if min(float(weight.min()) for weight in loaded.values()) < 0:
            raise UserError(f"{heads}: LPIPS heads must not be negative, these are; copy the file again")
        self.heads = nn.ParameterList(weight.flatten() for weight in loaded.values())
        self.register_buffer("_shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.requires_grad_(False).eval()

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """The distance of each reconstruction from its image; only the reconstruction gets a gradient.

        Args:
            reconstruction: float [B, 3, H, W] in [0, 1]; values beyond are taken as they are.
            images: float [B, 3, H, W] in [0, 1], sides of at least 16 pixels.

        Returns:
            float32 [B], not negative.

        Raises:
            ValueError: if the shapes differ or are not these.
        """
        shape = tuple(images.shape)
        if tuple(reconstruction.shape) != shape or len(shape) != 4 or shape[1] != 3 or min(shape[2:]) < SMALLEST_SIDE:
            raise ValueError(
                f"LPIPS needs two batches of one shape [batch, 3, height, width], sides of at least {SMALLEST_SIDE}; "
                f"got {tuple(reconstruction.shape)} and {shape}"
            )
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                expected = self._activations(images.float())
            distance = torch.zeros(len(images), device=images.device)
            for got, wanted, head in zip(self._activations(reconstruction.float()), expected, self.heads, strict=True):
                difference = (_unit(got) - _unit(wanted)).square()  # [B, C, h, w]
                distance = distance + torch.einsum("bchw,c->bhw", difference, head).mean(dim=(1, 2))
        return distance

    def _activations(self, images: Tensor) -> list[Tensor]:
        x = ((2 * images - 1 - self._shift) / self._scale).contiguous(memory_format=torch.channels_last)
        taps = []
        for place, layer in enumerate(self.features):
            x = layer(x)
            if place in _TAPS:
                taps.append(x)
        return taps


def _unit(activations: Tensor) -> Tensor:
    return activations / (activations.square().sum(dim=1, keepdim=True) + _EPSILON).sqrt()


def _read(file: Path, shapes: Mapping[str, tuple[int, ...]], *, what: str) -> dict[str, Tensor]:
    """The tensors of these names as float32; others in the file are left alone."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; it must hold {what}, which are never downloaded")
    try:
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, framework="pt") as stream:
                content = {name: stream.get_tensor(name) for name in stream.keys() if name in shapes}  # noqa: SIM118
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a file of tensors; it must hold {what}") from error
    for name, shape in shapes.items():
        tensor = content.get(name) if isinstance(content, dict) else None
        got = tuple(tensor.shape) if isinstance(tensor, Tensor) else None
        if got != tuple(shape):
            found = "it is not there" if got is None else f"it has {got}"
            raise UserError(f"{file}: not {what}: {name} must have shape {tuple(shape)}, {found}")
    return {name: content[name].float() for name in shapes}
