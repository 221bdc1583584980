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


# Cosines of neighbors among 1,024 unit vectors of 8 channels differ by about 0.1: with this scale a code is already
# several times as likely as its neighbors when training begins, and learns to be more so.
_START_SCALE = 20.0


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

    The paper's encoder puts out K logits. Raising a few of them everywhere is the easiest way for it to be sure of its
    codes, and the others are never used again: that is how small models collapse. Tied to the codebook, logits are
    scaled cosines between a latent and the embeddings, as in SQ-VAE (Takida et al. 2022, arXiv 2205.07547): a code is
    likely where its embedding is near, and no code is likely everywhere.

    Args:
        codebook_size: K >= 2.
        embedding_dim: channels C of one embedding.
        tied: whether latents are compared with the embeddings; otherwise they are the logits, as in the paper.
        init_std: standard deviation of the embeddings at the start, where they are not tied.

    Raises:
        ValueError: if K is below 2.
    """

    def __init__(self, codebook_size: int, embedding_dim: int, *, tied: bool = False, init_std: float = 1.0) -> None:
        super().__init__()
        if codebook_size < 2:
            raise ValueError(f"a codebook needs at least 2 codes; got {codebook_size}")
        self.codebook_size = codebook_size
        self.latent_dim = embedding_dim if tied else codebook_size
        self.embedding_dim = embedding_dim
        self.codebook = nn.Parameter((1.0 if tied else init_std) * torch.randn(codebook_size, embedding_dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(_START_SCALE))) if tied else None

    def forward(self, latents: Tensor, *, temperature: float = 1.0) -> Quantized:
        """Quantizes latents [B, D, h, w], where D is C for a tied codebook and K for the paper's.

        Args:
            latents: what the encoder puts out.
            temperature: tau > 0 of the relaxation; only used in training mode.

        Raises:
            ValueError: if tau is not positive.
        """
        if temperature <= 0:
            raise ValueError(f"the Gumbel temperature must be positive; got {temperature}")
        logits = self.logits(latents)  # [B, K, h, w]
        codes = logits.detach().argmax(dim=1)  # [B, h, w]
        terms = {"kl": kl_to_uniform(logits)}
        if not self.training:
            return Quantized(codes=codes, embedding=self.lookup(codes), terms=terms)
        # -log(Exponential(1)) is Gumbel(0, 1) and, unlike -log(-log(uniform)), never meets log(0)
        noise = -torch.empty_like(logits).exponential_().log()
        relaxed = F.softmax((logits + noise) / temperature, dim=1)  # [B, K, h, w]
        # thousands of small shares: the paper keeps this product in fp32, too
        with torch.autocast(latents.device.type, enabled=False):
            embedding = torch.einsum("bkhw,kc->bchw", relaxed, self._embeddings())
        return Quantized(codes=codes, embedding=embedding, terms=terms)

    def codes(self, latents: Tensor) -> Tensor:
        """The most likely code of each position, int64 [B, h, w]."""
        return self.logits(latents).argmax(dim=1)

    def logits(self, latents: Tensor) -> Tensor:
        """The logits float32 [B, K, h, w] of the codes."""
        # in bf16 the logits of neighboring codes are equal
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            if self.log_scale is None:
                return latents
            directions = F.normalize(latents, dim=1)  # [B, C, h, w]
            cosines = torch.einsum("bchw,kc->bkhw", directions, F.normalize(self.codebook, dim=1))
            return self.log_scale.exp() * cosines

    def lookup(self, codes: Tensor) -> Tensor:
        """The embeddings of codes int64 [B, h, w] as float [B, C, h, w]."""
        return F.embedding(codes, self._embeddings()).permute(0, 3, 1, 2)

    def _embeddings(self) -> Tensor:
        """[K, C]; tied ones have length sqrt(C), so that the decoder sees unit variance."""
        if self.log_scale is None:
            return self.codebook
        return math.sqrt(self.embedding_dim) * F.normalize(self.codebook, dim=1)
