"""The prior: a causal transformer that predicts image codes after text tokens (Ramesh et al. 2021, section 2.2).

Pre-normalization, SwiGLU (Shazeer 2020), normalized queries and keys (Henry et al. 2020), rotary positions (Su et al.
2021) that are one-dimensional on the text and two-dimensional on the image, separate heads for text and image.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tessera.config import from_plain
from tessera.errors import UserError
from tessera.model_folder import ModelFolder
from transformer.attention import Backend, attention, choose_decode_backend, decode_attention
from transformer.cache import KVCache, LayerCache
from transformer.code_table import CodeTable
from transformer.masks import AttentionMask, ConvMode, MaskKind, RowMode, layer_kinds

# B batch, T text positions, I image positions, N = T + I, C width, H heads, Hkv heads of keys and values, D head width,
# V text ids, K codebook size.


# Scores of normalized queries and keys of D channels reach sqrt(D) before their gains: 5.7 in a head of 32, too little
# to single out one of a hundred positions. The gains start where scores can reach this much.
MAX_SCORE = 16.0


@dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """What stands where in the prior's sequence: T text positions, then the code grid in raster order."""

    text_len: int = 32
    """T, text positions; shorter captions are filled with one learned pad id per position"""
    grid_height: int = 8
    """rows of the code grid"""
    grid_width: int = 8
    """columns of the code grid"""
    text_vocab_size: int = 512
    """pieces of the text tokenizer, without the pad ids"""
    codebook_size: int = 1024
    """K, codes of the dVAE"""
    codebook_levels: tuple[int, ...] = ()
    """values of each digit of a code, least significant first; empty for a codebook without digits"""

    def __post_init__(self) -> None:
        for name in ("text_len", "grid_height", "grid_width", "text_vocab_size", "codebook_size"):
            if getattr(self, name) < 1:
                raise UserError(f"layout.{name} must be at least 1; got {getattr(self, name)}")
        if self.codebook_levels and math.prod(self.codebook_levels) != self.codebook_size:
            raise UserError(
                f"the product of layout.codebook_levels must be layout.codebook_size; "
                f"got {self.codebook_levels} and {self.codebook_size}"
            )

    @property
    def image_len(self) -> int:
        """I, image positions."""
        return self.grid_height * self.grid_width

    @property
    def seq_len(self) -> int:
        """N, all positions."""
        return self.text_len + self.image_len

    @property
    def num_text_ids(self) -> int:
        """V, text ids with the pads: the pad of position p is text_vocab_size + p."""
        return self.text_vocab_size + self.text_len


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Sizes of a `Prior`."""

    layout: SequenceLayout = SequenceLayout()
    """what the sequence holds; taken from the token shards in training"""
    dim: int = 256
    """C, channels"""
    depth: int = 6
    """number of layers"""
    heads: int = 4
    """attention heads; dim / heads channels each, a multiple of 8"""
    key_value_heads: int = 0
    """heads of keys and values, each for as many attention heads (grouped-query attention); 0: one for each"""
    attention: tuple[MaskKind, ...] = ("full",)
    """mask kinds, repeated over the layers; a "conv" entry is kept for the last layer"""
    row_mode: RowMode = "window"
    """how far the row mask reaches: window to the position exactly above, own_row to the start of the row"""
    conv_mode: ConvMode = "raster"
    """of the conv mask's window: raster runs on in the neighboring row, clip ends at the grid's edges, torus wraps both
    axes; quadrant has its lower right corner, not its center, on the position"""
    kernel_size: int = 11
    """side of the conv mask's window, odd unless conv_mode is quadrant"""
    dilation: int = 1
    """distance between neighbors of the conv mask's window"""
    mlp_ratio: float = 2.75
    """hidden channels of the gated MLP per channel; 8/3 equals the parameters of a plain MLP of ratio 4"""
    rope_theta: float = 100.0
    """longest rotary wavelength is 2 pi times this, in positions"""

    def __post_init__(self) -> None:
        if self.dim < 1 or self.depth < 1 or self.heads < 1 or self.dim % self.heads or self.dim // self.heads % 8:
            raise UserError(
                f"prior dim must be a multiple of 8 x heads and depth at least 1; "
                f"got dim={self.dim}, heads={self.heads}, depth={self.depth}"
            )
        if self.key_value_heads < 0 or self.heads % self.num_key_value_heads:
            raise UserError(
                f"prior key_value_heads must divide heads, or be 0 for as many; "
                f"got key_value_heads={self.key_value_heads}, heads={self.heads}"
            )
        self.masks()  # raises for a mask that cannot be

    @property
    def num_key_value_heads(self) -> int:
        """Hkv, at least 1."""
        return self.key_value_heads or self.heads

    def masks(self) -> tuple[AttentionMask, ...]:
        """The mask of each layer, one object for all layers of a kind."""
        kinds = layer_kinds(self.attention, self.depth)
        of_kind = {
            kind: AttentionMask(
                kind=kind,
                text_len=self.layout.text_len,
                grid_height=self.layout.grid_height,
                grid_width=self.layout.grid_width,
                row_mode=self.row_mode,
                conv_mode=self.conv_mode,
                kernel_size=self.kernel_size,
                dilation=self.dilation,
            )
            for kind in set(kinds)
        }
        return tuple(of_kind[kind] for kind in kinds)


