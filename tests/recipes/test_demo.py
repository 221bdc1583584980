"""The whole demo on a budget of seconds: the files that it leaves, and what a second run does."""

import json
from pathlib import Path

import pytest

from recipes.accuracy import TUNING_SEED
from recipes.demo import affordable_prompts, main
from tessera.data.scenes import PROMPT_CLASSES
from tessera.errors import run_command


@pytest.mark.slow
def test_the_demo_reports_and_is_reused(
    tmp_path: Path, tiny: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.evaluate._MEASURED_IMAGES", 24)
    out = tmp_path / "demo"
    argv = ["--out", str(out), "--minutes", "0.2", "--prompts", "6", "--device", "cpu", "data.limit=60"]
    small_codebook = "dvae.model.levels=[5,3]"
    # A curve needs points: on a slow machine the clock would end a stage, and a fast one would log too seldom for so
    # few steps.
    unhurried = [
        f"{stage}.trainer.{setting}"
        for stage in ("dvae", "prior", "scorer")
        for setting in ("budget_seconds=60", "log_every_steps=1")
    ]
    assert run_command(main, [*argv, small_codebook, *tiny, *unhurried]) == 0
    report = json.loads((out / "report.json").read_text())
    assert list(report["seconds"])[:5] == ["total", "dvae", "prior", "scorer", "sampling"]
    assert all(report["seconds"][name] > 0 for name in ("total", "dvae", "prior", "scorer", "sampling"))
    assert {"psnr", "ssim", "codebook_usage", "perplexity"} <= set(report["dvae"])
    assert 0.9 < report["accuracy"]["renders"] <= 1.0
    assert 0.0 <= report["accuracy"]["reconstructions"] <= 1.0
    for kind in ("single", "best_of_16"):
        for pairs in ("seen", "unseen"):
            assert set(report["accuracy"][kind][pairs]) == {"all", *PROMPT_CLASSES}
    assert report["hardware"]["cores"] >= 1 and report["versions"]["tessera"]
    page = (out / "report.html").read_text()
    assert "Tessera demo" in page and page.count("<svg") >= 3
    assert "Parser accuracy" in (out / "model" / "README.md").read_text()
    shown = capsys.readouterr().out
    assert "best of 16, unseen" in shown and str(out / "report.html") in shown

    before = (out / "report.json").read_bytes()
    assert run_command(main, ["--out", str(out), "--prompts", "6"]) == 0
    assert "is finished already" in capsys.readouterr().out
    assert (out / "report.json").read_bytes() == before


def test_a_small_budget_prepares_fewer_prompts_but_one_of_each_class() -> None:
    assert affordable_prompts(300, 75.0, speed_per_image=0.006) == 300
    assert 6 < affordable_prompts(300, 10.0, speed_per_image=0.006) < 300
    assert affordable_prompts(300, 0.1, speed_per_image=0.006) == 6


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--prompts", "2"], "--prompts must be at least 6"),
        (["--minutes", "-1"], "must be positive"),
        (["--minutes", "inf"], "must be positive and finite, got inf"),
        (["--seed", str(TUNING_SEED)], "take another"),
        (["prior.model.widht=3"], "widht"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_mistakes_are_one_line_and_cost_no_earlier_demo(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(main, argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir()), "nothing is begun"
    report = tmp_path / "out" / "demo" / "report.json"
    report.parent.mkdir(parents=True)
    report.touch()
    assert run_command(main, [*argv, "--fresh"]) == 2
    assert report.exists()
