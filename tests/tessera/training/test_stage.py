"""A run folder goes on with the run that it was begun for, and with no other."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tessera.config import to_plain
from tessera.errors import UserError
from tessera.model_folder import write_part, write_tokenizer
from tessera.plain_yaml import read_yaml, write_yaml
from tessera.training import stage
from tessera.training.run import TrainerConfig
from transformer.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of a stage."""

    steps: int = 10
    """how many"""
    warmup: float = 0.1
    """how long"""


def test_a_finished_run_gives_its_result_again(tmp_path: Path) -> None:
    assert stage.begin(tmp_path, Settings(), inputs={"corpus": "a"}) is None
    stage.finish(tmp_path, {"steps": 10})
    assert stage.begin(tmp_path, Settings(), inputs={"corpus": "a"}) == {"steps": 10}


@pytest.mark.parametrize(
    ("settings", "inputs", "message"),
    [
        (Settings(steps=20), {"corpus": "a"}, "config.steps was 10 and is now 20"),
        (Settings(), {"corpus": "b"}, "inputs.corpus was 'a' and is now 'b'"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, settings: Settings, inputs: dict[str, str], message: str) -> None:
    stage.begin(tmp_path, Settings(), inputs={"corpus": "a"})
    with pytest.raises(UserError, match=message):
        stage.begin(tmp_path, settings, inputs=inputs)


def test_a_run_goes_on_in_another_place_with_other_hardware(tmp_path: Path) -> None:
    first = TrainConfig(trainer=TrainerConfig(max_steps=100))
    stage.begin(tmp_path / "first", first, inputs={"corpus": "a"})
    (tmp_path / "first").rename(tmp_path / "second")
    trainer = replace(first.trainer, device="cpu", strategy="fsdp", accumulate=2, num_workers=4, compile=True)
    second = replace(first, run_dir=str(tmp_path / "second"), shards="elsewhere/shards", trainer=trainer)
    assert stage.begin(tmp_path / "second", second, inputs={"corpus": "a"}) is None
    told = read_yaml(tmp_path / "second" / stage.CONFIG_FILE)
    assert told["config"] == to_plain(second), "the folder tells what it is computed with now"
    with pytest.raises(UserError, match=r"config\.trainer\.max_steps was 100 and is now 200"):
        changed = replace(second, trainer=replace(trainer, max_steps=200))
        stage.begin(tmp_path / "second", changed, inputs={"corpus": "a"})


def test_settings_that_came_later_have_their_defaults_in_a_run_that_was_begun_before(tmp_path: Path) -> None:
    stage.begin(tmp_path, Settings(), inputs={})
    begun = read_yaml(tmp_path / stage.CONFIG_FILE)
    del begun["config"]["warmup"]
    write_yaml(tmp_path / stage.CONFIG_FILE, begun)
    assert stage.begin(tmp_path, Settings(), inputs={}) is None
    with pytest.raises(UserError, match="config.warmup was 0.1 and is now 0.2"):
        stage.begin(tmp_path, Settings(warmup=0.2), inputs={})


def test_training_starts_from_the_weights_of_a_model_folder(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, b"tokenizer")
    given = nn.Linear(2, 3)
    write_part(tmp_path, "scorer", config={}, tensors=given.state_dict(), requires={"tokenizer": tokenizer})
    folder = stage.weights_to_start_from(str(tmp_path), "scorer", tokenizer_sha256=tokenizer)
    model = nn.Linear(2, 3)
    stage.start_from(model, folder, "scorer")
    assert torch.equal(model.weight, given.weight)
    with pytest.raises(UserError, match="its scorer was trained with another text tokenizer"):
        stage.weights_to_start_from(str(tmp_path), "scorer", tokenizer_sha256="0" * 64)
    with pytest.raises(UserError, match="has no prior"):
        stage.weights_to_start_from(str(tmp_path), "prior")
