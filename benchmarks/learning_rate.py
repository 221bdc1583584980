"""Whether the learning rate that is best for a narrow prior tells that of a wider one, by the rule of the recipes.

python -m benchmarks.learning_rate [MODEL] [--quick] [--out benchmarks/results/learning_rate.json]

Priors of 4 layers and widths 64, 128 and 256 are trained on scenes by the function behind `tessera train-prior`, each
at five rates a factor of two apart; what counts is the loss on held-out scenes. MODEL is a model folder trained on
scenes whose dVAE and text tokenizer are used; without it a small dVAE is trained first, which takes a minute.

The rule: the rate falls with the square root of the width. Muon's update has the same root mean square whatever the
size of a matrix (`tessera.training.optim`), so that its singular values grow with the root of the longer side, and with
them the change of what the layer puts out. Divided by that root, they change as much in a wide model as in a narrow one
(Yang et al. 2023, "A spectral condition for feature learning", section 3).
"""

import argparse
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.record import Row, write_results
from dvae.encode import EncodeConfig, encode
from dvae.train import TrainConfig as DVAETrainConfig
from dvae.train import train as train_dvae
from tessera.config import load
from tessera.data.config import DataConfig
from tessera.errors import run_command
from tessera.training.optim import OptimizerConfig
from tessera.training.run import TrainerConfig
from transformer.model import PriorConfig
from transformer.train import TrainConfig as PriorTrainConfig
from transformer.train import train as train_prior

CLAIM = "the best learning rate falls with the root of the width: found for a narrow prior, it serves a wider one"
REFERENCE_WIDTH = 128
_HEAD_DIM = 32
_DEPTH = 4
_BATCH_SIZE = 16
_RATES = 5
_VALIDATION_SHARE = 0.08
_NEVER = 10**9


class Scale(NamedTuple):
    """How much is done."""

    widths: tuple[int, ...]
    steps: int
    middle_rate: float
    """of the rates tried at the reference width; long runs want lower ones"""
    scenes: int
    dvae_seconds: float


FULL = Scale(widths=(64, 128, 256), steps=300, middle_rate=1.2e-2, scenes=6000, dvae_seconds=45.0)
QUICK = Scale(widths=(64, 128), steps=60, middle_rate=1.2e-2, scenes=1500, dvae_seconds=15.0)


def scaled_rate(rate: float, *, width: int, to_width: int) -> float:
    """The rate for another width, by the rule of the recipes."""
    return rate * math.sqrt(width / to_width)


