"""What a dVAE does, as pictures: rows of reconstructions and a wall of codes. Arrays in, uint8 arrays out.

Nothing here knows about models. Small images are enlarged by a whole factor, so that every pixel stays a square.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tessera.data.order import mix
from tessera.errors import UserError

# N images, H W image pixels, h w code grid, K codebook size, f side in pixels of what one code stands for.

MAX_SIDE_PIXELS = 16_000  # most viewers and the web refuse larger pictures
DIFFERENCE_GAIN = 4

Order = Literal["use", "index"]

_GAP = 4  # pixels between the panels of a bare strip
_MARGIN, _ROW_GAP, _COLUMN_GAP = 20, 14, 12
_FONT_PIXELS, _TITLE_FONT_PIXELS = 14, 19
_LINE, _TITLE_LINE = 19, 26
_LEAST_WIDTH = 620  # narrower sheets would break their headers into many lines
_WIDE = 1_800  # wider sheets have larger headers: they are shrunk to the screen before they are read
_TILE_GAP, _TILE_ROW_GAP = 5, 9
_BAR_HEIGHT, _BAR_GAP = 4, 2

_BACKGROUND = (250, 250, 248)
_FRAME = (222, 222, 218)
_TEXT = (38, 38, 42)
_FAINT_TEXT = (120, 120, 126)
_BAR, _BAR_TRACK = (52, 92, 150), (226, 226, 222)
_DEAD = (190, 60, 50)
_DEAD_SHARE = 0.25  # how much of a dead code's colors is left

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def code_map(codes: NDArray[np.integer], height: int, width: int) -> NDArray[np.uint8]:
    """Codes [h, w] as a picture uint8 [H, W, 3]: every code a color of its own, equal codes equal colors."""
    hashed = mix(codes, 0)
    colors = np.stack([(hashed >> np.uint64(shift)) & np.uint64(0xFF) for shift in (0, 8, 16)], axis=-1).astype(
        np.uint8
    )
    return np.asarray(Image.fromarray(colors).resize((width, height), Image.Resampling.NEAREST))


def difference(original: NDArray[np.uint8], reconstruction: NDArray[np.uint8], *, gain: int = 1) -> NDArray[np.uint8]:
    """The absolute difference of two images uint8 [H, W, 3], `gain` times as bright, white where that exceeds 255."""
    distance = np.abs(original.astype(np.int32) - reconstruction.astype(np.int32))
    return (gain * distance).clip(0, 255).astype(np.uint8)


def sheet(
    original: NDArray[np.uint8], reconstruction: NDArray[np.uint8], codes: NDArray[np.integer], *, scale: int = 1
) -> NDArray[np.uint8]:
    """Four panels side by side without a word, uint8 [scale * H, ..., 3]: original, reconstruction, difference, codes.

    The difference is as it is, nothing brighter: there is no header that could say so.
    """
    panels = _panels(original, reconstruction, codes, gain=1, scale=scale)
    gap = np.full((len(panels[0]), _GAP, 3), 255, np.uint8)
    return np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)


def sheet_of_rows(
    originals: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
    reconstructions: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
    codes: Sequence[NDArray[np.integer]] | NDArray[np.integer],
    *,
    scale: int = 1,
    gain: int = DIFFERENCE_GAIN,
    decibels: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    title: str = "",
) -> NDArray[np.uint8]:
    """One row per image under a header that names the columns: original, reconstruction, difference, codes.

    Args:
        originals: N images uint8 [H, W, 3], one array or several; sizes may differ from row to row.
        reconstructions: of the same images, in the same sizes.
        codes: of the same images, integers [h, w].
        scale: whole factor by which pixels are enlarged, at least 1.
        gain: factor of the difference, at least 1. A reconstruction worth looking at is off by a few of 255 gray
            levels, which is black to the eye; the header names the factor, the same for every sheet of a run, so that
            sheets can be compared.
        decibels: PSNR of each row, written below it.
        names: of each row, written below it.
        title: lines above the header.

    Returns:
        uint8 [height, width, 3].

    Raises:
        ValueError: nothing to show, lists of different lengths, or images that do not belong together.
        UserError: the sheet would have more than 16,000 pixels on a side.
    """
    _check_rows(originals, reconstructions, codes, decibels, names)
    rows = [_panels(*row, gain=gain, scale=scale) for row in zip(originals, reconstructions, codes, strict=True)]
    shown_names = [""] * len(rows) if names is None else names
    figures = [""] * len(rows) if decibels is None else [f"{value:.1f} dB" for value in decibels]
    captions = [f"{name}   {figure}".strip() for name, figure in zip(shown_names, figures, strict=True)]
    font = ImageFont.load_default(_FONT_PIXELS)
    heads = ["original", "reconstruction", f"difference x{gain}" if gain > 1 else "difference", "codes"]
    panel_width = max(panels[0].shape[1] for panels in rows)
    column_width = max(panel_width, *(round(font.getlength(head)) for head in heads))
    width = 2 * _MARGIN + 4 * column_width + 3 * _COLUMN_GAP
    caption_height = _LINE if any(captions) else 0
    heights = [len(panels[0]) + caption_height + _ROW_GAP for panels in rows]

    page = _Page(width, title=title, lines=(), body_height=_LINE + sum(heights) - _ROW_GAP)
    left = [_MARGIN + column * (column_width + _COLUMN_GAP) for column in range(4)]
    y = page.body_top
    for x, head in zip(left, heads, strict=True):
        page.draw.text((x, y), head, fill=_FAINT_TEXT, font=font)
    y += _LINE
    for panels, caption, height in zip(rows, captions, heights, strict=True):
        for x, panel in zip(left, panels, strict=True):
            page.paste_framed(panel, x, y)
        fitted = _shortened(caption, width - 2 * _MARGIN, font)
        page.draw.text((_MARGIN, y + len(panels[0]) + 1), fitted, fill=_TEXT, font=font)
        y += height
    return page.pixels()


def most_rows(panel_pixels: int) -> int:
    """How many rows with panels of so many pixels in height fit one sheet of rows with names and a title."""
    around = 2 * _MARGIN + 2 * _TITLE_LINE + _ROW_GAP + _LINE
    return max(1, (MAX_SIDE_PIXELS - around) // (panel_pixels + _LINE + _ROW_GAP))


def codebook_sheet(
    tiles: NDArray[np.uint8],
    codes: NDArray[np.integer],
    counts: NDArray[np.integer] | None,
    *,
    order: Order = "use",
    columns: int | None = None,
    title: str = "",
    lines: Sequence[str] = (),
) -> NDArray[np.uint8]:
    """A tile per code with a bar for its uses on a logarithmic scale; codes that were never used are crossed out.

    Sorted by use, the dead codes stand in a block of their own at the end; sorted by index, in their places. To the
    left of a row stand the uses of its first code, or that code's index.

    Args:
        tiles: what each shown code looks like, uint8 [n, f, f, 3].
        codes: which codes these are, integers [n], in the order in which they are shown.
        counts: uses of every code of the codebook, integers [K]; None where nothing was counted.
        order: how `codes` are sorted.
        columns: tiles per row; None makes the sheet somewhat wider than high.
        title: the headline.
        lines: text below the headline.

    Returns:
        uint8 [height, width, 3].

    Raises:
        ValueError: no tiles, arrays that do not belong together, or an order by use without uses.
        UserError: the sheet would have more than 16,000 pixels on a side.
    """
    _check_tiles(tiles, codes, counts, order)
    uses = None if counts is None else counts[codes]
    cells = _cells(tiles, uses, scale=_tile_scale(len(tiles), tiles.shape[1]))  # [n, height, width, 3]
    cell_height, cell_width = cells.shape[1:3]
    if columns is None:
        columns = round((1.5 * len(tiles) * cell_height / cell_width) ** 0.5)
    columns = min(max(1, columns), len(tiles))
    alive = len(tiles) if uses is None or order == "index" else int(np.count_nonzero(uses))
    walls = [_wall(part, columns) for part in (cells[:alive], cells[alive:]) if len(part)]

    font = ImageFont.load_default(_FONT_PIXELS)
    numbers = codes if uses is None or order == "index" else uses
    labels = [f"{number:,}" for number in numbers[:alive:columns]]
    left = _MARGIN + round(max((font.getlength(label) for label in labels), default=0)) + 8
    page = _Page(
        max(left + columns * cell_width + _MARGIN, _LEAST_WIDTH),
        title=title,
        lines=lines,
        body_height=sum(map(len, walls)) + (len(walls) - 1) * (_ROW_GAP + _LINE),
    )
    y = page.body_top
    for row, label in enumerate(labels):
        place = left - 8 - font.getlength(label), y + row * cell_height + (cell_height - _LINE) // 2 - _BAR_HEIGHT
        page.draw.text(place, label, fill=_FAINT_TEXT, font=font)
    if alive:
        page.paste(walls[0], left, y)
        y += len(walls[0]) + _ROW_GAP
    if counts is not None and alive < len(tiles):
        shown, dead = len(tiles) - alive, np.count_nonzero(counts == 0)
        head = f"never used: {shown:,}" if shown == dead else f"never used: {shown:,} of {dead:,} such codes"
        page.draw.text((_MARGIN, y - 4), head, fill=_DEAD, font=font)
        page.paste(walls[-1], left, y + _LINE)
    return page.pixels()


class _Page:
    """An empty sheet with its headline and lines; draw below `body_top`."""

    def __init__(self, width: int, *, title: str, lines: Sequence[str], body_height: int) -> None:
        enlarged = max(1.0, width / _WIDE)
        title_font, font = (ImageFont.load_default(enlarged * size) for size in (_TITLE_FONT_PIXELS, _FONT_PIXELS))
        title_line, line_height = round(enlarged * _TITLE_LINE), round(enlarged * _LINE)
        inner = width - 2 * _MARGIN
        title_lines = _wrapped(title, inner, title_font)
        text_lines = [part for line in lines for part in _wrapped(line, inner, font)]
        head = len(title_lines) * title_line + len(text_lines) * line_height
        self.body_top = _MARGIN + (head + _ROW_GAP if head else 0)
        height = self.body_top + body_height + _MARGIN
        if max(width, height) > MAX_SIDE_PIXELS:
            raise UserError(
                f"a sheet of {width:,}x{height:,} pixels is too large, "
                f"expected at most {MAX_SIDE_PIXELS:,} on a side: show fewer"
            )
        self._picture = Image.new("RGB", (width, height), _BACKGROUND)
        self.draw = ImageDraw.Draw(self._picture)
        y = _MARGIN - 4  # a line of text has its own air above
        for line in title_lines:
            self.draw.text((_MARGIN, y), line, fill=_TEXT, font=title_font)
            y += title_line
        for line in text_lines:
            self.draw.text((_MARGIN, y), line, fill=_FAINT_TEXT, font=font)
            y += line_height

    def paste(self, pixels: NDArray[np.uint8], x: int, y: int) -> None:
        self._picture.paste(Image.fromarray(pixels), (x, y))

    def paste_framed(self, pixels: NDArray[np.uint8], x: int, y: int) -> None:
        height, width = pixels.shape[:2]
        self.draw.rectangle((x - 1, y - 1, x + width, y + height), outline=_FRAME)  # white images need an edge
        self.paste(pixels, x, y)

    def pixels(self) -> NDArray[np.uint8]:
        return np.array(self._picture)


def _panels(
    original: NDArray[np.uint8],
    reconstruction: NDArray[np.uint8],
    codes: NDArray[np.integer],
    *,
    gain: int,
    scale: int,
) -> list[NDArray[np.uint8]]:
    height, width = original.shape[:2]
    pictures = (
        original,
        reconstruction,
        difference(original, reconstruction, gain=gain),
        code_map(codes, height, width),
    )
    return [picture.repeat(scale, axis=0).repeat(scale, axis=1) for picture in pictures]


def _tile_scale(num_tiles: int, side: int) -> int:
    """The whole factor that makes tiles as large as their number allows."""
    wanted = 48 if num_tiles <= 300 else 32 if num_tiles <= 2_500 else 24
    return max(1, wanted // side)


def _cells(tiles: NDArray[np.uint8], uses: NDArray[np.integer] | None, *, scale: int) -> NDArray[np.uint8]:
    """Tiles with a frame, a bar below, and air around, uint8 [n, height, width, 3]; tiles without uses crossed out."""
    pictures = tiles.repeat(scale, axis=1).repeat(scale, axis=2)
    num_tiles, side = pictures.shape[:2]
    bar_top = 1 + side + _BAR_GAP
    height = bar_top + (0 if uses is None else _BAR_HEIGHT) + _TILE_ROW_GAP
    cells = np.empty((num_tiles, height, side + _TILE_GAP, 3), np.uint8)
    cells[:] = _BACKGROUND
    cells[:, : side + 2, : side + 2] = _FRAME  # white tiles need an edge
    if uses is not None:
        dead = uses == 0
        background = np.array(_BACKGROUND)
        pictures[dead] = (background + _DEAD_SHARE * (pictures[dead] - background)).round().astype(np.uint8)
        diagonal = np.eye(side, dtype=bool)
        pictures[dead[:, None, None] & (diagonal | diagonal[::-1])] = _DEAD
        lengths = np.ceil(side * np.log1p(uses) / np.log1p(max(1, uses.max())))  # [n]
        filled = np.arange(side) < lengths[:, None]  # [n, side]
        bars = np.where(filled[..., None], _BAR, _BAR_TRACK)
        cells[~dead, bar_top : bar_top + _BAR_HEIGHT, 1 : 1 + side] = bars[~dead, None]
    cells[:, 1 : 1 + side, 1 : 1 + side] = pictures
    return cells


def _wall(cells: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Cells [n, height, width, 3] in reading order as one picture."""
    _, height, width, _ = cells.shape
    rows = -(-len(cells) // columns)
    grid = np.empty((rows * columns, height, width, 3), np.uint8)
    grid[:] = _BACKGROUND
    grid[: len(cells)] = cells
    return grid.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def _wrapped(text: str, width_pixels: int, font: _Font) -> list[str]:
    """Text in lines no wider than `width_pixels`, broken between words; a longer word stays whole."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width_pixels:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _shortened(text: str, width_pixels: int, font: _Font) -> str:
    """Text that fits: what is too much goes from its beginning, because names of files differ most at their ends."""
    if font.getlength(text) <= width_pixels:
        return text
    cut = bisect_left(range(len(text)), True, key=lambda start: font.getlength("..." + text[start:]) <= width_pixels)
    return "..." + text[cut:]


def _check_rows(
    originals: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
    reconstructions: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
    codes: Sequence[NDArray[np.integer]] | NDArray[np.integer],
    decibels: Sequence[float] | None,
    names: Sequence[str] | None,
) -> None:
    given = {"originals": originals, "reconstructions": reconstructions, "codes": codes}
    given |= {name: values for name, values in (("decibels", decibels), ("names", names)) if values is not None}
    lengths = {name: len(values) for name, values in given.items()}
    if not len(originals) or len(set(lengths.values())) > 1:
        raise ValueError(f"a sheet needs at least one row and as many of each kind; got {lengths}")
    for original, reconstruction, grid in zip(originals, reconstructions, codes, strict=True):
        for image in (original, reconstruction):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"expected uint8 images [H, W, 3]; got {image.dtype} {list(image.shape)}")
        if original.shape != reconstruction.shape:
            raise ValueError(
                f"an image and its reconstruction need one size; "
                f"got {list(original.shape)} and {list(reconstruction.shape)}"
            )
        if grid.ndim != 2 or grid.dtype.kind not in "iu":
            raise ValueError(f"expected integer codes [h, w] for each image; got {grid.dtype} {list(grid.shape)}")


def _check_tiles(
    tiles: NDArray[np.uint8], codes: NDArray[np.integer], counts: NDArray[np.integer] | None, order: Order
) -> None:
    if tiles.dtype != np.uint8 or tiles.ndim != 4 or tiles.shape[1] != tiles.shape[2] or tiles.shape[3] != 3:
        raise ValueError(f"expected square uint8 tiles [n, f, f, 3]; got {tiles.dtype} {list(tiles.shape)}")
    if not len(tiles) or codes.shape != (len(tiles),):
        raise ValueError(f"expected a code for each of at least one tile; got {list(codes.shape)} for {len(tiles)}")
    if counts is not None and (codes.min() < 0 or codes.max() >= len(counts)):
        raise ValueError(f"codes must lie in [0, {len(counts)}), where counts are; got {codes.min()} to {codes.max()}")
    if order == "use" and (counts is None or (np.diff(counts[codes]) > 0).any()):
        raise ValueError("expected codes sorted by use, the most used first; got another order, or no counts")
