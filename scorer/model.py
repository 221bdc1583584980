"""A contrastive dual encoder (Radford et al. 2021) with a matching head on top (as in Li et al. 2021, ALBEF, section 3.2).

The two encoders give one unit vector per image and per caption: good for search, and blind to who has which attribute,
because a vector of "a red star left of a blue ring" is close to one of "a blue star left of a red ring". The matching
head reads the image's patches once more with the words of one caption, and its score is the one that ranks.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessera.errors import UserError

# N images, M captions, G captions per image, T text positions, S = T + 1 text states, P patches, C width, H heads,
# E embedding width, D head width.


@dataclass(frozen=True, kw_only=True)
class ClipScorerConfig:
    """Sizes of a `ClipScorer`."""

    image_size: tuple[int, int] = (64, 64)
    """height and width in pixels of the images that it reads; multiples of patch_size"""
    patch_size: int = 8
    """side in pixels of one patch: a multiple of 4"""
    text_len: int = 32
    """T, text positions; longer captions are cut"""
    text_vocab_size: int = 512
    """pieces of the text tokenizer, without the pad ids"""
    stem_width: int = 64
    """channels of the convolutions that precede the patches"""
    dim: int = 128
    """C, channels of patches and text states"""
    heads: int = 4
    """attention heads; dim / heads channels each"""
    image_layers: int = 3
    """transformer layers over the patches"""
    text_layers: int = 2
    """transformer layers over the caption"""
    matcher_layers: int = 2
    """layers of the matching head; 0 leaves it out and scores by the two embeddings"""
    embedding_dim: int = 128
    """E, width of the embeddings"""


class Norm(nn.Module):
    """Layer normalization with a gain and no bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.dim,), self.weight.to(x.dtype))