def rates_of(width: int, scale: Scale) -> list[float]:
    """The rates tried at a width, a factor of two apart: those of the reference width, moved by the rule."""
    middle = scaled_rate(scale.middle_rate, width=REFERENCE_WIDTH, to_width=width)
    return [middle * 2.0 ** (place - _RATES // 2) for place in range(_RATES)]


def rows_of(losses: dict[int, list[float]], scale: Scale) -> list[Row]:
    """What the losses say about the rule.

    Args:
        losses: of each width, at the rates of `rates_of`.
        scale: which rates these were.
    """
    best = {width: int(np.argmin(values)) for width, values in losses.items()}
    found = rates_of(REFERENCE_WIDTH, scale)[best[REFERENCE_WIDTH]]
    rows = []
    for width, values in losses.items():
        best_rate, lowest = rates_of(width, scale)[best[width]], values[best[width]]
        rows.append(Row(f"width {width}: best rate of {_RATES}", best_rate, "learning rate", "", None, None))
        rows.append(Row(f"width {width}: loss at its best rate", lowest, "nats per token", "", None, None))
        if width == REFERENCE_WIDTH:
            continue
        # the rates of all widths correspond, so that the one predicted was tried
        predicted, loss = scaled_rate(found, width=REFERENCE_WIDTH, to_width=width), values[best[REFERENCE_WIDTH]]
        near = round(min(predicted / best_rate, best_rate / predicted), 6)  # a factor of two is one
        rows.append(
            Row(
                f"width {width}: rate predicted from width {REFERENCE_WIDTH}",
                predicted,
                "learning rate",
                f"the best of {_RATES}: {best_rate:.3g}",
                near,
                0.5,
            )
        )
        rows.append(
            Row(
                f"width {width}: loss at the predicted rate",
                loss,
                "nats per token",
                f"at the best of {_RATES}: {lowest:.4f}",
                lowest / loss,
                0.99,
            )
        )
    if len(losses) > 2:
        widths = [math.log2(width) for width in losses]
        optima = [math.log2(lowest_between(rates_of(width, scale), values)) for width, values in losses.items()]
        slope = float(np.polyfit(widths, optima, 1)[0])
        rows.append(Row("slope of the best rate over the width", slope, "power; the rule's is -0.5", "", None, None))
    return rows


def lowest_between(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Where a parabola through the lowest loss and its neighbors has its minimum, over the logarithm of the rate."""
    place = int(np.argmin(losses))
    if place in (0, len(losses) - 1):
        return rates[place]
    left, middle, right = losses[place - 1 : place + 2]
    return rates[place] * 2.0 ** ((left - right) / (2 * (left - 2 * middle + right)))


def main(argv: Sequence[str]) -> int:
    """Trains, compares and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning_rate", description=CLAIM)
    parser.add_argument("model", nargs="?", type=Path, help="a model folder trained on scenes")
    parser.add_argument("--quick", action="store_true", help="two widths and a fifth of the steps")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/learning_rate.json"))
    arguments = parser.parse_args(argv)
    scale = QUICK if arguments.quick else FULL
    with tempfile.TemporaryDirectory() as scratch:
        folder, shards = _shards(arguments.model, Path(scratch), scale)
        losses: dict[int, list[float]] = {width: [] for width in scale.widths}
        seconds: dict[int, list[float]] = {width: [] for width in scale.widths}
        for width in scale.widths:
            for rate in rates_of(width, scale):
                began = time.perf_counter()
                losses[width].append(_validation_loss(width, rate, scale, folder, shards))
                seconds[width].append(time.perf_counter() - began)
                print(f"width {width}, rate {rate:.3g}: {losses[width][-1]:.4f}", file=sys.stderr, flush=True)
    raw = {
        str(width): {"rates": rates_of(width, scale), "losses": losses[width], "seconds": seconds[width]}
        for width in scale.widths
    }
    write_results(
        arguments.out,
        claim=CLAIM,
        rows=rows_of(losses, scale),
        raw={"scale": scale._asdict(), "depth": _DEPTH, "batch_size": _BATCH_SIZE, "widths": raw},
    )
    return 0


def _shards(model: Path | None, scratch: Path, scale: Scale) -> tuple[Path, Path]:
    """A model folder of its own, with a dVAE and a tokenizer, and token shards made with them."""
    folder, shards = scratch / "model", scratch / "shards"
    if model is not None:
        shutil.copytree(model, folder)
    else:
        settings = [
            "configs/dvae/scenes.yaml",
            f"trainer.budget_seconds={scale.dvae_seconds}",
            f"out={folder}",
            f"run_dir={scratch / 'dvae'}",
        ]
        train_dvae(load(DVAETrainConfig, settings, prog="benchmarks.learning_rate"))
    encode(
        EncodeConfig(data=DataConfig(limit=scale.scenes, seed=1), out=str(folder), shards=str(shards), bpe_dropout=0.0)
    )
    return folder, shards


def _validation_loss(width: int, rate: float, scale: Scale, folder: Path, shards: Path) -> float:
    with tempfile.TemporaryDirectory() as run_dir:
        result = train_prior(
            PriorTrainConfig(
                shards=str(shards),
                model=PriorConfig(dim=width, depth=_DEPTH, heads=width // _HEAD_DIM),
                optim=OptimizerConfig(learning_rate=rate),
                trainer=TrainerConfig(
                    batch_size=_BATCH_SIZE,
                    max_steps=scale.steps,
                    validate_every_steps=scale.steps,
                    checkpoint_every_seconds=_NEVER,
                ),
                bpe_dropout=0.0,
                validation_share=_VALIDATION_SHARE,
                out=str(folder),
                run_dir=run_dir,
            )
        )
    return float(result["metrics"]["val_loss"])


if __name__ == "__main__":
    raise SystemExit(run_command(main, sys.argv[1:]))
