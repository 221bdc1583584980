"""Sheets of pictures: a grid with a caption under each image.

Arrays in, one PIL picture out; nothing here knows about models. Small images are enlarged by a whole factor, so that
every pixel of the original stays a square.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tessera.errors import UserError

MARGIN_PIXELS = 24
GAP_PIXELS = 16
FONT_PIXELS = 15
TITLE_FONT_PIXELS = 22
MAX_CAPTION_LINES = 4
MAX_SIDE_PIXELS = 16_000  # most viewers and the web refuse larger pictures
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_BACKGROUND = (250, 250, 248)
_FRAME = (222, 222, 218)
_TEXT = (38, 38, 42)
_FAINT_TEXT = (120, 120, 126)


class Tile(NamedTuple):
    """One image of a sheet and what stands below it."""

    image: np.ndarray
    """uint8 [H, W, 3]; all tiles of a sheet have the same size."""
    caption: str = ""
    """Wrapped to the width of the image, cut after four lines."""
    note: str = ""
    """One line in a fainter color below the caption, such as a score."""


def contact_sheet(
    tiles: Sequence[Tile], *, columns: int | None = None, tile_pixels: int = 192, title: str = ""
) -> Image.Image:
    """Lay tiles out in a grid, in reading order.

    Args:
        tiles: at least one, images of one size.
        columns: tiles per row; None makes the sheet about as wide as high.
        tile_pixels: images narrower than this are enlarged by the largest whole factor that fits; larger ones are kept.
        title: a line or two above the grid.

    Returns:
        An RGB picture.

    Raises:
        UserError: no tiles, images of different sizes, or a sheet beyond 16,000 pixels on a side.
    """
    if not tiles:
        raise UserError("a contact sheet needs at least one image, got none")
    height, width = _common_size(tiles)
    factor = max(1, tile_pixels // max(height, width))
    width, height = width * factor, height * factor
    if columns is None:
        columns = math.ceil(math.sqrt(len(tiles)))
    columns = min(max(1, columns), len(tiles))
    rows = math.ceil(len(tiles) / columns)

    font = ImageFont.load_default(FONT_PIXELS)
    texts = [_tile_lines(tile, width, font) for tile in tiles]
    line_height = round(FONT_PIXELS * 1.3)
    text_heights = [  # of each row: its longest text decides
        max(len(lines) for lines in texts[row * columns : (row + 1) * columns]) * line_height for row in range(rows)
    ]
    sheet_width = 2 * MARGIN_PIXELS + columns * width + (columns - 1) * GAP_PIXELS
    title_font = ImageFont.load_default(TITLE_FONT_PIXELS)
    title_lines = wrap(title, sheet_width - 2 * MARGIN_PIXELS, title_font, max_lines=2)
    title_height = round(len(title_lines) * TITLE_FONT_PIXELS * 1.3) + (GAP_PIXELS if title_lines else 0)
    sheet_height = 2 * MARGIN_PIXELS + title_height + sum(text_heights) + rows * height + (rows - 1) * GAP_PIXELS
    sheet_height += rows * (GAP_PIXELS // 2)  # between an image and its text
    if max(sheet_width, sheet_height) > MAX_SIDE_PIXELS:
        raise UserError(
            f"a sheet of {len(tiles)} images would have {sheet_width}x{sheet_height} pixels, "
            f"expected at most {MAX_SIDE_PIXELS} on a side: take fewer images"
        )

    sheet = Image.new("RGB", (sheet_width, sheet_height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    y = MARGIN_PIXELS
    for line in title_lines:
        draw.text((MARGIN_PIXELS, y), line, fill=_TEXT, font=title_font)
        y += round(TITLE_FONT_PIXELS * 1.3)
    y = MARGIN_PIXELS + title_height
    for row in range(rows):
        for column in range(columns):
            place = row * columns + column
            if place >= len(tiles):
                break
            x = MARGIN_PIXELS + column * (width + GAP_PIXELS)
            draw.rectangle((x - 1, y - 1, x + width, y + height), outline=_FRAME)  # white images need an edge
            picture = Image.fromarray(tiles[place].image)
            sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
            text_y = y + height + GAP_PIXELS // 2
            for line, color in texts[place]:
                draw.text((x, text_y), line, fill=color, font=font)
                text_y += line_height
        y += height + GAP_PIXELS // 2 + text_heights[row] + GAP_PIXELS
    return sheet


def wrap(text: str, width_pixels: int, font: Font, *, max_lines: int) -> list[str]:
    """Break text into lines no wider than `width_pixels`; an ellipsis ends the last one where text is left over."""
    lines: list[str] = []
    current = ""
    for word in text.split():
        joined = f"{current} {word}" if current else word
        if font.getlength(joined) <= width_pixels:
            current = joined
            continue
        if current:
            lines.append(current)
        current = word
        while font.getlength(current) > width_pixels and len(current) > 1:  # a word wider than the image is cut
            cut = len(current) - 1
            while cut > 1 and font.getlength(current[:cut]) > width_pixels:
                cut -= 1
            lines.append(current[:cut])
            current = current[cut:]
    if current:
        lines.append(current)
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(last + "...") > width_pixels:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], last.rstrip() + "..."]
    return lines


def _tile_lines(tile: Tile, width_pixels: int, font: Font) -> list[tuple[str, tuple[int, int, int]]]:
    lines = [(line, _TEXT) for line in wrap(tile.caption, width_pixels, font, max_lines=MAX_CAPTION_LINES)]
    return lines + [(line, _FAINT_TEXT) for line in wrap(tile.note, width_pixels, font, max_lines=1)]


def _common_size(tiles: Sequence[Tile]) -> tuple[int, int]:
    """(height, width) of all images, or UserError."""
    for tile in tiles:
        if tile.image.dtype != np.uint8 or tile.image.ndim != 3 or tile.image.shape[2] != 3:
            raise UserError(f"expected uint8 images [H, W, 3], got {tile.image.dtype} {list(tile.image.shape)}")
        if tile.image.shape != tiles[0].image.shape:
            raise UserError(
                f"the images of a sheet need one size, got {list(tiles[0].image.shape)} and {list(tile.image.shape)}"
            )
    height, width, _ = tiles[0].image.shape
    return height, width
