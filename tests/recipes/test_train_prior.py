"""The command trains the prior with a painter beside it."""

from typing import Any

import pytest

from recipes.samples import SamplePainter
from recipes.train_prior import main
from tessera.__main__ import COMMANDS
from transformer.train import TrainConfig


def test_the_command_trains_what_is_configured_and_shows_samples(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[tuple[TrainConfig, Any]] = []

    def train(config: TrainConfig, *, show: Any) -> dict[str, Any]:
        called.append((config, show))
        return {"steps": 1200, "seconds": 7.0, "metrics": {"val_loss": 2.5}, "sha256": ""}

    monkeypatch.setattr("recipes.train_prior.train", train)
    assert main(["out=elsewhere", "trainer.max_steps=1200"]) == 0
    ((config, show),) = called
    assert config.out == "elsewhere" and config.trainer.max_steps == 1200
    assert isinstance(show, SamplePainter) and show.config == config
    assert capsys.readouterr().out == "prior in elsewhere: 1,200 steps, 7 s, val_loss 2.5\n"


def test_it_is_what_the_command_line_calls() -> None:
    assert COMMANDS["train-prior"].target == "recipes.train_prior:main"
