"""Which positions may attend to which: the masks of DALL-E (Ramesh et al. 2021, arXiv 2102.12092, appendix B.1).

Text attends causally to text, every image position attends to all of the text, and among image positions the kind
decides. A position always sees itself and never a later one.
"""

from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tessera.errors import UserError
from transformer.block_lists import BlockLists, block_lists

# T text positions, H x G the image grid (height x width), N = T + H * G; q query position, k key position.

MaskKind = Literal["full", "row", "column", "conv"]
RowMode = Literal["window", "own_row"]
ConvMode = Literal["raster", "clip", "quadrant", "torus"]

_ROWS_AT_ONCE = 1024  # of the dense mask, where only its sum is wanted


@dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """One mask over a sequence of text positions followed by a raster of image positions.

    Frozen and hashable: what is derived from a mask is cached under it. `transformer.mask_pictures.draw` draws it.

    Args:
        kind: full (plain causality), row, column (the same column, rows up to one's own) or conv (a square window).
        text_len: T, number of text positions, >= 0.
        grid_height: H, rows of the image grid.
        grid_width: G, columns of the image grid.
        row_mode: of kind row. window (the paper): the G previous image positions in raster order, so that the window
            reaches the position exactly above. own_row (DALLE-pytorch's axial attention): one's own row only.
        conv_mode: of kind conv, what becomes of the causal half of the window at the grid's edges. raster (the paper):
            offsets count along the raster, so that the window wraps into the neighboring row. clip: it ends there.
            quadrant (DALLE-pytorch): the window has its lower right corner, not its center, on the position, and ends
            at the edges. torus (ru-dalle): both axes wrap onto themselves.
        kernel_size: side of the conv window, odd unless the mode is quadrant.
        dilation: distance between neighbors of the conv window.

    Attributes:
        code: all of this in one string, the form in which a mask passes through PyTorch's operators and compiler.

    Raises:
        UserError: if a size is not positive, a name is unknown or the kernel is even.
    """

    kind: MaskKind
    text_len: int
    grid_height: int
    grid_width: int
    row_mode: RowMode = "window"
    conv_mode: ConvMode = "raster"
    kernel_size: int = 11
    dilation: int = 1
    code: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        values = [getattr(self, each.name) for each in fields(self) if each.init]
        object.__setattr__(self, "code", " ".join(map(str, values)))  # the class is frozen
        for name, names in (("kind", MaskKind), ("row_mode", RowMode), ("conv_mode", ConvMode)):
            if getattr(self, name) not in get_args(names):
                raise UserError(f"a mask's {name} is one of {', '.join(get_args(names))}; got {getattr(self, name)!r}")
        if self.text_len < 0 or self.grid_height < 1 or self.grid_width < 1:
            raise UserError(
                f"a mask needs text_len >= 0 and a grid of at least 1x1; "
                f"got {self.text_len} and {self.grid_height}x{self.grid_width}"
            )
        if self.kernel_size < 1 or (self.kernel_size % 2 == 0 and self.conv_mode != "quadrant"):
            raise UserError(f"the conv mask's kernel_size must be odd and positive; got {self.kernel_size}")
        if self.dilation < 1:
            raise UserError(f"the conv mask's dilation must be at least 1; got {self.dilation}")

    @property
    def image_len(self) -> int:
        """Image positions, H * G."""
        return self.grid_height * self.grid_width

    @property
    def seq_len(self) -> int:
        """N, text and image positions together."""
        return self.text_len + self.image_len

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether positions `query` may attend to positions `key`: bool, broadcast of the two integer tensors.

        Made of integer arithmetic only, so that it serves as FlexAttention's `mask_mod` too.
        """
        causal = key <= query
        if self.kind == "full":
            return causal
        return causal & ((key < self.text_len) | self._near(query - self.text_len, key - self.text_len))

    def _near(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether an image position's key lies within the kind's reach; both count from the first image position."""
        width = self.grid_width
        if self.kind == "row":
            return query - key <= width if self.row_mode == "window" else query // width == key // width
        if self.kind == "column":
            return (query - key) % width == 0
        half, step = self.kernel_size // 2, self.dilation
        if self.conv_mode == "raster":
            # offsets step * (rows_up * G - columns_right) with 0 <= rows_up <= half, |columns_right| <= half
            back = (query - key) // step
            on_lattice = (query - key) % step == 0
            return on_lattice & (back <= half * (width + 1)) & ((back + half) % width <= 2 * half)
        rows_up = query // width - key // width
        columns_left = query % width - key % width
        if self.conv_mode == "torus":
            near_row = _near_on_ring(rows_up, self.grid_height, half, step)
            return near_row & _near_on_ring(columns_left, width, half, step)
        on_lattice = (rows_up % step == 0) & (columns_left % step == 0)
        if self.conv_mode == "quadrant":
            reach = (self.kernel_size - 1) * step
            return on_lattice & (rows_up <= reach) & (columns_left >= 0) & (columns_left <= reach)
        reach = half * step
        return on_lattice & (rows_up <= reach) & (columns_left >= -reach) & (columns_left <= reach)

    def dense(self, length: int | None = None) -> Tensor:
        """The mask of the first `length` positions (None: all), bool [length, length], True where q may attend to k."""
        position = torch.arange(self.checked_length(length))
        return self.allowed(position[:, None], position[None, :])

    def pairs(self, length: int | None = None) -> int:
        """How many pairs (query, key) of the first `length` positions (None: all) the mask allows."""
        return _pairs(self, self.checked_length(length))

    def checked_length(self, length: int | None) -> int:
        """How many positions, from the first on, are meant: all for None.

        Raises:
            ValueError: if the mask has no such number.
        """
        if length is not None and not 0 <= length <= self.seq_len:
            raise ValueError(f"a length must lie in [0, {self.seq_len}], the mask's positions; got {length}")
        return self.seq_len if length is None else length

    @property
    def reach(self) -> int:
        """The largest distance in raster order from an image position back to an image position that it attends to."""
        return _reach(self)

    def block_lists(
        self, block_q: int, block_k: int, *, length: int | None = None, transposed: bool = False
    ) -> BlockLists:
        """Which blocks hold allowed pairs, text and image cut into blocks separately; cached.

        Args:
            block_q: query positions of a block.
            block_k: key positions of a block.
            length: positions from the first one on; None takes all.
            transposed: list the query blocks of each key block, not the key blocks of each query block.
        """
        if block_q < 1 or block_k < 1:
            raise ValueError(f"blocks need at least one position; got {block_q} and {block_k}")
        return _block_lists(self, block_q, block_k, self.checked_length(length), transposed)

    @classmethod
    def from_code(cls, code: str) -> "AttentionMask":
        """The mask with that `code`."""
        return _from_code(cls, code)


