"""What the masks look like: `python -m transformer.mask_pictures docs/masks.png` draws all kinds and modes.

`draw(mask).save("mask.png")` draws any one mask: the dense matrix with one row per query and one column per key, and
beside it the text and the grid with one query and all that it sees.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from tessera.errors import UserError, run_command
from tessera.one_line_parser import OneLineParser
from transformer.masks import AttentionMask

# N positions, T of them text, H x G image grid.

MAX_MATRIX_PIXELS = 8_000  # on a side: 192 MB in memory

_MARGIN, _ROW_GAP, _COLUMN_GAP = 20, 26, 44
_FONT_PIXELS, _NAME_FONT_PIXELS, _TITLE_FONT_PIXELS = 14, 16, 19
_LINE, _NAME_LINE, _TITLE_LINE = 19, 22, 26
_PANEL_GAP = 30  # between matrix and grid
_PART_GAP = 3  # between text and image
_MARK, _MARK_GAP = 8, 3  # the arrow that points at the query's row of the matrix
_LEAST_CELL, _MOST_CELL = 4, 22  # of the grid
_CELL_GAP = 2

_BACKGROUND = (250, 250, 248)
_TEXT = (38, 38, 42)
_FAINT_TEXT = (120, 120, 126)
# told apart by lightness as well as by hue, so that they stay apart for every kind of color vision and in gray
_LATER = (237, 237, 233)
_UNSEEN = (210, 210, 206)
_SEES_IMAGE = (58, 122, 190)
_SEES_TEXT = (240, 176, 64)
_QUERY = (24, 24, 30)

_LEGEND = (
    (_QUERY, "the query"),
    (_SEES_TEXT, "text that it sees"),
    (_SEES_IMAGE, "image that it sees"),
    (_UNSEEN, "earlier, not seen"),
    (_LATER, "later"),
)


class _Panels(NamedTuple):
    """The two pictures of one mask, uint8 [height, width, 3], and where in the matrix the query's row is."""

    matrix: NDArray[np.uint8]
    grid: NDArray[np.uint8]
    query_top: int


