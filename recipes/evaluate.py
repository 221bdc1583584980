"""`tessera evaluate MODEL PATH`: what a model is worth on captioned images, in figures.

On any corpus: how well the dVAE reconstructs, what the prior predicts and how much of that it owes to the captions,
how often the scorer finds the caption that belongs to an image; if asked for, how many samples are copies of training
pictures. On `scenes`, also how often pictures show what their prompt says, as a parser reads them.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dvae.reconstruct import encode_images, reconstruct
from dvae.train import measure
from recipes.accuracy import (
    Judged,
    best,
    interleaved_prompts,
    judge_prompts,
    judge_reconstructions,
    oracle,
    refuse_tuning_seed,
    single,
    tally,
)
from recipes.memorization import Memorization, memorization, memorization_line
from sampling.arguments import add_device_argument, add_precision_argument
from sampling.pipeline import Pipeline
from sampling.runner import drawn_size
from scorer.model import TrainedScorer
from scorer.train import measure as measure_scorer
from tessera.atomic_write import atomic_write
from tessera.data.config import DataConfig
from tessera.data.corpus import Corpus
from tessera.data.images import save_png
from tessera.data.shards import batches
from tessera.errors import UserError, run_command
from tessera.model_folder import ModelFolder, short_sha256
from tessera.one_line_parser import OneLineParser
from tessera.precision import describe_hardware, versions
from tessera.progress import counting
from transformer.lit import prior_loss

# N images, T text positions, I image positions.

_MEASURED_IMAGES = 1_000
_PRIOR_IMAGES = 256
_RETRIEVED = 500
_RENDERS = 300  # of each split, or as many as there are prompts
_SHOWN_RECONSTRUCTIONS = 8

Phase = Callable[[str], AbstractContextManager[None]]


class Evaluation(NamedTuple):
    """Figures, and the pictures behind them."""

    figures: dict[str, Any]
    """Plain values, as `--json` writes them."""
    judged: list[Judged]
    """Prompts of the scenes benchmark with their candidates; empty for other corpora."""
    originals: NDArray[np.uint8]
    """Some validation images, uint8 [n, H, W, 3]."""
    reconstructions: NDArray[np.uint8]
    """The same after encoding and decoding."""
    codes: NDArray[np.int64]
    """Their codes, int64 [n, h, w]."""


def evaluate(
    model: Path,
    data: DataConfig,
    *,
    prompts: int = 300,
    best_of: int = 16,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    deadline: float | None = None,
    phase: Phase = lambda name: nullcontext(),
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measures a model folder on a corpus.

    Args:
        model: the folder.
        data: the corpus; its image size is replaced by the model's.
        prompts: scenes: prompts of each split, seen and unseen pairs.
        best_of: scenes: candidates per prompt.
        seed: of prompts, renders and drawing; 31337 is refused, settings are tuned on its prompts.
        device: where to compute.
        precision: auto, bf16 or fp32.
        deadline: `time.monotonic()` by which drawing ends; fewer prompts are judged if they take longer.
        phase: entered around each kind of work, with its name.
        on_progress: called with (prompts judged, prompts in all).

    Raises:
        UserError: if the folder or the corpus cannot be used, or for the seed of the tuning prompts.
    """
    refuse_tuning_seed(seed)
    pipeline = Pipeline.load(model, device=device, precision=precision)
    image_size = drawn_size(pipeline.prior, pipeline.vae)
    corpus = DataConfig(**{**asdict(data), "image_size": image_size}).open("validation")
    count = min(len(corpus), _MEASURED_IMAGES)
    images = np.stack([corpus.image(index) for index in range(count)])
    figures: dict[str, Any] = {"model_sha256": pipeline.model_sha256, "corpus": corpus.name, "images": count}

    with phase("dvae"):
        figures["dvae"] = measure(pipeline.vae, images, precision=precision)
        originals = images[:_SHOWN_RECONSTRUCTIONS]
        remade, codes = reconstruct(pipeline.vae, originals, precision=pipeline.precision)
    with phase("prior"):
        figures["prior"] = measure_prior(pipeline, corpus, images[:_PRIOR_IMAGES])
    if isinstance(pipeline.scorer, TrainedScorer):
        with phase("scorer"):
            figures["scorer"] = _scorer_figures(pipeline.scorer, corpus, images[:_RETRIEVED])
    judged: list[Judged] = []
    if data.path == "scenes":  # not by the corpus's name: a folder may have any
        with phase("reconstructions"):
            # another seed than the prompts': these are pictures, those are sentences about pictures never drawn
            accuracy: dict[str, Any] = judge_reconstructions(
                pipeline.vae,
                seed=seed + 1,
                image_size=image_size,
                precision=pipeline.precision,
                count=min(_RENDERS, prompts),
            )
        with phase("sampling"):
            judged = judge_prompts(
                pipeline,
                interleaved_prompts(prompts, seed=seed),
                candidates=best_of,
                seed=seed,
                deadline=deadline,
                on_progress=on_progress,
            )
        figures["accuracy"] = {**accuracy, **accuracy_tables(judged, best_of)}
    figures["sampling"] = asdict(pipeline.settings)
    figures["hardware"] = describe_hardware()
    figures["versions"] = versions()
    return Evaluation(figures, judged, originals, remade, codes)


