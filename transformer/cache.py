"""The key-value cache of the prior: a value that the caller owns and hands to `prefill` and `decode`.

Each layer keeps no more than its mask can still reach, where possible side by side. Text comes first, a slot for each
position. Behind it lies the image:

    row, conv   in a ring of as many slots as the mask reaches back, and one: position i in slot i modulo their number
    column      column by column
    full        in raster order

A ring whose mask reaches back over the whole image is raster order, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from transformer.masks import AttentionMask

# B rows, Hkv key-value heads, S slots, D head width; T text positions, H x G the image grid, N = T + H * G positions,
# n of them at a time.

_Place = TypeVar("_Place", int, Tensor)


@dataclass(frozen=True)
class CacheLayout:
    """Which slot holds which position under one mask.

    Hashable: what is derived from a layout is cached under it.

    Args:
        mask: the layer's mask.
    """

    mask: AttentionMask

    @property
    def image_slots(self) -> int:
        """Slots for image positions."""
        return self.mask.reach + 1 if self.mask.kind in ("row", "conv") else self.mask.image_len

    @property
    def num_slots(self) -> int:
        """S, slots for text and image positions together."""
        return self.mask.text_len + self.image_slots

    def slot(self, position: int) -> int:
        """The slot of a position, 0 <= position < N."""
        text_len = self.mask.text_len
        return position if position < text_len else text_len + self._image_slot(position - text_len)

    def slots(self, positions: Tensor) -> Tensor:
        """The slots of positions int64 [n]."""
        text_len = self.mask.text_len
        return torch.where(positions < text_len, positions, text_len + self._image_slot(positions - text_len))

    def visible_slots(self, position: int, device: torch.device) -> Tensor:
        """Where the positions lie that `position` attends to, itself included, once it is stored.

        Args:
            position: text or image, 0 <= position < N.
            device: where the answer is wanted.

        Returns:
            int64 [keys], ascending by position.
        """
        key = torch.arange(position + 1, device="cpu")
        is_allowed = self.mask.allowed(torch.tensor(position, device="cpu"), key)
        return self.slots(key[is_allowed]).to(device)

    def visible(self, position: int, device: torch.device) -> slice | Tensor:
        """`visible_slots` as an index, cached: a slice where the slots lie together, which costs no copy of them.

        They do for full and row at every position, for column and conv in places only. Attention does not depend on the
        order of its keys, so that a slice may run through a ring that has come round.
        """
        return _visible(self, position, device)

    def _image_slot(self, place: _Place) -> _Place:
        """Slots of image positions, both counted from the first one."""
        if self.mask.kind == "column":
            width = self.mask.grid_width
            return place % width * self.mask.grid_height + place // width
        return place % self.image_slots


@lru_cache(maxsize=2**16)  # a round through all positions must fit, or it would never find what it stored
def _visible(layout: CacheLayout, position: int, device: torch.device) -> slice | Tensor:
    # made in inference mode, the cached index would be useless to a caller who wants gradients
    with torch.inference_mode(False):
        slots = layout.visible_slots(position, device)
        first, last = int(slots.min()), int(slots.max())
        return slice(first, last + 1) if last - first + 1 == len(slots) else slots


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
    ) -> "KVCache":
        """A cache of zeros.

        Args:
            masks: the mask of each layer.
            batch_size: B, rows.
            heads: Hkv, heads of keys and values.
            head_dim: D, channels of a head.
            device: where it lies.
            dtype: of keys and values.
        """
        layers = []
        for layout in map(CacheLayout, masks):
            shape = (2, batch_size, heads, layout.num_slots, head_dim)
            keys, values = torch.zeros(shape, device=device, dtype=dtype).unbind(0)
            layers.append(LayerCache(keys, values, layout))
        return cls(tuple(layers))

    @property
    def num_bytes(self) -> int:
        """Memory that keys and values take."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def expand(self, index: Tensor) -> "KVCache":
        """A new cache whose row b is a copy of row index[b]: candidates of a prompt start from its one prefix."""
        return KVCache(tuple(layer.expand(index) for layer in self.layers))
