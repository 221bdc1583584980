"""Where a layer's cache keeps each position: no more slots than the mask can still reach, side by side where possible.

Text comes first, a slot for each position. Behind it lies the image:

    row, conv   in a ring of as many slots as the mask reaches back, and one: position i in slot i modulo their number;
                with a few to spare where positions are stored ahead, for these must not cover what is still in reach
    column      column by column
    full        in raster order

A ring whose mask reaches back over the whole image is raster order, too.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from transformer.masks import AttentionMask

# T text positions, H x G the image grid, N = T + H * G positions, n of them at a time.

_Place = TypeVar("_Place", int, Tensor)


@dataclass(frozen=True)
class CacheLayout:
    """Which slot holds which position under one mask.

    Hashable: what is derived from a layout is cached under it.

    Args:
        mask: the layer's mask.
        spare: how many positions may be stored ahead of the one that attends.
    """

    mask: AttentionMask
    spare: int = 0

    @property
    def image_slots(self) -> int:
        """Slots for image positions."""
        if self.mask.kind not in ("row", "conv"):
            return self.mask.image_len
        return min(self.mask.reach + 1 + self.spare, self.mask.image_len)

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