def _near_on_ring(difference: Tensor, size: int, half: int, step: int) -> Tensor:
    """Whether two places on a ring of `size` lie at most `half` steps apart, either way round and less than once."""
    forward = difference % size
    backward = size - forward
    return ((forward % step == 0) & (forward <= half * step)) | ((backward % step == 0) & (backward <= half * step))


@lru_cache(maxsize=256)
def _pairs(mask: AttentionMask, length: int) -> int:
    key = torch.arange(length, device="cpu")
    rows = key.split(_ROWS_AT_ONCE)
    return sum(int(mask.allowed(row[:, None], key[None, :]).sum()) for row in rows)


@lru_cache(maxsize=256)
def _reach(mask: AttentionMask) -> int:
    height, width = mask.grid_height, mask.grid_width
    if mask.kind == "row":
        return width - 1 if mask.row_mode == "own_row" else min(width, mask.image_len - 1)
    if mask.kind == "column":
        return (height - 1) * width
    if mask.kind == "full":
        return mask.image_len - 1
    side = mask.kernel_size - 1 if mask.conv_mode == "quadrant" else mask.kernel_size // 2
    steps = range(0, side * mask.dilation + 1, mask.dilation)
    if mask.conv_mode == "raster":
        # every offset that fits into the image is one that its last position has
        backs = [up * width + sign * across for up in steps for across in steps for sign in (-1, 1)]
        return max(back for back in backs if back < mask.image_len)
    ups = [up for up in steps if up < height]
    lefts = [left for left in steps if left < width]
    if mask.conv_mode == "torus":
        ups += [height - up for up in ups if up]
        lefts += [width - left for left in lefts if left]
    return max(ups) * width + max(lefts)


@lru_cache(maxsize=256)
def _block_lists(mask: AttentionMask, block_q: int, block_k: int, length: int, transposed: bool) -> BlockLists:
    if transposed:
        return block_lists(
            lambda key, query: mask.allowed(query, key), length, mask.text_len, outer=block_k, inner=block_q
        )
    return block_lists(mask.allowed, length, mask.text_len, outer=block_q, inner=block_k)


@lru_cache(maxsize=256)
def _from_code(cls: type[AttentionMask], code: str) -> AttentionMask:
    named = zip((each.name for each in fields(cls) if each.init), code.split(), strict=True)
    options: dict[str, Any] = {name: int(value) if value.isdecimal() else value for name, value in named}
    return cls(**options)


def layer_kinds(pattern: tuple[MaskKind, ...], depth: int) -> tuple[MaskKind, ...]:
    """The mask kind of each layer: the pattern repeated up to `depth`, its "conv" entry kept for the last layer.

    Repeating ("row", "column", "row", "row", "conv") gives the paper's schedule: the second of every four layers
    looks along columns, the others along rows, and only the last layer convolves. A pattern without "conv" is simply
    repeated.
    """
    if not pattern:
        raise UserError("attention needs at least one mask kind: full, row, column or conv")
    body = tuple(kind for kind in pattern if kind != "conv")
    if len(body) == len(pattern) or not body:
        return tuple(pattern[layer % len(pattern)] for layer in range(depth))
    return (*(body[layer % len(body)] for layer in range(depth - 1)), "conv")
