"""`tessera estimate CONFIG.yaml key=value ...`: what training a dVAE or a prior will take, before it is trained."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from dvae.train import TrainConfig as DVAETrainConfig
from dvae.train import check_sizes
from recipes.estimate_dvae import estimate, estimate_lines
from recipes.estimate_prior_report import Question, prior_lines
from tessera.config import load, read_yaml, to_plain
from tessera.errors import UserError, run_command
from tessera.one_line_parser import OneLineParser
from transformer.train import TrainConfig as PriorTrainConfig

Stage = Literal["dvae", "prior"]

_CONFIGS: dict[Stage, type] = {"dvae": DVAETrainConfig, "prior": PriorTrainConfig}
_TFLOP = 1e12
_PROG = "tessera estimate"


def main(argv: Sequence[str]) -> int:
    """The command."""
    arguments, further = _parser().parse_known_intermixed_args(list(argv))
    settings = [*arguments.settings, *further]
    named: Stage | None = next((name for name in _CONFIGS if settings[:1] == [name]), None)
    settings = settings[1:] if named else settings
    stage = named or stage_of(settings)
    question = _question(arguments)
    if stage == "prior":
        lines = prior_lines(load(PriorTrainConfig, settings, prog=_PROG), question)
    else:
        if question != Question():
            raise UserError("--processes and --device-... are for priors: a dVAE is measured on this machine")
        config = load(DVAETrainConfig, settings, prog=_PROG)
        check_sizes(config)
        lines = estimate_lines(config, estimate(config))
    print("\n".join(lines))
    return 0


def stage_of(settings: Sequence[str]) -> Stage:
    """Which stage YAML files and overrides are for: the one that knows more of their keys.

    Raises:
        UserError: if both know as many.
    """
    keys: list[str] = []
    for setting in settings:
        if setting.endswith((".yaml", ".yml")):
            keys += _keys(read_yaml(setting))
        elif "=" in setting:
            keys.append(setting.split("=", 1)[0])
    known = {stage: sum(_knows(config, key) for key in keys) for stage, config in _CONFIGS.items()}
    if known["dvae"] == known["prior"]:
        raise UserError(
            f"a dVAE or a prior? These settings do not tell: begin with one of the words, as in `{_PROG} prior "
            "model.dim=512`, or name a file, as in `tessera estimate configs/dvae/5m.yaml`"
        )
    return "dvae" if known["dvae"] > known["prior"] else "prior"


def _keys(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _keys(value, prefix=f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _knows(config_class: type, key: str) -> bool:
    node = to_plain(config_class())
    for name in key.split("."):
        if not isinstance(node, dict) or name not in node:
            return False
        node = node[name]
    return True


def _question(arguments: argparse.Namespace) -> Question:
    return Question(
        processes=arguments.processes,
        device_flops=None if arguments.device_flops is None else arguments.device_flops * _TFLOP,
        utilization=arguments.utilization,
        device_memory_gib=arguments.device_memory,
    )


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog=_PROG,
        description="Tell what training a dVAE or a prior takes: parameters, memory, time. Speed is measured here; a "
        "prior's can\nbe estimated for a GPU that is not here.",
        epilog="Settings are those of `tessera train-dvae` and `tessera train-prior`, whose --help lists them.",
    )
    parser.add_argument(
        "settings", nargs="*", metavar="SETTING", help="dvae or prior (told by the keys if left out), YAML, key=value"
    )
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that train a prior (default: 1)")
    parser.add_argument(
        "--device-flops", type=float, metavar="TFLOPS", help="peak, in training's precision, of a GPU that is not here"
    )
    parser.add_argument(
        "--utilization", type=float, default=Question.utilization, metavar="SHARE", help="of it (default: %(default)s)"
    )
    parser.add_argument("--device-memory", type=float, metavar="GIB", help="of a GPU that is not here")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main, sys.argv[1:]))
