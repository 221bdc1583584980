"""A frozen weight matrix, stored for multiplying a few rows at a time, as decoding does.

One token after another, time goes into reading weights. On CPUs oneDNN packs them once, in fp32 or bf16, which makes a
product of one row two to six times as fast as the plain call (measured at 256 to 4,096 channels on two AVX-512 cores).
int8 weights with one scale per output channel (LLM.int8(), Dettmers et al. 2022, section 2.1, without its outliers)
take half as many bytes as bf16.

What a row gives must not depend on the rows beside it, or an image would depend on what else is in its batch. Libraries
choose other kernels, that add in another order, for other numbers of rows. `FrozenLinear` tries its product on a CPU,
once for each shape, and takes the widest way that passes: all rows at once, the sum in parts, or tiles of fixed size.
"""

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from transformer.kernels import ops
from transformer.kernels.launch_config import LEAST_CAPABILITY

# R rows, K input channels, N output channels.

Storage = Literal["fp32", "bf16", "int8"]

TILE_ROWS = 8
PART_CHANNELS = 1024  # up to here oneDNN adds in one go, whatever the number of rows
KERNEL_ROWS = 64  # beyond it a GPU should widen an int8 weight once, not read it for every 16 rows; estimated
_TRIED_ROWS = (1, 2, 3, 4, 5, 8, 13, 16, 31, 32, 64, 100, 128, 200, 256)

_Multiply = Callable[[Tensor], Tensor]


class FrozenLinear:
    """x W^T with a frozen W.

    Args:
        weight: float [N, K]; copied into another form, not kept.
        storage: fp32, bf16 or int8; what is multiplied on a CPU in bf16 and int8 is x rounded to bf16.

    Raises:
        ValueError: the storage is unknown, or the weight is not a float matrix.

    Attributes:
        num_bytes: memory that the stored weight takes.
    """

    def __init__(self, weight: Tensor, *, storage: Storage = "fp32") -> None:
        if storage not in get_args(Storage):
            raise ValueError(f"storage is one of {', '.join(get_args(Storage))}; got {storage!r}")
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(f"a weight must be float [N, K]; got {weight.dtype} {list(weight.shape)}")
        out_channels, channels = weight.shape
        self.num_bytes = weight.numel() * {"fp32": 4, "bf16": 2, "int8": 1}[storage]
        weight = weight.detach()
        if weight.device.type == "cpu":
            way = _way_for(out_channels, channels, storage, torch.get_num_threads())
            self._multiply = _on_cpu(weight, storage, way)
        else:
            self._multiply = _elsewhere(weight, storage)

    def __call__(self, x: Tensor) -> Tensor:
        """Multiplies x [R, K] in the dtype that the model computes in; returns [R, N] in the same dtype."""
        return self._multiply(x)


_Way = Literal["at once", "in parts", "in tiles"]


@lru_cache(maxsize=256)
def _way_for(out_channels: int, channels: int, storage: Storage, num_threads: int) -> _Way:
    """The widest way to multiply by a matrix of this shape whose rows do not depend on each other.

    The number of threads is part of the question: work is divided among them.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_channels, channels, generator=generator) * channels**-0.5
    x = torch.randn(_TRIED_ROWS[-1], channels, generator=generator)
    ways: tuple[_Way, ...] = ("at once", "in parts") if storage != "int8" and channels > PART_CHANNELS else ("at once",)
    with torch.inference_mode():
        for way in ways:
            multiply = _on_cpu(weight, storage, way)
            alone = torch.cat([multiply(row) for row in x.split(1)])
            if all(torch.equal(multiply(x[:rows]), alone[:rows]) for rows in _TRIED_ROWS):
                return way
    return "in tiles"


def _on_cpu(weight: Tensor, storage: Storage, way: _Way) -> _Multiply:
    if way == "in tiles":
        return _in_tiles(_on_cpu(weight, storage, "at once"))
    if storage == "int8":
        return _int8_on_cpu(weight)
    if not torch.backends.mkldnn.is_available():
        return _plain(weight, storage)
    if storage == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return _plain(weight, storage)  # slow, but it runs
    parts = weight.split(PART_CHANNELS, dim=1) if way == "in parts" else (weight,)
    return _packed(parts, torch.bfloat16 if storage == "bf16" else torch.float32)


def _packed(parts: tuple[Tensor, ...], dtype: torch.dtype) -> _Multiply:
    """oneDNN's product with packed weights, of parts of the input channels one after the other."""
    product = torch.ops.mkldnn._linear_pointwise.default
    product_and_sum = torch.ops.mkldnn._linear_pointwise.binary
    packed = [torch.ops.mkldnn._reorder_linear_weight(part.to(dtype).contiguous()) for part in parts]
    channels = [part.shape[1] for part in parts]

    def multiply(x: Tensor) -> Tensor:
        total = None
        for part, own in zip(packed, x.to(dtype).split(channels, dim=1), strict=True):
            if total is None:
                total = product(own, part, None, "none", [], "")
            else:
                total = product_and_sum(own, total, part, None, "add")
        assert total is not None
        return total.to(x.dtype)

    def multiply_whole(x: Tensor) -> Tensor:
        return product(x.to(dtype), packed[0], None, "none", [], "").to(x.dtype)

    return multiply if len(packed) > 1 else multiply_whole


def _int8_on_cpu(weight: Tensor) -> _Multiply:
    padding = -weight.shape[1] % 16  # PyTorch's kernel reads 16 channels at a time, past the end if it has to
    quantized, scale = quantize(F.pad(weight, (0, padding)))
    scale = scale.to(torch.bfloat16)

    def multiply(x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x.to(torch.bfloat16), quantized, scale).to(x.dtype)

    def multiply_padded(x: Tensor) -> Tensor:
        return multiply(F.pad(x, (0, padding)))

    return multiply_padded if padding else multiply


def _plain(weight: Tensor, storage: Storage) -> _Multiply:
    own = weight.to(torch.bfloat16 if storage == "bf16" else torch.float32, copy=True)

    def multiply(x: Tensor) -> Tensor:
        return F.linear(x.to(own.dtype), own).to(x.dtype)

    return multiply


def _elsewhere(weight: Tensor, storage: Storage) -> _Multiply:
    if storage != "int8":
        return _plain(weight, storage)
    quantized, scale = quantize(weight)

    def multiply(x: Tensor) -> Tensor:
        return F.linear(x, quantized.to(x.dtype)) * scale.to(x.dtype)

    def multiply_few(x: Tensor) -> Tensor:
        return ops.int8_linear(x, quantized, scale) if len(x) <= KERNEL_ROWS else multiply(x)

    return multiply_few if _has_kernel(weight.device) else multiply


def _has_kernel(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device; elsewhere the weight is widened for each product."""
    if device.type != "cuda" or torch.version.hip or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def _in_tiles(multiply: _Multiply) -> _Multiply:
    """The same product, always of TILE_ROWS rows: what a library adds up in which order is then always the same."""

    def tiled(x: Tensor) -> Tensor:
        rows = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -rows % TILE_ROWS))
        return torch.cat([multiply(tile) for tile in padded.split(TILE_ROWS)])[:rows]

    return tiled


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [N, K] as int8 [N, K] in [-127, 127] and the float32 [N] scale of each output channel."""
    scale = weight.float().abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale
