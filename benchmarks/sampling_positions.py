"""Cost per token by position and cache memory for each mask kind, in benchmarks/sampling.py, and their picture.

All layers of a model have the same mask, on a grid of 32 x 32 codes; the masks take turns.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, get_args

import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.peers.tessera_prior import build_prior, position_seconds, prompts
from benchmarks.sampling_contestants import Shape
from recipes.charts import nice_ticks
from transformer.decoder import Decoder
from transformer.masks import MaskKind

BATCH = 8

_KINDS: tuple[MaskKind, ...] = get_args(MaskKind)
_TOGETHER = 8  # positions of one point of a curve
_OVERSAMPLING = 2
_WIDTH, _HEIGHT = 1000, 400
_TOP, _BOTTOM = 58, 348
_CURVES, _BARS = (56, 560), (700, 900)  # left and right end
_TITLE_FONT_PIXELS, _FONT_PIXELS = 16, 13

_BACKGROUND = (250, 250, 248)
_TEXT = (38, 38, 42)
_FAINT_TEXT = (120, 120, 126)
_RULE = (222, 222, 218)
_COLORS: dict[str, tuple[int, int, int]] = {
    "full": (24, 24, 30),
    "row": (58, 122, 190),
    "column": (214, 120, 20),
    "conv": (36, 150, 110),
}


def measure_positions(shape: Shape, *, threads: int, repeats: int) -> dict[str, Any]:
    """Times every decode step for every mask kind.

    Args:
        shape: of the models.
        threads: of the work, which is done in this process.
        repeats: passes over all positions, the mask kinds in turns.

    Returns:
        batch, grid, and "kinds": mask kind -> microseconds (median over the repeats, by the position of the code that
        is fed) and cache_bytes (of one image).
    """
    torch.set_num_threads(threads)
    decoders = {kind: Decoder(build_prior(shape._asdict(), attention=(kind,))) for kind in _KINDS}
    given = prompts(shape._asdict(), BATCH)
    passes: dict[str, list[list[float]]] = {kind: [] for kind in _KINDS}
    for decoder in decoders.values():
        position_seconds(decoder, given)
    for number in range(repeats):
        for kind in _KINDS[:: 1 if number % 2 == 0 else -1]:
            passes[kind].append(position_seconds(decoders[kind], given))
    kinds = {
        kind: {
            "microseconds": [round(1e6 * median(at), 1) for at in zip(*passes[kind], strict=True)],
            "cache_bytes": decoders[kind].cache_bytes_per_row,
        }
        for kind in _KINDS
    }
    return {"batch": BATCH, "grid": shape.grid, "kinds": kinds}


def quarters(microseconds: Sequence[float]) -> tuple[float, float]:
    """The median of the first quarter of positions, and that of the last."""
    size = max(1, len(microseconds) // 4)
    return median(microseconds[:size]), median(microseconds[-size:])


def draw_positions(positions: Mapping[str, Any]) -> Image.Image:
    """Draws curves of the time per step, and bars of cache memory beside them.

    Args:
        positions: what `measure_positions` returns.
    """
    size = (_WIDTH * _OVERSAMPLING, _HEIGHT * _OVERSAMPLING)
    picture = Image.new("RGB", size, _BACKGROUND)
    canvas = _Canvas(picture)
    canvas.text((_CURVES[0], 14), "Time of one decode step", title=True)
    batch, grid = positions["batch"], positions["grid"]
    canvas.text((_CURVES[0], 34), f"milliseconds for a batch of {batch}, by position in {grid} x {grid} codes")
    _draw_curves(canvas, positions["kinds"])
    canvas.text((_BARS[0], 14), "Cache of one image", title=True)
    canvas.text((_BARS[0], 34), "kibibytes, fp32, all layers")
    _draw_bars(canvas, {kind: found["cache_bytes"] / 1024 for kind, found in positions["kinds"].items()})
    return picture.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS)


class _Canvas:
    """Draws in points, of which the picture has `_OVERSAMPLING` squared pixels each."""

    def __init__(self, picture: Image.Image) -> None:
        self._draw = ImageDraw.Draw(picture)

    def text(
        self,
        at: tuple[float, float],
        text: str,
        *,
        title: bool = False,
        fill: tuple[int, int, int] | None = None,
        anchor: str = "la",
    ) -> None:
        font = ImageFont.load_default(_OVERSAMPLING * (_TITLE_FONT_PIXELS if title else _FONT_PIXELS))
        fill = fill or (_TEXT if title else _FAINT_TEXT)
        self._draw.text(self._scaled(at), text, fill=fill, font=font, anchor=anchor)

    def line(self, points: Sequence[tuple[float, float]], *, fill: tuple[int, int, int], width: float) -> None:
        scaled = [self._scaled(point) for point in points]
        self._draw.line(scaled, fill=fill, width=round(_OVERSAMPLING * width), joint="curve")

    def bar(self, left: float, top: float, right: float, bottom: float, *, fill: tuple[int, int, int]) -> None:
        self._draw.rectangle((self._scaled((left, top)), self._scaled((right, bottom))), fill=fill)

    @staticmethod
    def _scaled(point: tuple[float, float]) -> tuple[float, float]:
        return _OVERSAMPLING * point[0], _OVERSAMPLING * point[1]


def _draw_curves(canvas: _Canvas, kinds: Mapping[str, Any]) -> None:
    curves = {kind: _points(found["microseconds"]) for kind, found in kinds.items()}
    values = sorted(value for points in curves.values() for _, value in points)
    # without the highest percent: one step that something disturbed would flatten all the rest
    ticks = nice_ticks(0.0, values[math.ceil(0.99 * len(values)) - 1])
    last = max(position for points in curves.values() for position, _ in points)
    (left, right), highest = _CURVES, ticks[-1]

    def place(position: float, value: float) -> tuple[float, float]:
        return left + position / last * (right - left), _BOTTOM - min(value / highest, 1.0) * (_BOTTOM - _TOP)

    for tick in ticks:
        y = place(0, tick)[1]
        canvas.line([(left, y), (right, y)], fill=_RULE, width=1)
        canvas.text((left - 8, y), f"{tick:g}", anchor="rm")
    for tick in nice_ticks(0.0, last):
        if tick <= last * 1.02:
            canvas.text((min(place(tick, 0)[0], right), _BOTTOM + 8), f"{tick:.0f}", anchor="ma")
    canvas.text(((left + right) / 2, _BOTTOM + 26), "position", anchor="ma")
    ends = []
    for kind, points in curves.items():
        canvas.line([place(*point) for point in points], fill=_COLORS[kind], width=1.6)
        ends.append((place(*points[-1])[1], kind))
    lowest = -1e9
    for y, kind in sorted(ends):
        lowest = max(y, lowest + _FONT_PIXELS + 3)  # names of curves that meet stand below each other
        canvas.text((right + 10, lowest), kind, fill=_COLORS[kind], anchor="lm")


def _draw_bars(canvas: _Canvas, kibibytes: Mapping[str, float]) -> None:
    (left, right), high = _BARS, 34
    pitch = (_BOTTOM - _TOP) / len(kibibytes)
    for number, (kind, value) in enumerate(kibibytes.items()):
        top = _TOP + number * pitch + (pitch - high) / 2
        end = left + value / max(kibibytes.values()) * (right - left)
        canvas.bar(left, top, end, top + high, fill=_COLORS[kind])
        canvas.text((left - 10, top + high / 2), kind, fill=_COLORS[kind], anchor="rm")
        canvas.text((end + 8, top + high / 2), f"{value:,.0f}", anchor="lm")


def _points(microseconds: Sequence[float]) -> list[tuple[float, float]]:
    """Position and milliseconds, the medians of a few neighbors each."""
    groups = [(start, microseconds[start : start + _TOGETHER]) for start in range(0, len(microseconds), _TOGETHER)]
    return [(start + (len(group) - 1) / 2, median(group) / 1000) for start, group in groups]
