import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from recipes.charts import line_chart, nice_ticks, read_metrics


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


def test_metrics_of_several_kinds_of_rows_are_sorted_by_column(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("epoch,loss,step,val_loss\n0,2.0,9,\n0,,9,1.5\n0,1.0,19,\n0,nan,29,\n0,torn")
    assert read_metrics(file) == {"loss": [(9.0, 2.0), (19.0, 1.0)], "val_loss": [(9.0, 1.5)]}
    assert read_metrics(tmp_path / "absent.csv") == {}
