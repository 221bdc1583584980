"""What giving up weak candidates early costs in accuracy and saves in time, on prompts of the scenes corpus.

python -m benchmarks.candidates MODEL [--prompts N] [--quick] [--out benchmarks/results/candidates.json]

MODEL is a model folder trained on scenes (`tessera fit scenes`). Every variant draws for the same prompts with the same
seeds; the parser says whether the picture that the scorer picks shows what the prompt asks for.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.record import Row, write_results
from sampling.pipeline import Pipeline
from tessera.data.scenes import sample_prompts
from tessera.data.scenes_parser import satisfies
from tessera.errors import run_command

CLAIM = "giving up the less likely candidates halfway: accuracy of the pick and seconds per prompt"
SEED = 4242
_AT_ONCE = 8  # prompts per call


class Variant(NamedTuple):
    """How many candidates are drawn, and how many of them to the end."""

    candidates: int
    keep: float = 1.0
    after: float = 0.5

    @property
    def name(self) -> str:
        """For people."""
        if self.keep == 1:
            return f"best of {self.candidates}, all finished"
        return f"best of {self.candidates}, {self.keep:.0%} kept after {self.after:.0%}"

    @property
    def images(self) -> float:
        """How many whole images' tokens it draws per prompt."""
        return self.candidates * (self.after + self.keep * (1 - self.after)) if self.keep < 1 else self.candidates


VARIANTS = (
    Variant(16),
    Variant(16, 0.5, 0.5),
    Variant(12),
    Variant(16, 0.25, 0.25),
    Variant(7),
    Variant(32, 0.25, 0.5),
    Variant(20),
    Variant(8),
    Variant(1),
)


def main(argv: Sequence[str]) -> int:
    """Draws, judges and writes one row for the accuracy and one for the time of each variant."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.candidates", description=CLAIM)
    parser.add_argument("model", nargs="?", help="a model folder trained on scenes")
    parser.add_argument("--prompts", type=int, default=240, help="prompts per variant (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="24 prompts")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/candidates.json"))
    arguments = parser.parse_args(argv)
    if arguments.model is None:
        print("nothing measured: name a model folder trained on scenes, as `tessera fit scenes --out MODEL` makes it")
        return 0
    pipeline = Pipeline.load(arguments.model)
    prompts = sample_prompts(24 if arguments.quick else arguments.prompts, seed=SEED)
    rights: dict[Variant, list[bool]] = {variant: [] for variant in VARIANTS}
    seconds: dict[Variant, list[float]] = {variant: [] for variant in VARIANTS}
    # Variants take turns, so that a busy minute of the machine is shared by all of them.
    for first in range(0, len(prompts), _AT_ONCE):
        part = prompts[first : first + _AT_ONCE]
        for variant in VARIANTS:
            began = time.perf_counter()
            images = pipeline(
                [prompt.text for prompt in part],
                n=1,
                best_of=variant.candidates,
                seed=range(first, first + len(part)),
                prune_keep=variant.keep,
                prune_after=variant.after,
            )
            seconds[variant].append((time.perf_counter() - began) / len(part))
            rights[variant] += [satisfies(image.image, p.spec) for image, p in zip(images, part, strict=True)]
        print(f"{first + len(part)} of {len(prompts)} prompts", file=sys.stderr)
    rows = []
    everything = statistics.median(seconds[VARIANTS[0]])
    for variant in VARIANTS:
        typical = statistics.median(seconds[variant])
        rows.append(Row(f"{variant.name}: right", statistics.mean(rights[variant]), "share of prompts", "", None, None))
        rows.append(Row(f"{variant.name}: time", typical, "s per prompt", VARIANTS[0].name, everything / typical, None))
    raw = {
        variant.name: {"images_drawn": variant.images, "right": rights[variant], "seconds_per_prompt": seconds[variant]}
        for variant in VARIANTS
    }
    write_results(
        arguments.out, claim=CLAIM, rows=rows, raw={"model": pipeline.model_sha256, "seed": SEED, "variants": raw}
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main, sys.argv[1:]))
