"""How much faster an image alone is drawn when one forward may take several positions, and that it is the same image.

python -m benchmarks.speculation MODEL [MODEL ...] [--quick] [--out benchmarks/results/speculation.json]

Each MODEL is a model folder trained on scenes or emoji, whose prompts are drawn one at a time, on the CPU, by the plain
loop and with windows of drafts (`sampling.jacobi`) in turns.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.record import Row, write_results
from sampling.decode import Sampled, sample_codes
from sampling.pipeline import Pipeline
from sampling.settings import SamplingSettings
from tessera.data.config import DataConfig
from tessera.data.scenes import sample_prompts
from tessera.errors import run_command
from tessera.model_folder import ModelFolder

CLAIM = "windows of drafts draw the very image of the plain loop, in less time where neighbors are alike"
_REPEATS = 3


def main(argv: Sequence[str]) -> int:
    """Draws, compares and writes one row per model and setting; 1 if an image differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculation", description=CLAIM)
    parser.add_argument("models", nargs="*", help="model folders trained on scenes or emoji")
    parser.add_argument("--quick", action="store_true", help="8 prompts instead of 32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speculation.json"))
    arguments = parser.parse_args(argv)
    if not arguments.models:
        print("nothing measured: name model folders trained on scenes or emoji, as `tessera fit` makes them")
        return 0
    rows, raw, all_equal = [], {}, True
    for path in arguments.models:
        pipeline = Pipeline.load(path, device="cpu", precision="fp32")
        corpus = ModelFolder.open(Path(path)).metadata("prior").get("corpus", "scenes")
        text_ids = pipeline.text_ids(_prompts(corpus, 8 if arguments.quick else 32))
        for name, settings in (("the model's settings", pipeline.settings), ("plain sampling", SamplingSettings())):
            seconds: dict[bool, list[float]] = {False: [], True: []}
            num_equal = 0
            for place, text in enumerate(text_ids):
                drawn, best = {}, {False: float("inf"), True: float("inf")}
                for _ in range(_REPEATS):
                    for speculate in (False, True):
                        began = time.perf_counter()
                        drawn[speculate] = _draw(pipeline, text, settings, place, speculate=speculate)
                        best[speculate] = min(best[speculate], time.perf_counter() - began)
                num_equal += _equal(drawn[False], drawn[True])
                for speculate in (False, True):
                    seconds[speculate].append(best[speculate])
            plain, ahead = (statistics.mean(seconds[speculate]) for speculate in (False, True))
            place = f"{corpus}, {pipeline.decoder.dim} x {len(pipeline.decoder.masks)}, {name}"
            rows.append(Row(f"{place}: one image", ahead, "s", f"the plain loop: {plain:.4g}", plain / ahead, None))
            rows.append(Row(f"{place}: equal images", num_equal / len(text_ids), f"of {len(text_ids)}", "", None, 1.0))
            raw[place] = {"model": pipeline.model_sha256, "plain": seconds[False], "ahead": seconds[True]}
            all_equal &= num_equal == len(text_ids)
    write_results(arguments.out, claim=CLAIM, rows=rows, raw=raw)
    return 0 if all_equal else 1


def _prompts(corpus: str, count: int) -> list[str]:
    if corpus == "scenes":
        return [prompt.text for prompt in sample_prompts(count, seed=3)]
    opened = DataConfig(path=corpus).open("train")
    return [opened.captions(index)[0] for index in range(0, len(opened), len(opened) // count)][:count]


def _draw(pipeline: Pipeline, text: Tensor, settings: SamplingSettings, seed: int, *, speculate: bool) -> Sampled:
    return sample_codes(
        pipeline.decoder,
        text[None],
        settings=settings,
        seeds=torch.tensor([seed]),
        image_index=torch.tensor([0]),
        speculate=speculate,
    )


def _equal(one: Sampled, other: Sampled) -> bool:
    return all(torch.equal(left.nan_to_num(), right.nan_to_num()) for left, right in zip(one, other, strict=True))


if __name__ == "__main__":
    raise SystemExit(run_command(main, sys.argv[1:]))
