"""Metrics of a run are read across resumes, whatever a kill left behind."""

from pathlib import Path

from tessera.training.metrics import METRICS_DIR, metrics_version, read_metrics


def test_resumed_runs_are_joined_and_torn_rows_passed_over(tmp_path: Path) -> None:
    for start, text in (
        (0, "step,loss,val\n9,3.0,\n19,2.0,1.5\n29,nan,\n39,1.0\nto"),
        (10, "step,loss\n19,2.5\n29,2.2\n"),
    ):
        folder = tmp_path / METRICS_DIR / metrics_version(start)
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(text)
    metrics = read_metrics(tmp_path)
    assert metrics["loss"] == [(9, 3.0), (19, 2.5), (29, 2.2), (39, 1.0)]
    assert metrics["val"] == [(19, 1.5)]
    assert read_metrics(tmp_path / "absent") == {}
