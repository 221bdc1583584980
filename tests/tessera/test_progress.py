import sys
from types import SimpleNamespace

import pytest

from tessera import progress
from tessera.progress import counting


def test_a_log_file_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([0.0, 5.0, 25.0, 30.0, 50.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(times)))
    with counting("judging") as on_progress:
        for done in (1_000, 2_000, 3_000, 4_000):
            on_progress(done, 4_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["judging  2,000 of 4,000  25 s left", "judging  4,000 of 4,000  0 s left"]


def test_what_has_no_known_end_is_told_by_its_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([0.0, 5.0, 25.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(times)))
    with counting("checking images") as on_progress:
        for done in (1_000, 5_000):
            on_progress(done, None)
    assert capsys.readouterr().err.splitlines() == ["checking images  5,000  200 a second"]


def test_a_bar_leaves_the_output_of_a_program_where_it_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # which makes a terminal of everything
    streams = sys.stdout, sys.stderr
    with counting("checking images") as on_progress:
        on_progress(1, 2)
        assert (sys.stdout, sys.stderr) == streams


def test_a_terminal_sees_no_bar_before_there_is_something_to_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with counting("judging prompts"):
        pass
    assert capsys.readouterr().err == ""
    with counting("judging prompts") as on_progress:
        on_progress(1, 2)
        on_progress(2, 2)
    assert "judging prompts" in capsys.readouterr().err