def accuracy_tables(judged: Sequence[Judged], best_of: int) -> dict[str, Any]:
    """The accuracy section's tables: single, best_of_N, oracle_of_N by split and class, and the number of prompts."""
    counts = {pairs: sum(result.pairs == pairs for result in judged) for pairs in ("seen", "unseen")}
    return {
        "single": tally(judged, single),
        f"best_of_{best_of}": tally(judged, best),
        f"oracle_of_{best_of}": tally(judged, oracle),
        "prompts": counts,
        "scorer": judged[0].images[0].scorer if judged else None,
    }


@torch.inference_mode()
def measure_prior(pipeline: Pipeline, corpus: Corpus, images: NDArray[np.uint8]) -> dict[str, float]:
    """Validation losses in nats per token, and the caption gap: the image loss under a neighbor's caption minus that
    under one's own, which is zero for a prior that does not read."""
    captions = [corpus.captions(index)[0] for index in range(len(images))]
    text_ids = pipeline.text_ids(captions)  # [N, T]
    codes = torch.from_numpy(encode_images(pipeline.vae, images, precision=pipeline.precision)).flatten(1)  # [N, I]
    others = text_ids.roll(1, dims=0)
    totals = np.zeros(3)
    for span in batches(len(images), 32):
        rows = slice(span.start, span.stop)
        texts, part = text_ids[rows].to(pipeline.device), codes[rows].to(pipeline.device)
        vocab_size = pipeline.prior.layout.text_vocab_size
        own = prior_loss(pipeline.prior(texts, part), texts, part, text_vocab_size=vocab_size)
        texts = others[rows].to(pipeline.device)
        other = prior_loss(pipeline.prior(texts, part), texts, part, text_vocab_size=vocab_size)
        totals += np.array([float(own.text), float(own.image), float(other.image)]) * len(span)
    text, image, shuffled = (totals / len(images)).tolist()
    return {"text_loss": round(text, 4), "image_loss": round(image, 4), "caption_gap": round(shuffled - image, 4)}


def _scorer_figures(scorer: TrainedScorer, corpus: Corpus, images: NDArray[np.uint8]) -> dict[str, float]:
    """What `scorer.train.measure` finds; retrieval of an image's own caption goes by the field's name for it."""
    found = measure_scorer(scorer, images, [corpus.captions(index) for index in range(len(images))])
    recall = found.pop("image_to_text")
    rounded = {name: round(value, 4) for name, value in found.items()}
    return {"recall_at_1": round(recall, 4), "among": len(images), **rounded}


def summary_lines(figures: dict[str, Any]) -> list[str]:
    """A few lines for people."""
    vae = figures["dvae"]
    lines = [
        f"dvae    psnr {vae['psnr']:.2f} dB, ssim {vae['ssim']:.3f}, codebook usage {vae['codebook_usage']:.1%}, "
        f"perplexity {vae['perplexity']:,.0f}"
    ]
    if "prior" in figures:
        prior = figures["prior"]
        lines.append(
            f"prior   {prior['image_loss']:.3f} nats per image token, {prior['text_loss']:.3f} per text token, "
            f"caption gap {prior['caption_gap']:.3f}"
        )
    if "scorer" in figures:
        scorer = figures["scorer"]
        lines.append(f"scorer  recall@1 {scorer['recall_at_1']:.1%} among {scorer['among']} captions")
    if "memorized" in figures:
        lines.append(memorization_line(figures["memorized"]))
    if "accuracy" in figures:
        lines += ["", *accuracy_lines(figures["accuracy"])]
    return lines


