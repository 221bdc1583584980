"""Outpainting: extend an image beyond the prior's grid by a window of the grid's size that slides over a larger canvas.

Each window holds codes that are already there and draws the rest (Esser et al. 2021, section 3.2, slide a window in the
same way). The prior is causal in raster order, so a drawn code sees the codes above it and to its left in the window,
and no others. It follows that

    downward  every new code sees all old codes of its window: this goes on best;
    right     every new code sees the old codes to its left and above;
    left      every new code sees the old codes of the rows above only;
    upward    no new code sees any old one. The image above is drawn blindly.

Hence right and down come first, so that left and up find the largest known neighborhood, and hence for left and up one
should draw several candidates of each window and keep the one that makes the known codes after it most likely: the
log-likelihood of the known codes, not of the drawn ones, tells whether they go on from what was drawn.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sampling.decode import sample_codes
from sampling.editing import Known, forced_codes
from sampling.settings import SamplingSettings
from tessera.errors import UserError
from transformer.decoder import Decoder

# n images, T text tokens, h w code grid of the prior, h' w' code grid of the canvas.

# Window number i draws from stream OUTPAINTING_STREAM + i of its image: with one stream for all of them, equal places
# of different windows would draw by the same random number.
OUTPAINTING_STREAM = 2

MAX_SIDE_CELLS = 512  # of a canvas: decoding it takes memory in proportion to its area


class Margins(NamedTuple):
    """How many cells to add on each side, >= 0."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0


class Window(NamedTuple):
    """One place of the sliding window, in cells of the canvas."""

    top: int
    left: int
    rows: range
    """With `columns`, the cells that this window draws; all others in it are known by then."""
    columns: range


class Canvas(NamedTuple):
    """Codes of n images that grow window by window; a value: `fill` returns a new one."""

    codes: Tensor
    """int64 [n, h', w']; zero where nothing is known yet."""
    known: Tensor
    """bool [h', w'], the same for all images."""
    grid: tuple[int, int]
    """(h, w), the size of a window."""


class Outpainted(NamedTuple):
    """n extended images."""

    codes: Tensor
    """int64 [n, h', w']."""
    context_log_likelihood: Tensor
    """Of the known codes of all windows in nats, float64 [n]: how well what was drawn fits them."""


def parse_margins(text: str) -> Margins:
    """Read margins as the command line gives them, such as "right=4,bottom=2".

    Raises:
        UserError: another form, a side that does not exist or comes twice, or no cell to add.
    """
    sides: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z]+)\s*=\s*([0-9]{1,6})\s*", part, flags=re.ASCII)
        if match is None or match[1] not in Margins._fields:
            raise UserError(
                f"cannot read margin {part.strip()!r}: expected left, top, right or bottom with a number of cells, "
                "such as right=4,bottom=2"
            )
        if match[1] in sides:
            raise UserError(f"margin {match[1]} is given twice in {text!r}")
        sides[match[1]] = int(match[2])
    margins = Margins(**sides)
    if not any(margins):
        raise UserError(f"margins {text!r} add nothing: expected at least one cell on one side")
    return margins


