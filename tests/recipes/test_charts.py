import math
from xml.etree import ElementTree

import pytest

from recipes.charts import line_chart, nice_ticks


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (3.2, 9.7), (-0.01, 0.02), (5.0, 5.0), (0.0, 12_345.0)])
def test_ticks_are_round_and_span_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high
    assert 2 <= len(ticks) <= 8
    step = ticks[1] - ticks[0]
    leading = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(leading - round_) for round_ in (1, 2, 5, 10)) < 1e-6


def test_a_chart_is_well_formed_and_names_its_series() -> None:
    series = {"training": [(float(step), 5.0 / step) for step in range(1, 2_000)], "held <out>": [(10.0, 1.0)]}
    root = ElementTree.fromstring(line_chart(series, label="Loss & more", unit="nats"))
    texts = [element.text for element in root.iter("text")]
    assert "training, nats" in texts and "held <out>, nats" in texts
    (line,) = root.iter("polyline")
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert len(points) <= 400
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)


def test_nothing_to_draw_is_no_chart() -> None:
    assert line_chart({"empty": []}, label="x") == ""