class Attention(nn.Module):
    """Multi-head attention of `x` to `context`, with normalized queries and keys."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.norm_query = Norm(dim // heads)
        self.norm_key = Norm(dim // heads)
        self.project = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, n, C], context [B, m, C], mask bool [B, m] (True: may be attended to) to [B, n, C]."""
        batch, length, dim = x.shape
        query = self.query(x).view(batch, length, self.heads, -1).transpose(1, 2)  # [B, H, n, D]
        key, value = self.key_value(context).view(batch, context.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key = self.norm_query(query), self.norm_key(key)
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # [B, H, n, m]
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
        attended = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value  # [B, H, n, D]
        return self.project(attended.transpose(1, 2).reshape(batch, length, dim))


class MLP(nn.Module):
    """Two-layer feed-forward network with squared ReLU."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, ratio * dim, bias=False)
        self.down = nn.Linear(ratio * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Self-attention and MLP, each behind a norm and beside a skip connection."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm_attention = Norm(dim)
        self.attention = Attention(dim, heads)
        self.norm_mlp = Norm(dim)
        self.mlp = MLP(dim, mlp_ratio)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm_attention(x)
        x = x + self.attention(y, y, mask)
        return x + self.mlp(self.norm_mlp(x))


class MatcherBlock(nn.Module):
    """Text states look at the patches of an image, then at each other."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm_cross = Norm(dim)
        self.cross = Attention(dim, heads)
        self.block = Block(dim, heads, 2)

    def forward(self, x: Tensor, patches: Tensor, mask: Tensor) -> Tensor:
        """x [N, G, S, C], patches [N, P, C], mask [N, G, S] to [N, G, S, C]."""
        num_images, num_captions, length, dim = x.shape
        # All captions of an image are one long query: keys and values of its patches are made once.
        looked = self.cross(self.norm_cross(x).flatten(1, 2), patches)
        x = x + looked.view_as(x)
        return self.block(x.flatten(0, 1), mask.flatten(0, 1)).view(num_images, num_captions, length, dim)


class Stem(nn.Module):
    """Images [N, 3, H, W] to patches [N, P, C]: convolutions at a quarter of the resolution, then patches."""

    def __init__(self, config: ClipScorerConfig) -> None:
        super().__init__()
        width = config.stem_width
        self.cut = nn.Conv2d(3, width, 6, stride=4, padding=1)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        side = config.patch_size // 4
        self.to_patches = nn.Conv2d(width, config.dim, side, stride=side)

    def forward(self, images: Tensor) -> Tensor:
        x = self.cut(4 * images - 2)
        x = x + self.conv2(F.gelu(self.conv1(F.gelu(x))))
        return self.to_patches(F.gelu(x)).flatten(2).transpose(1, 2)


class TextStates(NamedTuple):
    """A batch of encoded captions.

    Attributes:
        states: float [M, S, C]; position 0 summarizes the caption.
        mask: bool [M, S], False at pads.
    """

    states: Tensor
    mask: Tensor


class ClipScorer(nn.Module):
    def __init__(self, config: ClipScorerConfig) -> None:
        super().__init__()
        self.config = config
        dim, heads = config.dim, config.heads
        num_patches = (config.image_size[0] // config.patch_size) * (config.image_size[1] // config.patch_size)
        self.stem = Stem(config)
        self.patch_positions = nn.Parameter(torch.zeros(num_patches, dim))
        self.image_blocks = nn.ModuleList(Block(dim, heads, 4) for _ in range(config.image_layers))
        self.image_norm = Norm(dim)
        self.text_embedding = nn.Embedding(config.text_vocab_size, dim)
        self.summary = nn.Parameter(torch.zeros(dim))
        self.text_positions = nn.Parameter(torch.zeros(config.text_len + 1, dim))
        self.text_blocks = nn.ModuleList(Block(dim, heads, 4) for _ in range(config.text_layers))
        self.text_norm = Norm(dim)
        self.image_projection = nn.Linear(dim, config.embedding_dim, bias=False)
        self.text_projection = nn.Linear(dim, config.embedding_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.matcher_blocks = nn.ModuleList(MatcherBlock(dim, heads) for _ in range(config.matcher_layers))
        self.matcher_norm = Norm(dim)
        self.matcher_head = nn.Linear(dim, 1, bias=False)
        self.to(memory_format=torch.channels_last)
        self.init_weights()

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if isinstance(module, Attention):
                nn.init.zeros_(module.project.weight)
            if isinstance(module, MLP):
                nn.init.zeros_(module.down.weight)
        nn.init.normal_(self.text_embedding.weight, std=1.0)
        nn.init.normal_(self.summary, std=1.0)
        nn.init.normal_(self.patch_positions, std=0.5)
        nn.init.normal_(self.text_positions, std=0.5)
        nn.init.normal_(self.matcher_head.weight, std=0.02)

    def encode_images(self, images: Tensor) -> Tensor:
        x = self.stem(images.contiguous(memory_format=torch.channels_last)) + self.patch_positions
        for block in self.image_blocks:
            x = block(x)
        return self.image_norm(x)

    def encode_texts(self, ids: Tensor) -> TextStates:
        kept = ids < self.config.text_vocab_size
        length = int(kept.sum(dim=1).max()) if len(ids) else 0
        kept = kept[:, :length]
        words = self.text_embedding(ids[:, :length].clamp(max=self.config.text_vocab_size - 1))
        x = torch.cat([self.summary.expand(len(ids), 1, -1), words], dim=1) + self.text_positions[: length + 1]
        mask = torch.cat([kept.new_ones(len(ids), 1), kept], dim=1)
        for block in self.text_blocks:
            x = block(x, mask)
        return TextStates(self.text_norm(x), mask)

    def project_images(self, patches: Tensor) -> Tensor:
        return F.normalize(self.image_projection(patches.mean(dim=1)).float(), dim=-1)

    def project_texts(self, texts: TextStates) -> Tensor:
        return F.normalize(self.text_projection(texts.states[:, 0]).float(), dim=-1)

    def match(self, patches: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """patches [N, P, C]; states [N, G, S, C]; mask [N, G, S] -> [N, G]."""
        x = states
        for block in self.matcher_blocks:
            x = block(x, patches, mask)
        return self.matcher_head(self.matcher_norm(x[:, :, 0])).float().squeeze(-1)
