"""Which quantizer is the default: fsq against gumbel on the same network, data, steps and seed.

python -m benchmarks.quantizers [--quick] [--out benchmarks/results/quantizers.json]
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.record import Row, write_results
from dvae.model import DiscreteVAEConfig
from dvae.train import TrainConfig, train
from tessera.data.config import DataConfig
from tessera.training.optim import OptimizerConfig
from tessera.training.run import TrainerConfig

CLAIM = "fsq reconstructs better than gumbel and uses more of the codebook, at equal steps on a small budget"
_FSQ = DiscreteVAEConfig(widths=(64, 128), blocks=(1, 3), levels=(8, 5, 5, 5))
_MODELS = {"fsq": _FSQ, "gumbel": replace(_FSQ, quantizer="gumbel", codebook_size=1000, embedding_dim=64)}


def main() -> None:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--quick", action="store_true", help="200 steps instead of 600")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantizers.json"), help="where to write")
    arguments = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for corpus in ("scenes", "emoji"):
            measured = {}
            for name, model in _MODELS.items():
                result = train(
                    TrainConfig(
                        data=DataConfig(path=corpus, cache_dir=f"{scratch}/cache"),
                        model=model,
                        crop=32,
                        optim=OptimizerConfig(),
                        trainer=TrainerConfig(max_steps=200 if arguments.quick else 600, batch_size=48),
                        out=f"{scratch}/{corpus}-{name}",
                        run_dir=f"{scratch}/{corpus}-{name}.run",
                    )
                )
                measured[name] = {**result["metrics"], "seconds": result["seconds"]}
            for metric, unit in (
                ("psnr", "dB"),
                ("ssim", ""),
                ("codebook_usage", "share of K"),
                ("perplexity", "codes"),
            ):
                ours, other = measured["fsq"][metric], measured["gumbel"][metric]
                rows.append(Row(f"{corpus} {metric}", ours, unit, f"gumbel: {other:.4g}", ours / other, 1.0))
            ours, other = measured["fsq"]["seconds"], measured["gumbel"]["seconds"]
            rows.append(Row(f"{corpus} training time", ours, "s", f"gumbel: {other:.4g}", other / ours, 1.0))
    write_results(arguments.out, claim=CLAIM, rows=rows)


if __name__ == "__main__":
    main()
