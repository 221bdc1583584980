"""Which positions may attend to which: the masks of DALL-E (Ramesh et al. 2021, arXiv 2102.12092, appendix B.1).

Text attends causally to text, every image position attends to all of the text, and among image positions the kind
decides. A position always sees itself and never a later one.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tessera.errors import UserError

# T text positions, G = grid_width, i query position, j key position; N = T + grid_height * grid_width.

MaskKind = Literal["full", "row", "column", "conv"]


@dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """One mask over a sequence of text positions followed by a raster of image positions.

    Args:
        kind: full (plain causal), row (the G previous image positions in raster order, so the window reaches the
            position exactly above), column (the same column, rows up to one's own) or conv (a square window centered
            on the position, in raster order with wrap-around, its causal half).
        text_len: T, number of text positions.
        grid_height: rows of the image grid.
        grid_width: G, columns of the image grid.
        kernel_size: side of the conv window, odd.

    Raises:
        UserError: if a size is not positive or the kernel is even.
    """

    kind: MaskKind
    text_len: int
    grid_height: int
    grid_width: int
    kernel_size: int = 11

    def __post_init__(self) -> None:
        if self.text_len < 0 or self.grid_height < 1 or self.grid_width < 1:
            raise UserError(
                f"a mask needs text_len >= 0 and a grid of at least 1x1; "
                f"got {self.text_len} and {self.grid_height}x{self.grid_width}"
            )
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise UserError(f"the conv mask's kernel_size must be odd and positive; got {self.kernel_size}")

    @property
    def seq_len(self) -> int:
        """N, text and image positions together."""
        return self.text_len + self.grid_height * self.grid_width

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether positions `query` may attend to positions `key`: bool, broadcast of the two int64 tensors."""
        causal = key <= query
        if self.kind == "full":
            return causal
        query_image, key_image = query - self.text_len, key - self.text_len
        back = query_image - key_image  # raster distance, >= 0 where causal
        width = self.grid_width
        if self.kind == "row":
            near = back <= width
        elif self.kind == "column":
            near = back % width == 0
        else:
            half = self.kernel_size // 2
            rows_up, columns_right = torch.arange(half + 1), torch.arange(-half, half + 1)
            offsets = rows_up[:, None] * width - columns_right  # raster distances of the window, wrapping at the edges
            near = torch.isin(back, offsets.flatten().to(back.device))
        return causal & ((key_image < 0) | (query_image < 0) | near)

    def dense(self) -> Tensor:
        """The mask as bool [N, N], True where the row's position may attend to the column's."""
        position = torch.arange(self.seq_len)
        return self.allowed(position[:, None], position[None, :])


def layer_kinds(pattern: tuple[MaskKind, ...], depth: int) -> tuple[MaskKind, ...]:
    """The mask kind of each layer: the pattern repeated up to `depth`, its "conv" entry kept for the last layer.

    Repeating ("row", "column", "row", "row", "conv") gives the paper's schedule: row and column layers take turns and
    only the last layer convolves. A pattern without "conv" is simply repeated.
    """
    if not pattern:
        raise UserError("attention needs at least one mask kind: full, row, column or conv")
    body = tuple(kind for kind in pattern if kind != "conv")
    if len(body) == len(pattern) or not body:
        return tuple(pattern[layer % len(pattern)] for layer in range(depth))
    return (*(body[layer % len(body)] for layer in range(depth - 1)), "conv")
