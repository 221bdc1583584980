"""Line charts as inline SVG, for pages that must stand alone: no script, no font, no file beside them."""

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = list[tuple[float, float]]

_WIDTH, _HEIGHT = 520, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 30
_MOST_POINTS = 400


def line_chart(series: Mapping[str, Points], *, label: str, unit: str = "") -> str:
    """Draws series over the step as one SVG element; classes `s0`, `s1` ... color them.

    Args:
        series: name -> points; series without points are left out.
        label: what the chart shows, for those who cannot see it.
        unit: of the values, written above the axis.

    Returns:
        The element, or "" if there is nothing to draw.
    """
    series = {name: _thinned(points) for name, points in series.items() if points}
    if not series:
        return ""
    steps = [step for points in series.values() for step, _ in points]
    values = _visible([value for points in series.values() for _, value in points])
    x_low, x_high = 0.0, max(max(steps), 1.0)
    ticks = nice_ticks(min(values), max(values))
    y_low, y_high = ticks[0], ticks[-1]

    def x(step: float) -> float:
        return _LEFT + (step - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        inside = min(max(value, y_low), y_high)
        return _HEIGHT - _BOTTOM - (inside - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    for tick in ticks:
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in nice_ticks(x_low, x_high):
        if tick <= x_high:
            parts.append(
                f'<text class="tick" x="{x(tick):.1f}" y="{_HEIGHT - 10}" text-anchor="middle">{tick:,.0f}</text>'
            )
    for number, points in enumerate(series.values()):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        if len(points) == 1:
            step, value = points[0]
            parts.append(f'<circle class="s{number}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>')
        else:
            parts.append(f'<polyline class="s{number}" points="{path}"/>')
    for number, name in enumerate(series):
        place = _TOP + 8 + 17 * number
        parts.append(f'<line class="s{number}" x1="{_WIDTH - 160}" x2="{_WIDTH - 140}" y1="{place}" y2="{place}"/>')
        shown = f"{name}, {unit}" if unit else name
        parts.append(f'<text class="legend" x="{_WIDTH - 133}" y="{place + 4}">{escape(shown)}</text>')
    return "".join([*parts, "</svg>"])


def nice_ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Round numbers that span [low, high]: multiples of 1, 2 or 5 times a power of ten, two at least."""
    if high <= low:
        high = low + max(abs(low) * 0.1, 1e-6)
    rough = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def _thinned(points: Points) -> Points:
    """At most so many points, each the mean of its neighborhood."""
    size = math.ceil(len(points) / _MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _visible(values: Sequence[float]) -> list[float]:
    """The values without the highest percent: the first steps of a training would flatten all the rest."""
    ordered = sorted(values)
    return ordered[: max(1, math.ceil(0.99 * len(ordered)))]
