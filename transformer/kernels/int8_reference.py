"""A few rows times an int8 weight as the definition says, in float64: what the kernel is compared with."""

from torch import Tensor

# R rows, K input channels, N output channels.


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T of a weight stored as int8, with one scale for each output channel.

    Args:
        x: float [R, K].
        weight: int8 [N, K].
        scale: float32 [N]; row n of W is scale[n] * weight[n].

    Returns:
        [R, N] in the dtype of x.
    """
    return (x.double() @ weight.double().T * scale.double()).to(x.dtype)
