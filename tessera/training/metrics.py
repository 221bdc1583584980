"""Reads what a run logged, across all the times that it was resumed."""

import csv
from pathlib import Path

METRICS_DIR = "metrics"


def metrics_version(start_step: int) -> str:
    """The name under which a run logs that begins at this step; the CSV logger would empty a folder used before."""
    return f"from-step-{start_step:09d}"


def read_metrics(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Every logged quantity of a run as (step, value) pairs in the order of the steps.

    Where a run was killed after logging steps that its newest checkpoint does not hold, the later record of a step
    replaces the earlier one.
    """
    series: dict[str, dict[int, float]] = {}
    for path in sorted((run_dir / METRICS_DIR).glob("from-step-*/metrics.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                step = int(row["step"])
                for name, text in row.items():
                    if name not in ("step", "epoch") and text:
                        series.setdefault(name, {})[step] = float(text)
    return {name: sorted(values.items()) for name, values in series.items()}
