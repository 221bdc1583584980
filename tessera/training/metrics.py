"""Reads what a run logged, across all the times that it was resumed."""

import csv
import math
from pathlib import Path

METRICS_DIR = "metrics"


def metrics_version(start_step: int) -> str:
    """The name under which a run logs that begins at this step; the CSV logger would empty a folder used before."""
    return f"from-step-{start_step:09d}"


def read_metrics(run_dir: Path) -> dict[str, list[tuple[float, float]]]:
    """Every logged quantity of a run as (step, value) pairs in the order of the steps.

    Where a run was killed after logging steps that its newest checkpoint does not hold, the later record of a step
    replaces the earlier one.
    """
    series: dict[str, dict[float, float]] = {}
    for path in sorted((run_dir / METRICS_DIR).glob("from-step-*/metrics.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, text in row.items():
                    if (
                        name not in ("step", "epoch", None)
                        and text
                        and _is_number(row.get("step"))
                        and _is_number(text)
                    ):
                        series.setdefault(name, {})[int(row["step"])] = float(text)
    return {name: sorted(values.items()) for name, values in series.items()}


def _is_number(text: str | None) -> bool:
    """Whether a cell holds a finite number; the last row of a killed run may be torn."""
    try:
        return math.isfinite(float(text or "nan"))
    except ValueError:
        return False