class Norm(nn.Module):
    """Layer normalization with a gain and no bias.

    RMS normalization would do as well, but PyTorch has no fused kernel for its backward pass on a CPU: at 5,568 x 256
    in bf16 it took eleven times as long.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.dim,), self.weight.to(x.dtype))


def rotary_angles(layout: SequenceLayout, head_dim: int, theta: float) -> Tensor:
    """The rotation angle of every position and channel pair that turns, float32 [N, head_dim / 4].

    Half of the channels of a head turn, so that the others can match content at any distance: an image position has to
    find its word wherever in the caption it stands. One half of the turning pairs goes with the row, the other with the
    column. Text position p counts as row and column p - T, that is, on the diagonal up and left of the image: between
    text positions the angles are one-dimensional, between image positions two-dimensional, and the two meet without a
    special case.
    """
    text = torch.arange(-layout.text_len, 0)
    rows = torch.arange(layout.grid_height).repeat_interleave(layout.grid_width)
    columns = torch.arange(layout.grid_width).repeat(layout.grid_height)
    frequency = theta ** (-torch.arange(head_dim // 8) / (head_dim // 8))  # [D/8]
    row_angles = torch.cat([text, rows])[:, None] * frequency  # [N, D/8]
    column_angles = torch.cat([text, columns])[:, None] * frequency
    return torch.cat([row_angles, column_angles], dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the first half of the channels of x [..., D], in pairs (d, d + D/4); the angles are [..., D/4]."""
    quarter = x.shape[-1] // 4
    first, second, still = x.split([quarter, quarter, 2 * quarter], dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos, still], dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention with normalized queries and keys.

    Fewer heads of keys and values than of queries are shared by neighboring ones (Ainslie et al. 2023, "GQA", section
    2.2), which makes the cache smaller.
    """

    def __init__(self, dim: int, heads: int, key_value_heads: int) -> None:
        super().__init__()
        self.heads, self.key_value_heads = heads, key_value_heads
        head_dim = dim // heads
        self.query_key_value = nn.Linear(dim, (heads + 2 * key_value_heads) * head_dim, bias=False)
        self.query_gain = nn.Parameter(torch.empty(head_dim))
        self.key_gain = nn.Parameter(torch.empty(head_dim))
        self.project = nn.Linear(dim, dim, bias=False)

    def queries_keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, n, C] to rotated queries [B, H, n, D], and rotated keys and values [B, Hkv, n, D]."""
        head_dim = len(self.query_gain)
        heads = self.query_key_value(x).unflatten(-1, (-1, head_dim))  # [B, n, H + 2 Hkv, D]
        # queries and keys are normalized and turned together: half as many passes over memory
        both, value = heads.split([self.heads + self.key_value_heads, self.key_value_heads], dim=2)
        gains = [self.query_gain.expand(self.heads, -1), self.key_gain.expand(self.key_value_heads, -1)]
        both = F.layer_norm(both, (head_dim,)) * torch.cat(gains).to(x.dtype)
        both = rotate(both, cos.to(both.dtype)[:, None], sin.to(both.dtype)[:, None]).transpose(1, 2)
        query, key = both.split([self.heads, self.key_value_heads], dim=1)
        return query, key, value.transpose(1, 2)

    def output(self, attended: Tensor) -> Tensor:
        """[B, H, n, D] back to [B, n, C]."""
        return self.project(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = 32 * math.ceil(dim * ratio / 32)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a skip connection."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.norm_attention = Norm(config.dim)
        self.attention = Attention(config.dim, config.heads, config.num_key_value_heads)
        self.norm_mlp = Norm(config.dim)
        self.mlp = MLP(config.dim, config.mlp_ratio)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: AttentionMask, *, cache: LayerCache | None, backend: Backend
    ) -> Tensor:
        """x [B, n, C] are positions 0 .. n - 1; a cache receives their keys and values."""
        query, key, value = self.attention.queries_keys_values(self.norm_attention(x), cos, sin)
        if cache is not None:
            cache.write(0, key, value)
        x = x + self.attention.output(attention(query, key, value, mask, backend=backend))
        return x + self.mlp(self.norm_mlp(x))

    def decode(
        self, x: Tensor, cos: Tensor, sin: Tensor, position: int | Tensor, *, cache: LayerCache, backend: Backend
    ) -> Tensor:
        """x [B, 1, C] is the one position `position`; the cache holds all before it and is extended in place."""
        query, key, value = self.attention.queries_keys_values(self.norm_attention(x), cos, sin)
        x = x + self.attention.output(decode_attention(query, key, value, cache, position, backend=backend))
        return x + self.mlp(self.norm_mlp(x))


