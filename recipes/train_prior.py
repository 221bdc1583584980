"""`tessera train-prior CONFIG.yaml key=value ...`: trains the prior, and shows what it draws meanwhile.

`python -m transformer.train` trains the same without pictures: those need the dVAE and the sampler, which the
transformer knows nothing of.
"""

import sys
from collections.abc import Sequence

from recipes.samples import prior_painter
from tessera.config import load
from tessera.errors import run_command
from transformer.train import TrainConfig, tell, train


def main(argv: Sequence[str]) -> int:
    """The command."""
    config = load(TrainConfig, argv, prog="tessera train-prior")
    tell(config, train(config, show=prior_painter(config)))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main, sys.argv[1:]))
