"""The relaxed categorical quantizer of the DALL-E dVAE (Ramesh et al. 2021, arXiv 2102.12092, section 2.1).

Encoder logits parametrize a categorical distribution per grid position. Training decodes the Gumbel-softmax relaxation
(Jang et al. 2017; Maddison et al. 2017), soft in the forward and in the backward pass; encoding takes the argmax.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvae.quantizers.api import Quantized

# B batch, K codebook size, C embedding channels, h w code grid, tau temperature.


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(q || uniform) in nats for logits [B, K, h, w]: summed over the grid, averaged over the batch.

    The divergence is that of the categorical itself, not of its relaxation, which is how the paper's authors computed
    it. Divided by the number of pixel values it is on the scale of a likelihood per value (`dvae.losses.elbo_scale`).
    """
    log_q = F.log_softmax(logits.float(), dim=1)
    per_position = (log_q.exp() * log_q).sum(dim=1) + math.log(logits.shape[1])  # [B, h, w]
    return per_position.sum(dim=(1, 2)).mean()


class GumbelQuantizer(nn.Module):
    """A codebook of K learned embeddings, mixed by the relaxed sample in training and looked up by argmax otherwise.

    Args:
        codebook_size: K >= 2.
        embedding_dim: channels C of one embedding.

    Raises:
        ValueError: if K is below 2.
    """

    def __init__(self, codebook_size: int, embedding_dim: int) -> None:
        super().__init__()
        if codebook_size < 2:
            raise ValueError(f"a codebook needs at least 2 codes; got {codebook_size}")
        self.codebook_size = codebook_size
        self.latent_dim = codebook_size
        self.embedding_dim = embedding_dim
        self.codebook = nn.Parameter(torch.randn(codebook_size, embedding_dim))

    def forward(self, latents: Tensor, *, temperature: float = 1.0) -> Quantized:
        """Quantizes logits [B, K, h, w].

        Args:
            latents: the encoder's logits.
            temperature: tau > 0 of the relaxation; only used in training mode.

        Raises:
            ValueError: if tau is not positive.
        """
        if temperature <= 0:
            raise ValueError(f"the Gumbel temperature must be positive; got {temperature}")
        logits = latents.float()
        codes = logits.argmax(dim=1)  # [B, h, w]
        if not self.training:
            return Quantized(codes=codes, embedding=self.lookup(codes), regularizer=kl_to_uniform(logits))
        # -log(Exponential(1)) is Gumbel(0, 1) and, unlike -log(-log(uniform)), never meets log(0)
        noise = -torch.empty_like(logits).exponential_().log()
        relaxed = F.softmax((logits + noise) / temperature, dim=1)  # [B, K, h, w]
        embedding = torch.einsum("bkhw,kc->bchw", relaxed, self.codebook)
        return Quantized(codes=codes, embedding=embedding, regularizer=kl_to_uniform(logits))

    def lookup(self, codes: Tensor) -> Tensor:
        """The embeddings of codes int64 [B, h, w] as float [B, C, h, w]."""
        return F.embedding(codes, self.codebook).permute(0, 3, 1, 2)
