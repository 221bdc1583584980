"""What every quantizer returns, so that the model above needs no knowledge of which one it holds."""

from typing import NamedTuple

from torch import Tensor

# B batch, D latent channels, C embedding channels, h w code grid, K codebook size.


class Quantized(NamedTuple):
    """The result of quantizing one batch of latents.

    Attributes:
        codes: int64 [B, h, w], the hard codes in [0, K).
        embedding: float [B, C, h, w], what the decoder sees. It carries the gradient of the relaxation or of the
            straight-through estimator.
        regularizer: float scalar, the quantizer's own loss before its weight (zero where it has none).
    """

    codes: Tensor
    embedding: Tensor
    regularizer: Tensor
