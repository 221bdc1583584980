"""A prior prepared for decoding: what `Prior.prefill` and `Prior.decode` compute, arranged for one token at a time.

At batch 1 a small prior spends its time on reading weights and on the number of operations. So the weights are stored
for few rows (`transformer.frozen_linear`), the gains of norms are multiplied into the matrices behind them, the vectors
of codes are summed once, and the channels of each head are ordered so that turning them takes one roll.

A row's result does not depend on the other rows where `row_independent` is true; on CPUs it always is.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from transformer.attention import Backend, attend_to_cache, attend_to_stored, attention
from transformer.cache import KVCache
from transformer.frozen_linear import FrozenLinear, Storage
from transformer.masks import AttentionMask
from transformer.model import Block, Prior, SequenceLayout

# R rows, P prompts, T text positions, n codes known of each, I image positions, L layers, C width, D head width,
# H heads, Hkv heads of keys and values, K codebook size.


_SERIAL_NUMBERS = 32_768  # up to so many PyTorch works on in one thread


class _Layer(NamedTuple):
    """The matrices of one block."""

    query_key_value: FrozenLinear
    project: FrozenLinear
    gate_up: FrozenLinear
    down: FrozenLinear


class Decoder:
    """Predicts one code after another; frozen, for inference only.

    Args:
        prior: in evaluation mode; its weights are copied, later changes of them are not seen.
        weights: how matrices are stored, but for the head, which is fp32, as the logits are. With bf16 and int8, GPUs
            compute in bf16 between them, CPUs in fp32.
        row_independent: whether prompts are prefilled one at a time, so that no row depends on another; None does so
            on CPUs. On GPUs the rows of `decode` depend on their number all the same, which the caller has to fix.

    Attributes:
        layout: of the sequence.
        masks: of each layer, first layer first.
        device: where it runs.
        dtype: of what is computed between the matrices, and of the cache.

    Example:
        >>> from transformer.model import PriorConfig
        >>> decoder = Decoder(Prior(PriorConfig(dim=32, depth=2, heads=2)))
        >>> cache = decoder.new_cache(1)
        >>> logits = decoder.prefill(decoder.null_text_ids()[None], cache)[:, -1]  # for the first code
        >>> logits = decoder.decode(logits.argmax(dim=1), 0, cache)  # for the second
        >>> logits.shape
        torch.Size([1, 1024])
    """

    def __init__(self, prior: Prior, *, weights: Storage = "fp32", row_independent: bool | None = None) -> None:
        config = prior.config
        self.layout: SequenceLayout = prior.layout
        self.masks: tuple[AttentionMask, ...] = prior.masks
        self.attention_backend: Backend = prior.attention_backend
        self.heads, self.key_value_heads = config.heads, config.num_key_value_heads
        self.dim, self.head_dim = config.dim, config.dim // config.heads
        self.weights: Storage = weights
        self.device = prior.text_embedding.weight.device
        on_cpu = self.device.type == "cpu"
        self.row_independent = on_cpu if row_independent is None else row_independent
        self.dtype = torch.float32 if on_cpu or weights == "fp32" else torch.bfloat16
        with torch.no_grad():
            self._copy(prior)

    def _copy(self, prior: Prior) -> None:
        quarters = torch.arange(self.head_dim, device=self.device).view(4, -1)
        # pairs that turn lie half a head apart, each beside channels that do not turn
        order = quarters[[0, 2, 1, 3]].flatten()  # [D]
        first, second = prior.cos, prior.sin  # [N, D/4]
        still = torch.ones_like(first)
        self._cos = torch.cat([first, still, first, still], dim=1).to(self.dtype)  # [N, D]
        self._sin = torch.cat([-second, still * 0, second, still * 0], dim=1).to(self.dtype)
        self._layers, gains = [], []
        for block in prior.blocks:
            assert isinstance(block, Block)
            source = block.attention
            split = [self.heads, self.key_value_heads, self.key_value_heads]
            by_head = (source.query_key_value.weight * block.norm_attention.weight).unflatten(0, (-1, self.head_dim))
            query, key, value = by_head.split(split)  # [heads, D, C] each
            query_key_value = torch.cat([query[:, order], key[:, order], value]).flatten(0, 1)
            self._layers.append(
                _Layer(
                    FrozenLinear(query_key_value, storage=self.weights),
                    FrozenLinear(source.project.weight, storage=self.weights),
                    FrozenLinear(block.mlp.gate_up.weight * block.norm_mlp.weight, storage=self.weights),
                    FrozenLinear(block.mlp.down.weight, storage=self.weights),
                )
            )
            query_gain = source.query_gain[order] / math.sqrt(self.head_dim)  # the scale of the scores
            key_gain = source.key_gain[order]
            gains.append(torch.cat([query_gain.expand(self.heads, -1), key_gain.expand(self.key_value_heads, -1)]))
        self._gains = torch.stack(gains).to(self.dtype)  # [L, H + Hkv, D]
        self._rolled_gains = self._gains.roll(self.head_dim // 2, dims=-1)
        self._head = FrozenLinear(prior.image_head.vectors() * prior.norm.weight)  # fp32, and so are the logits
        layout = self.layout
        scale = (1 + len(layout.codebook_levels)) ** -0.5  # as in Prior
        self._code_vectors = (prior.image_embedding.vectors() * scale).to(self.dtype)  # [K, C]
        where = prior.row_embedding[:, None] + prior.column_embedding[None]  # [h, w, C]
        self._where = where.flatten(0, 1).to(self.dtype)  # [I, C]
        self._text_vectors = prior.text_embedding.weight.to(self.dtype, copy=True)

    def new_cache(self, rows: int, *, spare: int = 0) -> KVCache:
        """An empty cache for so many rows; `decode_window` needs one position to spare for each of its drafts."""
        return self._empty_cache(rows, self.device, spare)

    @property
    def cache_bytes_per_row(self) -> int:
        """Memory that each row of a cache takes."""
        return self._empty_cache(1, torch.device("meta")).num_bytes

    @property
    def weight_bytes(self) -> int:
        """Memory of the matrices that each step reads."""
        return sum(matrix.num_bytes for layer in self._layers for matrix in layer) + self._head.num_bytes

    def null_text_ids(self) -> Tensor:
        """The ids of the empty caption, int64 [T]."""
        return torch.arange(self.layout.text_vocab_size, self.layout.num_text_ids, device=self.device)

    @torch.inference_mode()
    def prefill(self, text_ids: Tensor, cache: KVCache, codes: Tensor | None = None) -> Tensor:
        """Feeds all text ids int64 [P, T] and the first codes int64 [P, n], n < I.

        Args:
            text_ids: int64 [P, T].
            cache: empty, for P rows; filled in place.
            codes: the first codes of each image, if some are known.

        Returns:
            Logits float32 [P, n + 1, K] of image positions 0 .. n.

        Raises:
            ValueError: a shape does not fit the layout.
        """
        layout = self.layout
        if text_ids.dim() != 2 or text_ids.shape[1] != layout.text_len:
            raise ValueError(f"text_ids must have shape [prompts, {layout.text_len}]; got {tuple(text_ids.shape)}")
        if codes is None:
            codes = text_ids.new_zeros(len(text_ids), 0)
        if codes.dim() != 2 or len(codes) != len(text_ids) or codes.shape[1] >= layout.image_len:
            raise ValueError(
                f"codes must have shape [{len(text_ids)}, fewer than {layout.image_len}]; got {tuple(codes.shape)}"
            )
        x = F.embedding(text_ids, self._text_vectors)  # [P, T, C]
        x = torch.cat([x, F.embedding(codes, self._code_vectors) + self._where[: codes.shape[1]]], dim=1)
        if not self.row_independent:
            return self._prefill(x, cache)
        return torch.cat([self._prefill(x[row : row + 1], cache.row(row)) for row in range(len(x))])

    @torch.inference_mode()
    def decode(self, codes: Tensor, position: int | Tensor, cache: KVCache) -> Tensor:
        """Feeds image codes int64 [R], the ones at `position`; returns the float32 [R, K] logits of position + 1.

        Nothing is checked: it runs in a loop.

        Args:
            codes: the code of each row at `position`.
            position: 0-based place in the code grid, below I - 1; with Triton's kernel an int32 tensor [1] on the GPU,
                which is read there, so that one CUDA graph serves all positions.
            cache: holds the text and all codes before `position`; extended in place.
        """
        place = position + self.layout.text_len
        x = F.embedding(codes, self._code_vectors) + self._where[position]  # [R, C]
        turn, cross = self._gains * self._cos[place], self._rolled_gains * self._sin[place]  # [L, H + Hkv, D]
        for layer, own_turn, own_cross, layer_cache in zip(
            self._layers, turn.unbind(), cross.unbind(), cache.layers, strict=True
        ):
            query, key, value = self._queries_keys_values(x, layer, own_turn, own_cross)  # [R, heads, D]
            attended = attend_to_cache(
                query[:, :, None],
                key[:, :, None],
                value[:, :, None],
                layer_cache,
                place,
                backend=self.attention_backend,
                scale=1.0,
            )
            x = x + layer.project(attended.reshape(x.shape))
            x = x + self._mlp(x, layer)
        return self._logits(x)

    @torch.inference_mode()
    def decode_window(self, codes: Tensor, position: int, cache: KVCache) -> Tensor:
        """`decode` for several positions in a row, on a CPU: one pass over the weights, the same logits bit for bit.

        Args:
            codes: int64 [R, W], those at position .. position + W - 1.
            position: 0-based place of the first of them; position + W < I.
            cache: of W - 1 positions to spare; holds the text and all codes before `position`. What is stored of drafts
                that prove wrong is stored again by the pass that knows better.

        Returns:
            Logits float32 [R, W, K] of position + 1 .. position + W.
        """
        width, place = codes.shape[1], position + self.layout.text_len
        x = F.embedding(codes, self._code_vectors) + self._where[position : position + width]  # [R, W, C]
        turn = self._gains[:, None] * self._cos[place : place + width, None]  # [L, W, H + Hkv, D]
        cross = self._rolled_gains[:, None] * self._sin[place : place + width, None]
        for layer, own_turn, own_cross, layer_cache in zip(
            self._layers, turn.unbind(), cross.unbind(), cache.layers, strict=True
        ):
            query, key, value = self._queries_keys_values(x, layer, own_turn, own_cross)  # [R, W, heads, D]
            layer_cache.write(place, key.transpose(1, 2), value.transpose(1, 2))
            # One position after the other, as `decode` has it: their keys differ in number, and sums in rounding.
            attended = [
                attend_to_stored(query[:, offset, :, None], layer_cache, place + offset, scale=1.0)
                for offset in range(width)
            ]
            x = x + _on_rows(layer.project, torch.stack(attended, dim=1).view(x.shape))
            x = x + self._mlp(x, layer)
        return self._logits(x)

    def _prefill(self, x: Tensor, cache: KVCache) -> Tensor:
        """x [P, T + n, C] to logits [P, n + 1, K]."""
        length = x.shape[1]
        cos, sin = self._cos[:length, None], self._sin[:length, None]  # [T + n, 1, D]
        for index, (layer, mask, layer_cache) in enumerate(zip(self._layers, self.masks, cache.layers, strict=True)):
            turn, cross = self._gains[index] * cos, self._rolled_gains[index] * sin  # [T + n, H + Hkv, D]
            heads = self._queries_keys_values(x, layer, turn, cross)  # [P, T + n, heads, D] each
            query, key, value = (tensor.transpose(1, 2) for tensor in heads)
            layer_cache.write(0, key, value)
            attended = attention(query, key, value, mask, backend=self.attention_backend, scale=1.0)
            x = x + _on_rows(layer.project, attended.transpose(1, 2).flatten(2))
            x = x + self._mlp(x, layer)
        return self._logits(x[:, self.layout.text_len - 1 :])

    def _queries_keys_values(
        self, x: Tensor, layer: _Layer, turn: Tensor, cross: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., C] to rotated queries [..., H, D] and keys [..., Hkv, D], and values [..., Hkv, D]."""
        heads = _on_rows(layer.query_key_value, F.layer_norm(x, (self.dim,))).unflatten(-1, (-1, self.head_dim))
        both, value = heads.split([self.heads + self.key_value_heads, self.key_value_heads], dim=-2)
        both = F.layer_norm(both, (self.head_dim,))
        both = torch.addcmul(both * turn, both.roll(self.head_dim // 2, dims=-1), cross)
        query, key = both.split([self.heads, self.key_value_heads], dim=-2)
        return query, key, value

    def _mlp(self, x: Tensor, layer: _Layer) -> Tensor:
        gate, up = _on_rows(layer.gate_up, F.layer_norm(x, (self.dim,))).chunk(2, dim=-1)
        return _on_rows(layer.down, self._silu(gate) * up)

    def _silu(self, gate: Tensor) -> Tensor:
        """PyTorch divides long tensors among threads anywhere, and the ends of the parts round in another way."""
        if not self.row_independent or gate.numel() <= _SERIAL_NUMBERS:
            return F.silu(gate)
        rows = gate.flatten(0, -2)
        parts = rows.split(max(1, _SERIAL_NUMBERS // rows.shape[1]))
        return torch.cat([F.silu(part) for part in parts]).view(gate.shape)

    def _logits(self, x: Tensor) -> Tensor:
        return _on_rows(self._head, F.layer_norm(x, (self.dim,)).float())

    def _empty_cache(self, rows: int, device: torch.device, spare: int = 0) -> KVCache:
        return KVCache.empty(
            masks=self.masks,
            batch_size=rows,
            heads=self.key_value_heads,
            head_dim=self.head_dim,
            device=device,
            dtype=self.dtype,
            spare=spare,
        )


def _on_rows(matrix: FrozenLinear, x: Tensor) -> Tensor:
    """[..., K] to [..., N]."""
    return matrix(x) if x.dim() == 2 else matrix(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
