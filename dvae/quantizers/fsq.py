"""Finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505) with the iFSQ bound (arXiv 2601.17124).

Each latent channel is squashed to (-1, 1) and rounded to one of a few levels; the code is the mixed-radix number of the
level indices. There is no codebook to learn, to synchronize or to collapse.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from dvae.quantizers.api import Quantized

# B batch, D scalar channels (= number of levels), h w code grid, K codebook size.

FSQActivation = Literal["ifsq", "tanh"]

# iFSQ: 2 * sigmoid(1.6 x) - 1 maps a standard normal nearly uniformly onto (-1, 1), so that the bins fill evenly;
# with tanh the outer bins of a normal latent take most of the mass.
IFSQ_SLOPE = 1.6


class FiniteScalarQuantizer(nn.Module):
    """Rounds every channel to its own number of equally wide bins.

    Args:
        levels: bins per channel, each >= 2. The codebook size K is their product.
        activation: what bounds a latent: `ifsq`, or the `tanh` of the FSQ paper.

    Raises:
        ValueError: if a level is below 2 or there is none.
    """

    def __init__(self, levels: tuple[int, ...], *, activation: FSQActivation = "ifsq") -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"fsq levels must be integers >= 2, at least one of them; got {levels}")
        self.levels = levels
        self.activation = activation
        self.latent_dim = len(levels)
        self.embedding_dim = len(levels)
        self.codebook_size = math.prod(levels)
        radix = [math.prod(levels[:channel]) for channel in range(len(levels))]
        self.register_buffer("_levels", torch.tensor(levels), persistent=False)
        self.register_buffer("_radix", torch.tensor(radix), persistent=False)

    def forward(self, latents: Tensor, *, temperature: float = 1.0) -> Quantized:
        """Quantizes latents [B, D, h, w]; the gradient passes straight through the rounding.

        `temperature` belongs to the relaxed quantizers and has no meaning here.
        """
        bounded = self._bounded(latents)
        index = self._index(bounded.detach())
        centers = (2 * index + 1) / self._levels.view(1, -1, 1, 1) - 1
        embedding = bounded + (centers - bounded).detach()
        return Quantized(codes=self._number(index), embedding=embedding, terms={})

    def codes(self, latents: Tensor) -> Tensor:
        """The codes int64 [B, h, w] of latents [B, D, h, w]."""
        return self._number(self._index(self._bounded(latents)))

    def lookup(self, codes: Tensor) -> Tensor:
        """The bin centers of codes int64 [B, h, w] as float [B, D, h, w]."""
        digits = codes.unsqueeze(1) // self._radix.view(1, -1, 1, 1) % self._levels.view(1, -1, 1, 1)
        return (2 * digits.float() + 1) / self._levels.view(1, -1, 1, 1) - 1

    def _bounded(self, latents: Tensor) -> Tensor:
        """Latents [B, D, h, w] in (-1, 1)."""
        # fp32: a bf16 latent near a bin border would round differently from one machine to the next
        wide = latents.float()
        return torch.tanh(wide) if self.activation == "tanh" else 2 * torch.sigmoid(IFSQ_SLOPE * wide) - 1

    def _index(self, bounded: Tensor) -> Tensor:
        """The bin of each channel, float [B, D, h, w]."""
        levels = self._levels.view(1, -1, 1, 1)
        return ((bounded + 1) / 2 * levels).floor().clamp_(torch.zeros_like(levels), levels - 1)

    def _number(self, index: Tensor) -> Tensor:
        """Bins [B, D, h, w] as mixed-radix numbers int64 [B, h, w]."""
        return (index.long() * self._radix.view(1, -1, 1, 1)).sum(dim=1)
