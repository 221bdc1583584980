import time
from pathlib import Path

import pytest

from recipes.ledger import Ledger


def test_time_adds_up_over_processes(tmp_path: Path) -> None:
    file = tmp_path / "seconds.json"
    first = Ledger(file, started=time.monotonic() - 100)
    with first.phase("dvae"):
        pass
    second = Ledger(file, started=time.monotonic() - 20)
    assert second.total == pytest.approx(120, abs=5)
    assert second.total_before == pytest.approx(100, abs=5)


def test_an_interrupted_phase_counts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "seconds.json", started=time.monotonic())
    with pytest.raises(KeyboardInterrupt), ledger.phase("prior"):
        raise KeyboardInterrupt
    assert Ledger(ledger.path, started=time.monotonic()).spent["prior"] >= 0


def test_a_phase_that_goes_on_keeps_its_budget_and_adds_its_time(tmp_path: Path) -> None:
    file = tmp_path / "seconds.json"
    first = Ledger(file, started=time.monotonic())
    assert first.budget("dvae", 50.0) == 50.0
    first.spent["dvae"] = 30.0
    first.save()
    second = Ledger(file, started=time.monotonic())
    assert second.budget("dvae", 10.0) == 50.0
    with second.phase("dvae"):
        pass
    assert second.spent["dvae"] >= 30.0
