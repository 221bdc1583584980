"""What every quantizer takes and returns, so that the model above needs no knowledge of which one it holds."""

from typing import NamedTuple, Protocol

from torch import Tensor

# B batch, D latent channels, C embedding channels, h w code grid, K codebook size.


class Quantized(NamedTuple):
    """The result of quantizing one batch of latents.

    Attributes:
        codes: int64 [B, h, w], the hard codes in [0, K).
        embedding: float [B, C, h, w], what the decoder sees. It carries the gradient of the relaxation or of the
            straight-through estimator.
        terms: the quantizer's own losses by name, float32 scalars before their weights; empty where it has none.
    """

    codes: Tensor
    embedding: Tensor
    terms: dict[str, Tensor]


class Quantizer(Protocol):
    """An `nn.Module` that turns latents into codes and codes into what the decoder sees."""

    codebook_size: int
    """K"""
    latent_dim: int
    """D, channels that the encoder has to put out"""
    embedding_dim: int
    """C, channels of an embedding"""

    def __call__(self, latents: Tensor, *, temperature: float = 1.0) -> Quantized:
        """Quantizes latents float [B, D, h, w]; `temperature` is the tau of relaxed quantizers, others ignore it."""
        ...

    def codes(self, latents: Tensor) -> Tensor:
        """The codes int64 [B, h, w] of latents float [B, D, h, w]; nothing is learned and nothing drawn."""
        ...

    def lookup(self, codes: Tensor) -> Tensor:
        """The embeddings float [B, C, h, w] of codes int64 [B, h, w]."""
        ...