def accuracy_lines(accuracy: dict[str, Any]) -> list[str]:
    """The accuracy section as an aligned table, classes as columns."""
    kinds = [name for name in accuracy if name == "single" or name.startswith("best_of_")]
    columns = list(dict.fromkeys(column for kind in kinds for row in accuracy[kind].values() for column in row))
    lines = [f"parser: renders {accuracy['renders']:.1%}, reconstructions {accuracy['reconstructions']:.1%}"]
    lines.append(f"{'':<20}" + "".join(f"{column:>10}" for column in columns))
    for kind in kinds:
        for pairs, row in accuracy[kind].items():
            cells = "".join(f"{row[column]:>10.1%}" if column in row else f"{'':>10}" for column in columns)
            lines.append(f"{kind.replace('_', ' ') + ', ' + pairs:<20}{cells}")
    return lines


def main(argv: Sequence[str]) -> int:
    """The command."""
    arguments = _parser().parse_intermixed_args(list(argv))
    if arguments.prompts < 1 or arguments.best_of < 1:
        raise UserError(f"--prompts and --best-of must be at least 1; got {arguments.prompts} and {arguments.best_of}")
    if arguments.minutes is not None and not 0 < arguments.minutes < math.inf:
        raise UserError(f"--minutes must be positive and finite, got {arguments.minutes:g}")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise UserError(f"--json {arguments.json}: its folder does not exist")
    nearest = arguments.nearest
    if nearest is not None and (nearest.is_dir() or nearest.parent.is_file() or nearest.suffix.lower() != ".png"):
        raise UserError(f"--nearest must name a .png file in a folder; got {nearest}")
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    data = DataConfig(path=arguments.path, seed=arguments.seed, font=arguments.font)
    with counting("judging prompts") as on_progress:
        result = evaluate(
            Path(arguments.model),
            data,
            prompts=arguments.prompts,
            best_of=arguments.best_of,
            seed=arguments.seed,
            device=arguments.device,
            precision=arguments.precision,
            deadline=deadline,
            on_progress=on_progress,
        )
    if nearest is not None:
        memorized = _memorization(arguments, data)
        result.figures["memorized"] = memorized.figures
        save_png(nearest, memorized.sheet, {"tessera": json.dumps({"model": arguments.model, **memorized.figures})})
    print(f"{arguments.model} ({short_sha256(result.figures['model_sha256'])}) on {result.figures['images']:,} images")
    print("\n".join(summary_lines(result.figures)))
    if arguments.json is not None:
        with atomic_write(arguments.json) as temporary:
            temporary.write_text(json.dumps(result.figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def _memorization(arguments: argparse.Namespace, data: DataConfig) -> Memorization:
    pipeline = Pipeline.load(arguments.model, device=arguments.device, precision=arguments.precision)
    data = replace(data, image_size=drawn_size(pipeline.prior, pipeline.vae))
    training = data.open("train")  # which may have a bar of its own
    held_out = data.open("validation", beside=training)
    trained_on = ModelFolder.open(Path(arguments.model), parts=["prior"]).metadata("prior").get("corpus")
    if trained_on not in (None, training.name):
        print(
            f"{arguments.model} was trained on {trained_on}: copies of those pictures are not found in {training.name}",
            file=sys.stderr,
        )
    with counting("looking for copies") as on_progress:
        return memorization(pipeline, training, held_out, seed=arguments.seed, on_progress=on_progress)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="tessera evaluate", description="Measure a model on captioned images.")
    parser.add_argument("model", metavar="MODEL", help="a model folder, as `tessera fit` writes it")
    parser.add_argument(
        "path", metavar="PATH", help="scenes, emoji, a folder of captioned images or a manifest: its validation split"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as one JSON object")
    parser.add_argument(
        "--nearest",
        type=Path,
        metavar="SHEET.png",
        help="draw samples beside the most similar training pictures, and measure how many are copies; "
        "PATH must be what the model was trained on",
    )
    parser.add_argument(
        "--prompts", type=int, default=300, metavar="N", help="scenes: prompts of each split (default: 300)"
    )
    parser.add_argument(
        "--best-of", type=int, default=16, metavar="N", help="scenes: candidates per prompt (default: 16)"
    )
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="scenes: judge only as many prompts as fit (default: no limit)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of prompts and drawing, from 0 (default: 0)")
    parser.add_argument("--font", metavar="FILE", help="emoji: color font; searched for by default")
    add_device_argument(parser)
    add_precision_argument(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main, sys.argv[1:]))
