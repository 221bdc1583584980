"""Whether an image's tokens depend on what else is in its batch: requests of every kind, alone and in random mixes.

python -m benchmarks.batch_invariance [--quick] [--out benchmarks/results/batch_invariance.json]

A prior of 5 million random weights (256 channels, 4 layers of row, column, full and conv attention, 32 text ids, 8x8
codes) draws 200 images on the CPU: with and without guidance and its schedules, greedy, filtered, completed, inpainted.
Each is drawn alone, then among others in batches of 2, 3, 8 and 16 in random order; all tokens and log-likelihoods must
be equal bit for bit. There is no peer: none draws requests of different settings in one batch.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from benchmarks.peers.tessera_prior import build_prior
from benchmarks.record import Row, write_results
from benchmarks.sampling_contestants import Shape
from sampling.decode import Sampled, sample_codes
from sampling.settings import SamplingSettings
from sampling.step import Forced
from tessera.errors import run_command
from transformer.decoder import Decoder
from transformer.frozen_linear import Storage

CLAIM = "on a CPU an image's tokens are the same, bit for bit, alone and in any batch of requests of any kind"
_BATCHES = (2, 3, 8, 16)
_GRID = 8  # codes on a side
_KINDS = (
    SamplingSettings(),
    SamplingSettings(guidance=3.0, top_k=100),
    SamplingSettings(temperature=0.0),
    SamplingSettings(guidance=2.0, guidance_schedule="power-cosine", temperature=1.3, min_p=0.02),
    SamplingSettings(top_p=0.8, temperature=0.9),
    SamplingSettings(guidance=5.0, guidance_schedule="linear", guidance_threshold=2.0, top_p=0.95),
)


class Requests:
    """Random requests of every kind, and what they give.

    Args:
        decoder: of the prior.
        count: how many.
    """

    def __init__(self, decoder: Decoder, count: int) -> None:
        layout = decoder.layout
        generator = torch.Generator().manual_seed(1)
        self.decoder = decoder
        self.text_ids = torch.randint(layout.num_text_ids, (count, layout.text_len), generator=generator)
        codes = torch.randint(layout.codebook_size, (count, layout.image_len), generator=generator)
        mask = torch.zeros(count, layout.image_len, dtype=torch.bool)
        mask[4::5, : layout.image_len // 3] = True  # completion
        mask[3::5, layout.image_len // 4 : layout.image_len // 2] = True  # inpainting
        self.forced = Forced(codes, mask)
        self.settings = [_KINDS[place % len(_KINDS)] for place in range(count)]

    def draw(self, images: Sequence[int]) -> Sampled:
        """What some of them give in one batch."""
        index = torch.tensor(images)
        return sample_codes(
            self.decoder,
            self.text_ids[index],
            settings=[self.settings[image] for image in images],
            seeds=index % 17,
            image_index=index,
            forced=Forced(self.forced.codes[index], self.forced.mask[index]),
        )


def main(argv: Sequence[str]) -> int:
    """Draws, compares and writes one row for each batch size; 1 if an image differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch_invariance", description=CLAIM)
    parser.add_argument("--quick", action="store_true", help="24 images instead of 200")
    parser.add_argument("--weights", nargs="+", default=["fp32"], choices=get_args(Storage), help="how they are stored")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/batch_invariance.json"))
    arguments = parser.parse_args(argv)
    count = 24 if arguments.quick else 200
    shape = Shape(grid=_GRID)
    prior = build_prior(shape._asdict(), attention=("row", "column", "full", "conv"))
    rows, differing = [], {}
    for storage in arguments.weights:
        requests = Requests(Decoder(prior, weights=storage), count)
        alone = [requests.draw([image]) for image in range(count)]
        for batch in _BATCHES:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(batch)).tolist()
            wrong = []
            for first in range(0, count, batch):
                images = order[first : first + batch]
                mixed = requests.draw(images)
                wrong += [
                    image
                    for place, image in enumerate(images)
                    if not all(_equal(figures[place], own[0]) for figures, own in zip(mixed, alone[image], strict=True))
                ]
            name = f"{storage} weights, batches of {batch}: images equal to those drawn alone"
            rows.append(Row(name, 1 - len(wrong) / count, f"of {count} images", "", None, 1.0))
            differing[name] = wrong
            print(f"{name}: {count - len(wrong)} of {count}", file=sys.stderr, flush=True)
    write_results(arguments.out, claim=CLAIM, rows=rows, raw={"shape": shape._asdict(), "differing": differing})
    return 0 if all(row.holds for row in rows) else 1


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(torch.equal(one, other)) or bool(one.isnan().all() and other.isnan().all())


if __name__ == "__main__":
    raise SystemExit(run_command(main, sys.argv[1:]))
