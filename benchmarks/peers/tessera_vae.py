"""Our side of the step times, with the protocol of the peer: `python -m benchmarks.peers.tessera_vae JOB.yaml`.

It is the training of `tessera train-dvae` with everything around its steps, held up from outside: every number n on
standard input is answered with the seconds that n steps took.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dvae.lit import DiscreteVAELit
from dvae.model import DiscreteVAE
from dvae.train import ImageBatches, TrainConfig, objective_of
from tessera.config import load
from tessera.data.corpus import load_images
from tessera.data.loader import Batch, BatchSource
from tessera.data.order import SampleKey
from tessera.training.run import run_training


class EndOfInputError(Exception):
    """Standard input has ended."""


class SlicedBatches:
    """Hands out as many batches as each line of standard input says; training waits for the next line meanwhile.

    Batches may be asked for ahead of their steps: as many steps as batches lie between two lines all the same.

    Args:
        source: where they come from.
    """

    def __init__(self, source: BatchSource) -> None:
        self.source = source
        self.left = 0
        self.started: float | None = None

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, keys: Sequence[SampleKey]) -> Batch:
        if self.left == 0:
            if self.started is not None:
                print(time.perf_counter() - self.started, flush=True)
            line = sys.stdin.readline()
            if not line:
                raise EndOfInputError
            self.left, self.started = int(line), time.perf_counter()
        self.left -= 1
        return self.source.batch(keys)


def main() -> None:
    config = load(TrainConfig, sys.argv[1:], prog="benchmarks.peers.tessera_vae")
    torch.manual_seed(config.trainer.seed)
    images = np.array(load_images(config.data.open("train"), directory=config.data.cache_path))
    batches = ImageBatches(images, flip=config.flip, crop=config.crop, crop_step=config.model.downsampling)
    with tempfile.TemporaryDirectory() as run_dir, contextlib.suppress(EndOfInputError):
        run_training(
            DiscreteVAELit(DiscreteVAE(config.model), objective_of(config), optim=config.optim),
            SlicedBatches(batches),
            name="slices",
            config=config.trainer,
            optim=config.optim,
            run_dir=Path(run_dir),
        )


if __name__ == "__main__":
    main()