def plan_windows(grid: tuple[int, int], margins: Margins, *, step: int | None = None) -> list[Window]:
    """The windows that draw every new cell of a canvas exactly once, in the order in which to draw them.

    Right, bottom, left, top: see the module. The known cells are a rectangle that grows strip by strip. A strip is at
    most `step` cells wide and lies at the far edge of its windows, so that they hold as many known cells as possible.
    Along a strip windows go from top to bottom or from left to right: the prior sees what is above and to the left.

    Args:
        grid: (h, w), cells of the prior's grid, at least 2 each.
        margins: cells to add around an image of one grid.
        step: most new rows or columns per window, from 1 to the grid's shorter side less 1. Smaller steps let each new
            cell see more and need more windows. None takes half the grid in each direction.

    Returns:
        Windows that lie within the canvas, each of which holds cells known before it; none without margins.

    Raises:
        UserError: grid, margins or step are out of range.
    """
    height, width = grid
    _check_plan(grid, margins, step)
    row_step, column_step = (height // 2, width // 2) if step is None else (step, step)
    canvas_height, canvas_width = _canvas_size(grid, margins)
    known_rows = range(margins.top, margins.top + height)
    known_columns = range(margins.left, margins.left + width)
    windows: list[Window] = []
    for columns in _chunks(range(known_columns.stop, canvas_width), column_step):
        windows += _down_strip(columns.stop - width, columns, known_rows, height, row_step)
    known_columns = range(known_columns.start, canvas_width)
    for rows in _chunks(range(known_rows.stop, canvas_height), row_step):
        windows += _along_strip(rows.stop - height, rows, known_columns, width, column_step)
    known_rows = range(known_rows.start, canvas_height)
    for columns in _chunks_back(range(known_columns.start), column_step):
        windows += _down_strip(columns.start, columns, known_rows, height, row_step)
    known_columns = range(canvas_width)
    for rows in _chunks_back(range(known_rows.start), row_step):
        windows += _along_strip(rows.start, rows, known_columns, width, column_step)
    return windows


def new_canvas(codes: Tensor, margins: Margins) -> Canvas:
    """A canvas with n images in their place and nothing around them.

    Args:
        codes: int64 [n, h, w], whole grids of the prior.
        margins: cells to add on each side.

    Raises:
        UserError: the codes have another shape, or the margins are out of range.
    """
    if codes.ndim != 3 or codes.is_floating_point():
        raise UserError(f"codes are {codes.dtype} {tuple(codes.shape)}, expected integers [n, h, w]")
    num_images, height, width = codes.shape
    _check_plan((height, width), margins, None)
    canvas_height, canvas_width = _canvas_size((height, width), margins)
    canvas = codes.new_zeros(num_images, canvas_height, canvas_width)
    known = torch.zeros(canvas_height, canvas_width, dtype=torch.bool, device=codes.device)
    rows = slice(margins.top, margins.top + height)
    columns = slice(margins.left, margins.left + width)
    canvas[:, rows, columns] = codes
    known[rows, columns] = True
    return Canvas(canvas, known, (height, width))


def window_known(canvas: Canvas, window: Window) -> list[Known]:
    """What the n images know inside a window, each [h, w]."""
    rows, columns = _view(canvas, window)
    return [Known(codes, canvas.known[rows, columns]) for codes in canvas.codes[:, rows, columns]]


def fill(canvas: Canvas, window: Window, codes: Tensor) -> Canvas:
    """The canvas with the codes int64 [n, h, w] of a window; only the cells that the window draws are taken from them.

    Raises:
        UserError: the codes have another shape.
    """
    rows, columns = _view(canvas, window)
    expected = canvas.codes[:, rows, columns].shape
    if codes.shape != expected:
        raise UserError(f"codes of the window have shape {tuple(codes.shape)}, expected {tuple(expected)}")
    drawn = torch.zeros_like(canvas.known)  # [h', w']
    drawn[window.rows.start : window.rows.stop, window.columns.start : window.columns.stop] = True
    filled = canvas.codes.clone()
    filled[:, rows, columns] = torch.where(drawn[rows, columns], codes.to(filled), filled[:, rows, columns])
    return Canvas(filled, canvas.known | drawn, canvas.grid)


@torch.inference_mode()
def draw_canvas(
    decoder: Decoder,
    canvas: Canvas,
    windows: Sequence[Window],
    text_ids: Tensor,
    *,
    settings: SamplingSettings,
    seed: int,
    num_candidates: int = 1,
    max_rows: int | None = None,
    on_window: Callable[[int], None] = lambda number: None,
) -> Outpainted:
    """Draw what is new of n images, window by window.

    Args:
        decoder: the prior.
        canvas: the n images, from `new_canvas`.
        windows: from `plan_windows`, for the same margins.
        text_ids: int64 [T], the prompt of all windows.
        settings: how to draw.
        seed: of all images.
        num_candidates: how many each image draws in each window, >= 1; it goes on with the one that makes the window's
            known codes most likely.
        max_rows: see `sampling.decode.sample_steps`.
        on_window: called with the number of windows done.

    Returns:
        The codes, and how likely the known ones were.
    """
    num_images, count = len(canvas.codes), len(canvas.codes) * num_candidates
    fit = torch.zeros(num_images, dtype=torch.float64)
    for number, window in enumerate(windows):
        known = [own for own in window_known(canvas, window) for _ in range(num_candidates)]
        sampled = sample_codes(
            decoder,
            text_ids.expand(count, -1),
            settings=settings,
            seeds=torch.full((count,), seed),
            image_index=torch.arange(count),
            forced=forced_codes(known),
            stream=OUTPAINTING_STREAM + number,
            max_rows=max_rows,
        )
        fits = sampled.context_log_likelihood.cpu().reshape(num_images, num_candidates)
        best = fits.argmax(dim=1)  # [n]
        codes = sampled.codes.cpu().reshape(num_images, num_candidates, *canvas.grid)
        canvas = fill(canvas, window, codes[torch.arange(num_images), best])
        fit += fits.amax(dim=1)
        on_window(number + 1)
    return Outpainted(canvas.codes, fit)


def _check_plan(grid: tuple[int, int], margins: Margins, step: int | None) -> None:
    if min(grid) < 2:
        raise UserError(f"a grid of {grid[0]}x{grid[1]} cells cannot slide: expected at least 2 cells on each side")
    for side, cells in margins._asdict().items():
        if cells < 0:
            raise UserError(f"margin {side} is {cells} cells, expected at least 0")
    if max(_canvas_size(grid, margins)) > MAX_SIDE_CELLS:
        height, width = _canvas_size(grid, margins)
        raise UserError(f"a canvas of {height}x{width} cells, expected at most {MAX_SIDE_CELLS} on a side")
    if step is not None and not 1 <= step < min(grid):
        raise UserError(
            f"step is {step} cells, expected 1 to {min(grid) - 1}: windows of {grid[0]}x{grid[1]} cells must overlap"
        )


def _canvas_size(grid: tuple[int, int], margins: Margins) -> tuple[int, int]:
    return margins.top + grid[0] + margins.bottom, margins.left + grid[1] + margins.right


def _view(canvas: Canvas, window: Window) -> tuple[slice, slice]:
    height, width = canvas.grid
    return slice(window.top, window.top + height), slice(window.left, window.left + width)


def _chunks(cells: range, step: int) -> list[range]:
    """Cells from first to last, `step` at a time."""
    return [cells[start : start + step] for start in range(0, len(cells), step)]


def _chunks_back(cells: range, step: int) -> list[range]:
    """Cells from last to first, `step` at a time."""
    return [cells[max(0, stop - step) : stop] for stop in range(len(cells), 0, -step)]


def _slide(cells: range, side: int, step: int) -> list[range]:
    """What each place of a window of `side` cells adds as it slides over more; it ends where what it adds ends."""
    return [cells[:side], *_chunks(cells[side:], step)]


def _down_strip(left: int, columns: range, known_rows: range, height: int, step: int) -> list[Window]:
    """Windows that draw a strip of columns beside the known rows, from top to bottom."""
    return [Window(rows.stop - height, left, rows, columns) for rows in _slide(known_rows, height, step)]


def _along_strip(top: int, rows: range, known_columns: range, width: int, step: int) -> list[Window]:
    """Windows that draw a strip of rows above or below the known columns, from left to right."""
    return [Window(top, columns.stop - width, rows, columns) for columns in _slide(known_columns, width, step)]
