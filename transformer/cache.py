"""The key-value cache of the prior: a value that the caller owns and hands to `prefill` and `decode`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transformer.cache_layout import CacheLayout
from transformer.masks import AttentionMask

# B rows, Hkv key-value heads, S slots, D head width; n positions at a time.


@dataclass(frozen=True, eq=False)
class LayerCache:
    """Keys and values of one layer.

    Attributes:
        keys: [B, Hkv, S, D]; slots not yet written hold zeros.
        values: [B, Hkv, S, D].
        layout: which slot holds which position.
    """

    keys: Tensor
    values: Tensor
    layout: CacheLayout

    def write(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values [B, Hkv, n, D] of positions start .. start + n - 1, in place.

        Positions are stored in ascending order from call to call: each takes the slot of one that no later position
        attends to. Of more positions than a ring holds the last ones are kept.

        Raises:
            ValueError: if the mask has no such positions.
        """
        mask, end = self.layout.mask, start + keys.shape[2]
        if not 0 <= start <= end <= mask.seq_len:
            raise ValueError(f"positions must lie in [0, {mask.seq_len}); got {start} to {end - 1}")
        if end - start == 1:
            slot = self.layout.slot(start)
            self.keys[:, :, slot : slot + 1] = keys
            self.values[:, :, slot : slot + 1] = values
            return
        text_end = min(end, mask.text_len)
        if start < text_end:
            self.keys[:, :, start:text_end] = keys[:, :, : text_end - start]
            self.values[:, :, start:text_end] = values[:, :, : text_end - start]
        first = max(start, mask.text_len, end - self.layout.image_slots)  # of the image positions that are kept
        if first < end:
            slots = self.layout.slots(torch.arange(first, end, device=self.keys.device))
            self.keys[:, :, slots] = keys[:, :, first - start :].to(self.keys.dtype)
            self.values[:, :, slots] = values[:, :, first - start :].to(self.values.dtype)

    def expand(self, index: Tensor) -> "LayerCache":
        """A new cache whose row b is a copy of row index[b]."""
        return LayerCache(self.keys.index_select(0, index), self.values.index_select(0, index), self.layout)


@dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of all layers.

    Attributes:
        layers: one cache per layer, first layer first.
    """

    layers: tuple[LayerCache, ...]

    @classmethod
    def empty(
        cls,
        *,
        masks: Sequence[AttentionMask],
        batch_size: int,
        heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        spare: int = 0,
    ) -> "KVCache":
        """A cache of zeros.

        Args:
            masks: the mask of each layer.
            batch_size: B, rows.
            heads: Hkv, heads of keys and values.
            head_dim: D, channels of a head.
            device: where it lies.
            dtype: of keys and values.
            spare: how many positions may be stored ahead of the one that attends.
        """
        layers = []
        for layout in (CacheLayout(mask, spare) for mask in masks):
            shape = (2, batch_size, heads, layout.num_slots, head_dim)
            keys, values = torch.zeros(shape, device=device, dtype=dtype).unbind(0)
            layers.append(LayerCache(keys, values, layout))
        return cls(tuple(layers))

    @property
    def num_bytes(self) -> int:
        """Memory that keys and values take."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def row(self, index: int) -> "KVCache":
        """A view of one row, as a cache of one row."""
        return KVCache(
            tuple(
                LayerCache(layer.keys[index : index + 1], layer.values[index : index + 1], layer.layout)
                for layer in self.layers
            )
        )

    def expand(self, index: Tensor) -> "KVCache":
        """A new cache whose row b is a copy of row index[b]: candidates of a prompt start from its one prefix."""
        return KVCache(tuple(layer.expand(index) for layer in self.layers))