def draw(
    mask: AttentionMask, *, query: int | None = None, name: str = "", cell_pixels: int = 4, margin_pixels: int = _MARGIN
) -> Image.Image:
    """Draws a mask: its dense matrix, and beside it the grid with one query and the keys that it sees.

    Args:
        mask: the mask.
        query: the position that is shown in the grid, 0 to N - 1, text first; None takes one near the left edge in the
            lower part of the grid, where the modes differ most.
        name: what the mask is called; empty takes its kind and mode.
        cell_pixels: side of one pair in the matrix, at least 1.
        margin_pixels: empty border around all.

    Raises:
        UserError: there is no such position, or the matrix would have more than 8,000 pixels on a side.
    """
    if query is None:
        query = mask.text_len + 3 * mask.grid_height // 4 * mask.grid_width + mask.grid_width // 8
    if not 0 <= query < mask.seq_len:
        raise UserError(f"the mask has positions 0 to {mask.seq_len - 1}; got query {query}")
    if not 1 <= cell_pixels <= MAX_MATRIX_PIXELS // mask.seq_len:
        raise UserError(
            f"{mask.seq_len:,} positions at {cell_pixels} pixels do not fit a matrix of {MAX_MATRIX_PIXELS:,} pixels; "
            f"cell_pixels can be at most {MAX_MATRIX_PIXELS // mask.seq_len}"
        )
    panels = _panels(mask, query, cell_pixels)
    name_font, font = ImageFont.load_default(_NAME_FONT_PIXELS), ImageFont.load_default(_FONT_PIXELS)
    name = name or name_of(mask)
    share = mask.pairs() / (mask.seq_len * (mask.seq_len + 1) / 2)
    figures = f"{mask.pairs():,} pairs, {share:.0%} of the causal ones"
    head = _NAME_LINE + _LINE + 6
    left = _MARK + _MARK_GAP
    grid_left = left + panels.matrix.shape[1] + _PANEL_GAP
    width = max(
        grid_left + panels.grid.shape[1],
        left + math.ceil(name_font.getlength(name)),
        left + math.ceil(font.getlength(figures)),
    )
    picture = Image.new("RGB", (width, head + max(len(panels.matrix), len(panels.grid))), _BACKGROUND)
    canvas = ImageDraw.Draw(picture)
    canvas.text((left, 0), name, fill=_TEXT, font=name_font)
    canvas.text((left, _NAME_LINE), figures, fill=_FAINT_TEXT, font=font)
    picture.paste(Image.fromarray(panels.matrix), (left, head))
    picture.paste(Image.fromarray(panels.grid), (grid_left, head))
    middle = head + panels.query_top + (cell_pixels - 1) // 2
    canvas.polygon([(0, middle - _MARK // 2), (0, middle + _MARK // 2), (_MARK, middle)], fill=_QUERY)
    return ImageOps.expand(picture, margin_pixels, fill=_BACKGROUND)


def name_of(mask: AttentionMask) -> str:
    """What a mask is called: its kind, and its mode where the kind has several."""
    if mask.kind == "row":
        return f"row, {mask.row_mode}"
    if mask.kind == "conv":
        dilated = f", dilation {mask.dilation}" if mask.dilation > 1 else ""
        return f"conv, {mask.conv_mode}, {mask.kernel_size} x {mask.kernel_size}{dilated}"
    return mask.kind


def sheet(masks: dict[str, AttentionMask], *, columns: int = 2, title: str = "") -> Image.Image:
    """Pictures of several masks, by name, under one legend."""
    pictures = [draw(mask, name=name, margin_pixels=0) for name, mask in masks.items()]
    width = max(picture.width for picture in pictures)
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    heights = [max(picture.height for picture in row) for row in rows]
    title_font, font = ImageFont.load_default(_TITLE_FONT_PIXELS), ImageFont.load_default(_FONT_PIXELS)
    top = _MARGIN + _TITLE_LINE + 2 * _LINE + 16
    page = Image.new(
        "RGB",
        (
            2 * _MARGIN + columns * width + (columns - 1) * _COLUMN_GAP,
            top + sum(heights) + (len(rows) - 1) * _ROW_GAP + _MARGIN,
        ),
        _BACKGROUND,
    )
    canvas = ImageDraw.Draw(page)
    left = _MARGIN + _MARK + _MARK_GAP
    canvas.text((left, _MARGIN - 4), title, fill=_TEXT, font=title_font)
    y = _MARGIN + _TITLE_LINE
    explained = "left: one row per query, one column per key, text first; right: what the marked row's query sees"
    canvas.text((left, y - 2), explained, fill=_FAINT_TEXT, font=font)
    x, y = left, y + _LINE + 4
    for color, label in _LEGEND:
        canvas.rectangle((x, y + 2, x + 12, y + 14), fill=color)
        canvas.text((x + 20, y), label, fill=_TEXT, font=font)
        x += 20 + round(font.getlength(label)) + 26
    y = top
    for row, height in zip(rows, heights, strict=True):
        for place, picture in enumerate(row):
            page.paste(picture, (_MARGIN + place * (width + _COLUMN_GAP), y))
        y += height + _ROW_GAP
    return page


def _panels(mask: AttentionMask, query: int, cell_pixels: int) -> _Panels:
    colors = _colors(mask)  # [N, N, 3]
    colors[query, query] = _QUERY
    cuts = list(range(mask.text_len, mask.seq_len, mask.grid_width))  # where rows of the grid start
    gaps = dict.fromkeys(cuts, 1) | ({mask.text_len: _PART_GAP} if mask.text_len else {0: 0})
    matrix = _with_gaps(_with_gaps(colors, gaps, cell_pixels).swapaxes(0, 1), gaps, cell_pixels).swapaxes(0, 1)
    query_top = query * cell_pixels + sum(size for cut, size in gaps.items() if cut <= query)
    seen = colors[query]  # [N, 3]
    rows = -(-mask.text_len // mask.grid_width) + mask.grid_height
    cell = min(max(len(matrix) // rows - _CELL_GAP, _LEAST_CELL), _MOST_CELL)
    text = _lattice(seen[: mask.text_len], mask.grid_width, cell)
    image = _lattice(seen[mask.text_len :], mask.grid_width, cell)
    gap = np.full((4 * _CELL_GAP if mask.text_len else 0, image.shape[1], 3), _BACKGROUND, np.uint8)
    return _Panels(np.ascontiguousarray(matrix), np.concatenate([text, gap, image]), query_top)


def _colors(mask: AttentionMask) -> NDArray[np.uint8]:
    """The color of every pair, uint8 [N, N, 3]."""
    allowed = mask.dense().numpy()
    colors = np.full((*allowed.shape, 3), _LATER, np.uint8)
    colors[np.tril(np.ones_like(allowed))] = _UNSEEN
    is_text = np.arange(mask.seq_len) < mask.text_len
    colors[allowed & is_text] = _SEES_TEXT
    colors[allowed & ~is_text] = _SEES_IMAGE
    return colors


def _with_gaps(rows: NDArray[np.uint8], gaps: dict[int, int], cell_pixels: int) -> NDArray[np.uint8]:
    """Rows [n, ...] repeated, with lines of background before those that `gaps` names."""
    parts = []
    for index, row in enumerate(rows):
        parts.append(np.broadcast_to(np.array(_BACKGROUND, np.uint8), (gaps.get(index, 0), *row.shape)))
        parts.append(np.broadcast_to(row, (cell_pixels, *row.shape)))
    return np.concatenate(parts)


def _lattice(colors: NDArray[np.uint8], columns: int, cell: int) -> NDArray[np.uint8]:
    """Cells [n, 3] in reading order as squares with gaps, uint8 [height, width, 3]."""
    rows = -(-len(colors) // columns)
    padded = np.full((rows * columns, 3), _BACKGROUND, np.uint8)
    padded[: len(colors)] = colors
    squares = np.full((rows, cell + _CELL_GAP, columns, cell + _CELL_GAP, 3), _BACKGROUND, np.uint8)
    squares[:, :cell, :, :cell] = padded.reshape(rows, 1, columns, 1, 3)
    picture = squares.reshape(rows * (cell + _CELL_GAP), columns * (cell + _CELL_GAP), 3)
    return picture[:, : picture.shape[1] - _CELL_GAP]


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = OneLineParser(prog="python -m transformer.mask_pictures", description=__doc__)
    parser.add_argument("out", type=Path, help="the picture to write, such as docs/masks.png")
    out: Path = parser.parse_args(list(argv)).out
    settings = {"text_len": 4, "grid_height": 8, "grid_width": 8, "kernel_size": 5}
    masks = {
        "full": AttentionMask(kind="full", **settings),
        "column": AttentionMask(kind="column", **settings),
        "row, window (the paper)": AttentionMask(kind="row", **settings),
        "row, own_row (DALLE-pytorch)": AttentionMask(kind="row", row_mode="own_row", **settings),
        "conv, raster (the paper)": AttentionMask(kind="conv", **settings),
        "conv, clip": AttentionMask(kind="conv", conv_mode="clip", **settings),
        "conv, quadrant (DALLE-pytorch)": AttentionMask(kind="conv", conv_mode="quadrant", **settings),
        "conv, torus (ru-dalle)": AttentionMask(kind="conv", conv_mode="torus", **settings),
    }
    if not out.parent.is_dir():
        raise UserError(f"there is no folder {out.parent} to write {out.name} into")
    sheet(masks, title="Which positions see which: 4 of text, then an 8 x 8 image; 5 x 5 convolutions").save(out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
