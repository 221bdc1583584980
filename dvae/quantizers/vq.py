"""Vector quantization on the unit sphere (van den Oord et al. 2017, arXiv 1711.00937, with the cures for its collapse).

Latents of few channels are compared with the codes by their direction alone (ViT-VQGAN, Yu et al. 2021, arXiv
2110.04627, section 3.2). Codes follow the mean of the latents that chose them (1711.00937, appendix A.1) or learn by
gradient; they start as the centers of a k-means, and a code that nobody chooses starts again at a latent of the batch
(Jukebox, Dhariwal et al. 2020, arXiv 2005.00341, section 3.1).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from dvae.quantizers.api import Quantized
from tessera.errors import UserError

# B batch, D latent channels, h w code grid, N latents of a batch (B h w), K codebook size.

# Scores that are held at once: as many as stay in the cache of a CPU core, or as fill a GPU.
_CPU_SCORES = 2**18
_GPU_SCORES = 2**26

# Squared distance below which a latent needs no code of its own: it would be the twin of the one it has.
_TWIN = 1e-8
# A code that starts anew counts as used at this multiple of the share at which codes are restarted. One that is not
# taken up is replaced after log(2) / (1 - decay) steps, 69 at the default decay.
_GRACE = 2.0
# Length below which a sum of latents has no direction, in fp32.
_NOTHING = 1e-12


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code of each vector, by Euclidean distance; among unit vectors that is the highest cosine.

    Args:
        vectors: float [N, D].
        codebook: float [K, D].

    Returns:
        int64 [N], in [0, K).
    """
    # |v - c|^2 is smallest where v.c - |c|^2 / 2 is largest: one matrix product
    offset = codebook.square().sum(dim=1) / -2
    rows = max(1, (_CPU_SCORES if vectors.device.type == "cpu" else _GPU_SCORES) // len(codebook))
    return torch.cat([F.linear(some, codebook, offset).argmax(dim=1) for some in vectors.split(rows)])


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """How the codebook of a `VectorQuantizer` learns."""

    update: Literal["ema", "gradient"] = "ema"
    """what moves the codes: ema (running means of the latents that chose them) or gradient (a loss term and the
    optimizer)"""
    decay: float = 0.99
    """share of the running means that a step keeps, in [0, 1); the use of codes is counted over the same time"""
    dead_below: float = 0.1
    """a code restarts when its share of all choices falls below this fraction of 1 / codebook_size; 0 for never"""
    kmeans_rounds: int = 10
    """rounds of k-means that place the codes among the first batch's latents; 0 places them at random ones"""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1 or not 0 <= self.dead_below < 1:
            raise UserError(f"vq decay and dead_below must lie in [0, 1); got {self.decay} and {self.dead_below}")
        if self.kmeans_rounds < 0:
            raise UserError(f"vq kmeans_rounds must not be negative; got {self.kmeans_rounds}")


class VectorQuantizer(nn.Module):
    """A codebook of K unit vectors; a latent's code is the one nearest to its direction.

    Use is counted as a running mean of each code's share of the choices, not as a number of choices. A share compares
    with 1 / K whatever the batch holds, and its running mean spans 1 / (1 - decay) batches: 768 latents cannot choose
    every one of 1024 codes, but over 100 such batches an evenly used code is chosen 75 times.

    A code restarts at a latent drawn with probability in proportion to its squared distance from the code that it has
    (the seeding of k-means++, Arthur and Vassilvitskii 2007). Even draws would go to the commonest latents, such as
    those of a plain background, which are well served already.

    Under torch.distributed all ranks hold the same codebook: they count, average and draw over the batches of all of
    them, which must be of one size.

    Args:
        codebook_size: K >= 2.
        embedding_dim: D >= 2, of the latents and of the codes; few, such as 8, as in many most codes are never nearest.
        config: how the codes learn.

    Raises:
        ValueError: if K or D is below 2.
    """

    codebook: Tensor
    running: Tensor
    initialized: Tensor

    def __init__(self, codebook_size: int, embedding_dim: int, config: VQConfig) -> None:
        super().__init__()
        if codebook_size < 2 or embedding_dim < 2:
            raise ValueError(
                f"a codebook on a sphere needs at least 2 codes of 2 channels; got {codebook_size} of {embedding_dim}"
            )
        self.config = config
        self.codebook_size = codebook_size
        self.latent_dim = embedding_dim
        self.embedding_dim = embedding_dim
        codebook = F.normalize(torch.randn(codebook_size, embedding_dim), dim=1)
        if config.update == "ema":
            self.register_buffer("codebook", codebook)
        else:
            self.codebook = nn.Parameter(codebook)
        # per code and per latent of a batch: the sum of the latents that chose it, and in the last column its share
        self.register_buffer("running", torch.zeros(codebook_size, embedding_dim + 1))
        self.register_buffer("initialized", torch.tensor(False))
        self._known_initialized = False

    def forward(self, latents: Tensor, *, temperature: float = 1.0) -> Quantized:
        """Quantizes latents [B, D, h, w]; in training mode the codebook learns from them.

        The gradient of the embedding passes straight through the choice of a code to the latent's direction, and from
        there through the normalization. Latents that are not finite teach the codebook nothing; the whole batch is
        passed over then, on all ranks.

        Returns:
            Codes, embeddings of unit variance per channel (code vectors times sqrt(D)), and as terms, averaged over the
            positions, the squared distance on the unit sphere, in [0, 4]: "commitment" moves the latents and, where
            codes learn by gradient, "codebook" the codes.
        """
        # fp32 also under autocast: in bf16, codes closer than 1/256 of a unit would be one and the same
        with torch.autocast(latents.device.type, enabled=False):
            directions = F.normalize(latents.to(self.codebook.dtype), dim=1)  # [B, D, h, w]
            vectors = directions.detach().permute(0, 2, 3, 1).flatten(0, 2)  # [N, D]
            if self.training:
                self._initialize(vectors)
            codes = self._choose(vectors).view(len(latents), *latents.shape[2:])  # [B, h, w]
            chosen = self._unit_codes(codes)  # [B, D, h, w]
            distance = (directions - chosen.detach()).square().sum(dim=1)  # [B, h, w]
            terms = {"commitment": distance.mean()}
            if self.config.update == "gradient":
                terms["codebook"] = (chosen - directions.detach()).square().sum(dim=1).mean()
            if self.training:
                self._learn(
                    vectors,
                    codes.flatten(),
                    distance.detach().flatten(),
                    decay=self.config.decay,
                    move=self.config.update == "ema",
                )
            # added in this order the value is that of the code, to the last bit
            straight_through = chosen.detach() + (directions - directions.detach())
            return Quantized(codes=codes, embedding=math.sqrt(self.embedding_dim) * straight_through, terms=terms)

    def codes(self, latents: Tensor) -> Tensor:
        """The codes int64 [B, h, w] of latents [B, D, h, w]; the codebook stays as it is."""
        with torch.autocast(latents.device.type, enabled=False):
            directions = F.normalize(latents.detach().to(self.codebook.dtype), dim=1)  # [B, D, h, w]
            vectors = directions.permute(0, 2, 3, 1).flatten(0, 2)  # [N, D]
            return self._choose(vectors).view(len(latents), *latents.shape[2:])

    def lookup(self, codes: Tensor) -> Tensor:
        """The embeddings of codes int64 [B, h, w] as float [B, D, h, w], of length sqrt(D)."""
        return math.sqrt(self.embedding_dim) * self._unit_codes(codes)

    @property
    def share(self) -> Tensor:
        """Float [K], the running mean of each code's share of the choices; zeros before the first batch."""
        return self.running[:, -1]

    def _unit_codes(self, codes: Tensor) -> Tensor:
        # normalized after the look-up: its backward pass needs no codebook, which may have changed by then
        return F.normalize(F.embedding(codes, self.codebook), dim=-1).permute(0, 3, 1, 2)

    def _choose(self, vectors: Tensor) -> Tensor:
        return nearest_codes(vectors, F.normalize(self.codebook.detach(), dim=1))

    @torch.no_grad()
    def _initialize(self, vectors: Tensor) -> None:
        """Places the codes among the first batch of finite latents, by spherical k-means.

        Codes for which that batch has no latent to spare stay random and unused, and restart in the batches after it.
        """
        # reading the flag makes a GPU wait: once it has been seen set, it is not read again
        self._known_initialized = self._known_initialized or bool(self.initialized)
        if self._known_initialized or not bool(_gather(vectors).isfinite().all()):
            return
        _broadcast(self.codebook.data)
        self._restart(torch.ones_like(self.share, dtype=torch.bool), vectors, torch.ones_like(vectors[:, 0]))
        for _ in range(self.config.kmeans_rounds):
            codes = self._choose(vectors)
            distance = (vectors - F.embedding(codes, self.codebook.detach())).square().sum(dim=1)
            # a round of k-means is a step that keeps nothing of those before it
            self._learn(vectors, codes, distance, decay=0.0, move=True)
        self.initialized.fill_(True)

    @torch.no_grad()
    def _learn(self, vectors: Tensor, codes: Tensor, distance: Tensor, *, decay: float, move: bool) -> None:
        """Counts vectors [N, D] that chose codes [N] at squared distances [N], moves the codes, restarts dead ones.

        Every choice is made by masks: on a GPU, a branch on what is in a tensor would wait for all work before it.
        """
        members = torch.cat([vectors, torch.ones_like(vectors[:, :1])], dim=1)  # [N, D + 1]
        totals = torch.zeros_like(self.running).index_add_(0, codes, members)  # [K, D + 1]
        _sum(totals)
        finite = totals.isfinite().all()
        self.running.lerp_(torch.where(finite, totals / totals[:, -1].sum(), self.running), 1 - decay)
        if move:
            length = self.running[:, :-1].norm(dim=1, keepdim=True)
            movable = finite & (length > _NOTHING)  # not where nobody chose, or where the members cancel
            self.codebook.copy_(torch.where(movable, self.running[:, :-1] / length, self.codebook))
        dead = self.share < self.config.dead_below / self.codebook_size
        self._restart(dead & finite, vectors, distance)

    def _restart(self, dead: Tensor, vectors: Tensor, distance: Tensor) -> None:
        """Moves codes where dead [K] to as many different ones of vectors [N, D], as far as there are any to spare."""
        batch = _gather(torch.cat([vectors, distance.unsqueeze(1)], dim=1))  # [N of all ranks, D + 1]
        vectors, distance = batch[:, :-1], batch[:, -1]
        # not the twins of codes, and not latents without a direction
        worth = torch.where((distance > _TWIN) & (vectors.square().sum(dim=1) > 0.5), distance, 0.0)
        # The first places of a race with exponential times are a sample without replacement (Efraimidis and Spirakis
        # 2006), drawn without a loop.
        times = torch.empty_like(worth).exponential_()
        _broadcast(times)
        speed, winners = (worth / times).topk(min(self.codebook_size, len(worth)))
        place = dead.cumsum(dim=0) - 1  # the first dead code gets the first winner, the second the second
        restarted = dead & (place < len(winners))
        place = place.clamp(0, len(winners) - 1)
        restarted = (restarted & (speed[place] > 0)).unsqueeze(1)  # [K, 1]
        reborn = vectors[winners[place]]  # [K, D]
        self.codebook.copy_(torch.where(restarted, reborn, self.codebook))
        share = _GRACE * self.config.dead_below / self.codebook_size
        self.running.copy_(torch.where(restarted, F.pad(reborn, (0, 1), value=1.0) * share, self.running))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known_initialized = False


def _several_ranks() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _sum(tensor: Tensor) -> None:
    """Replaces a tensor by its sum over all ranks."""
    if _several_ranks():
        distributed.all_reduce(tensor)


def _broadcast(tensor: Tensor) -> None:
    """Replaces a tensor by that of rank 0."""
    if _several_ranks():
        distributed.broadcast(tensor, src=0)


def _gather(tensor: Tensor) -> Tensor:
    """The tensors of all ranks, joined along the first dimension in the order of ranks."""
    if not _several_ranks():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