class PriorOutput(NamedTuple):
    """Teacher-forced predictions.

    Attributes:
        text_logits: float [B, T - 1, V]; entry p predicts the text id at position p + 1.
        image_logits: float [B, I, K]; entry i predicts image code i.
    """

    text_logits: Tensor
    image_logits: Tensor


class Prior(nn.Module):
    """Predicts image codes after text ids.

    Args:
        config: sizes; see `PriorConfig`.
        attention_backend: how attention is computed; see `transformer.attention.attention`.
        checkpoint_activations: whether a pass with gradients keeps no more than what enters each block, and computes
            the rest once more on the way back (Chen et al. 2016, "Training deep nets with sublinear memory cost").

    Attributes:
        masks: the mask of each layer, first layer first.

    Example:
        >>> prior = Prior(PriorConfig(dim=32, depth=2, heads=2))
        >>> text = prior.null_text_ids()[None]
        >>> cache = prior.new_cache(1)
        >>> logits = prior.prefill(text, cache)  # for the first code
        >>> logits = prior.decode(logits.argmax(dim=1), 0, cache)  # for the second
        >>> logits.shape
        torch.Size([1, 1024])
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, config: PriorConfig, *, attention_backend: Backend = "auto", checkpoint_activations: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.attention_backend: Backend = attention_backend
        self.checkpoint_activations = checkpoint_activations
        self.layout = layout = config.layout
        self.masks = config.masks()
        self.text_embedding = nn.Embedding(layout.num_text_ids, config.dim)
        self.image_embedding = CodeTable(layout.codebook_size, layout.codebook_levels, config.dim)
        self.row_embedding = nn.Parameter(torch.zeros(layout.grid_height, config.dim))
        self.column_embedding = nn.Parameter(torch.zeros(layout.grid_width, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = Norm(config.dim)
        self.text_head = nn.Linear(config.dim, layout.num_text_ids, bias=False)
        self.image_head = CodeTable(layout.codebook_size, layout.codebook_levels, config.dim)
        angles = rotary_angles(layout, config.dim // config.heads, config.rope_theta)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Initializes every weight.

        ==========================================  =======================================
        linear layers reading the residual stream   N(0, 1/sqrt(inputs))
        linear layers writing to it                 zero, so that every block starts as identity
        heads                                       zero, so that the loss starts at ln V and ln K
        token embeddings                            N(0, 1)
        row and column embeddings                   zero
        norm gains                                  one
        query and key gains                         such that scores lie within +-MAX_SCORE
        ==========================================  =======================================
        """
        nn.init.normal_(self.text_embedding.weight)
        self.image_embedding.init_weights(std=1)
        for block in self.blocks:
            assert isinstance(block, Block)
            for linear in (block.attention.query_key_value, block.mlp.gate_up):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            for linear in (block.attention.project, block.mlp.down):
                nn.init.zeros_(linear.weight)
            for gain in (block.attention.query_gain, block.attention.key_gain):
                nn.init.constant_(gain, (MAX_SCORE / len(gain) ** 0.5) ** 0.5)
        nn.init.zeros_(self.text_head.weight)
        self.image_head.init_weights(std=0)

    def forward(self, text_ids: Tensor, image_codes: Tensor) -> PriorOutput:
        """Teacher-forced logits for text ids int64 [B, T] and image codes int64 [B, I].

        The last code is never an input: nothing follows it.

        Raises:
            ValueError: if a shape does not fit the layout.
        """
        layout = self.layout
        self._check("text_ids", text_ids, layout.text_len)
        self._check("image_codes", image_codes, layout.image_len)
        x = torch.cat([self.text_embedding(text_ids), self._embed_codes(image_codes[:, :-1], 0)], dim=1)
        x = self._run_blocks(x)  # [B, N - 1, C]
        text_logits = self.text_head(x[:, : layout.text_len - 1])
        image_logits = self.image_head.logits(x[:, layout.text_len - 1 :])
        return PriorOutput(text_logits, image_logits)

    def new_cache(self, batch_size: int, *, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `batch_size` rows, in the weights' dtype unless another is given."""
        weight = self.text_embedding.weight
        return self._empty_cache(batch_size, device=weight.device, dtype=dtype or weight.dtype)

    def cache_bytes_per_row(self, dtype: torch.dtype) -> int:
        """Memory that each row of a cache of this dtype takes."""
        return self._empty_cache(1, device=torch.device("meta"), dtype=dtype).num_bytes

    @torch.no_grad()
    def prefill(self, text_ids: Tensor, cache: KVCache) -> Tensor:
        """Feeds all text ids int64 [B, T]; returns the float32 [B, K] logits of image code 0."""
        self._check("text_ids", text_ids, self.layout.text_len)
        x = self._run_blocks(self.text_embedding(text_ids), cache=cache)
        return self.image_head.logits(x[:, -1]).float()

    @torch.no_grad()
    def decode(self, codes: Tensor, position: int | Tensor, cache: KVCache) -> Tensor:
        """Feeds image codes int64 [B], the ones at `position`; returns the float32 [B, K] logits of position + 1.

        Args:
            codes: the code of each row at `position`.
            position: 0-based place in the code grid, below I - 1. As an int32 tensor [1] on the model's GPU it is read
                there and not checked, so that one CUDA graph of this call serves all positions.
            cache: holds the text and all codes before `position`; extended in place.
        """
        if not isinstance(position, Tensor) and not 0 <= position < self.layout.image_len - 1:
            raise ValueError(f"position must lie in [0, {self.layout.image_len - 1}); got {position}")
        decoder = choose_decode_backend(
            device=codes.device,
            head_dim=self.config.dim // self.config.heads,
            dtype=cache.layers[0].keys.dtype,
            backend=self.attention_backend,
        )
        if decoder == "triton" and not isinstance(position, Tensor):
            position = torch.full((1,), position, dtype=torch.int32, device=codes.device)  # once, for all layers
        x = self._embed_codes(codes[:, None], position)  # [B, 1, C]
        place = self.layout.text_len + position
        at = place if isinstance(place, Tensor) else slice(place, place + 1)
        cos, sin = self.cos[at], self.sin[at]  # [1, D/4]
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            assert isinstance(block, Block)
            x = block.decode(x, cos, sin, place, cache=layer, backend=self.attention_backend)
        return self.image_head.logits(self.norm(x)[:, -1]).float()

    def null_text_ids(self) -> Tensor:
        """The ids of the empty caption, int64 [T]: the pad of every position."""
        layout = self.layout
        return torch.arange(layout.text_vocab_size, layout.num_text_ids, device=self.text_embedding.weight.device)

    def _embed_codes(self, codes: Tensor, first: int | Tensor) -> Tensor:
        """Codes int64 [B, n] at grid places first .. first + n - 1 to [B, n, C]."""
        place = torch.arange(codes.shape[1], device=codes.device) + first
        width = self.layout.grid_width
        where = self.row_embedding[place // width] + self.column_embedding[place % width]  # [n, C]
        # a sum of as many unit vectors, back at unit size like a text embedding
        scale = (1 + len(self.layout.codebook_levels)) ** -0.5
        return self.image_embedding(codes) * scale + where

    def _empty_cache(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> KVCache:
        return KVCache.empty(
            masks=self.masks,
            batch_size=batch_size,
            heads=self.config.num_key_value_heads,
            head_dim=self.config.dim // self.config.heads,
            device=device,
            dtype=dtype,
        )

    def _run_blocks(self, x: Tensor, *, cache: KVCache | None = None) -> Tensor:
        """x [B, n, C] are positions 0 .. n - 1."""
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        layers = [None] * len(self.masks) if cache is None else cache.layers
        for block, mask, layer in zip(self.blocks, self.masks, layers, strict=True):
            run = partial(block, cache=layer, backend=self.attention_backend)
            if self.checkpoint_activations and torch.is_grad_enabled():
                # nothing in a block is random
                x = checkpoint(run, x, cos, sin, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = run(x, cos, sin, mask)
        return self.norm(x)

    def _check(self, name: str, value: Tensor, length: int) -> None:
        if value.dim() != 2 or value.shape[1] != length:
            raise ValueError(f"{name} must have shape [batch, {length}]; got {tuple(value.shape)}")


def load(folder: ModelFolder, *, device: torch.device | str = "cpu", attention_backend: Backend = "auto") -> Prior:
    """The frozen prior of a model folder, in evaluation mode.

    Args:
        folder: the model.
        device: where the prior shall run.
        attention_backend: how attention is computed; see `transformer.attention.attention`.

    Raises:
        UserError: if the folder has no prior.
    """
    if not folder.has("prior"):
        raise UserError(f"{folder.path} has no prior part: train one with `tessera train-prior` or `tessera fit`")
    config = from_plain(PriorConfig, folder.config("prior"), source=f"{folder.path}/prior/config.yaml")
    prior = Prior(config, attention_backend=attention_backend)
    prior.load_state_dict(folder.tensors("prior"))
    return prior.eval().requires_grad_(False).to(device)
