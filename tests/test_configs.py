"""Every YAML in configs/ loads, builds its model without memory, says how to run it, and holds differences only."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import OmegaConf

from dvae.train import check_sizes
from tessera.config import load, read_yaml, to_plain

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))


class Stage(NamedTuple):
    """What the files of a folder in configs/ are for."""

    command: str
    config: str  # "module:class"
    model: str | None  # "module:class", built from the config's `model`


STAGES = {
    "dvae": Stage("train-dvae", "dvae.train:TrainConfig", "dvae.model:DiscreteVAE"),
    "encode": Stage("encode", "dvae.encode:EncodeConfig", None),
    "prior": Stage("train-prior", "transformer.train:TrainConfig", "transformer.model:Prior"),
    "scorer": Stage("train-scorer", "scorer.train:TrainConfig", "scorer.model:ClipScorer"),
}

every_file = pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(ROOT)) for file in FILES])


def stage_of(file: Path) -> Stage:
    folder = file.relative_to(ROOT / "configs").parts[0]
    assert folder in STAGES, f"configs/{folder} belongs to no stage"
    return STAGES[folder]


def resolve(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def load_with_placeholders(config_class: type, *argv: str) -> Any:
    """Loads a config, giving what has no default: the path of the data is the user's to say."""
    required = [f"{key}=placeholder" for key in OmegaConf.missing_keys(OmegaConf.structured(config_class))]
    return load(config_class, [*required, *argv], prog="tessera")


def flat(mapping: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from flat(value, prefix=f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_there_are_configs_for_every_model() -> None:
    assert {"dvae", "prior", "scorer"} <= {file.relative_to(ROOT / "configs").parts[0] for file in FILES}


@every_file
def test_a_config_loads_and_builds(file: Path) -> None:
    stage = stage_of(file)
    config = load_with_placeholders(resolve(stage.config), str(file))
    if stage.command == "train-dvae":
        check_sizes(config)
    if stage.model is not None:
        with torch.device("meta"):
            model = resolve(stage.model)(config.model)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@every_file
def test_a_config_holds_differences_only(file: Path) -> None:
    config_class = resolve(stage_of(file).config)
    defaults = dict(flat(to_plain(load_with_placeholders(config_class))))
    configured = dict(flat(to_plain(load_with_placeholders(config_class, str(file)))))
    repeated = [key for key, _ in flat(read_yaml(file)) if key in defaults and configured[key] == defaults[key]]
    assert not repeated, "these are the defaults already"


@every_file
def test_a_config_opens_with_the_command_that_runs_it(file: Path) -> None:
    comment = [line for line in file.read_text(encoding="utf-8").split("\n\n")[0].splitlines() if line.startswith("#")]
    command = f"tessera {stage_of(file).command} {file.relative_to(ROOT).as_posix()}"
    assert command in "\n".join(comment)
