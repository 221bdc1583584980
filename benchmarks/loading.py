"""Whether data keep up: images from a folder and from tars against Pillow alone, and waiting in a step on token shards.

python -m benchmarks.loading [--quick] [--out FILE] [--only images | --only tokens]

    images  JPEG files of 512 x 384, like photographs, to 256 x 256, from the page cache. Pillow alone decodes, crops
            and resizes them with the same calls in as many threads, and in as many processes, as there are cores;
            whichever is faster is what ours is compared with. Ours is what the training of a dVAE reads from:
            manifest, hash of every file's bytes, keyed order, batches. All take turns in one run.
    tokens  training of the smallest recipe, configs/prior/scenes.yaml, on token shards: the share of its time in which
            it waits for a batch, as its progress line measures it; and how many batches the loader makes alone.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from operator import mul
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from benchmarks.loading_photos import HEIGHT, WIDTH, write_photos
from benchmarks.record import Row, write_results
from dvae.encode import EncodeConfig, encode
from dvae.model import DiscreteVAE, DiscreteVAEConfig
from dvae.train import ImageBatches
from tessera.config import load, to_plain
from tessera.data.config import DataConfig
from tessera.data.corpus import Corpus, LazyImages
from tessera.data.loader import BatchSource, KeyedLoader
from tessera.data.shards import TokenShards
from tessera.errors import run_command
from tessera.model_folder import ModelFolder, write_part
from tessera.precision import usable_cores
from tessera.text_tokenizer import TextTokenizer
from tessera.training.metrics import read_metrics
from transformer.train import TokenBatches, TrainConfig, split_rows, train

CLAIM = (
    "images reach training at 90 % or more of the rate at which Pillow alone decodes and resizes them on the same "
    "cores, from folders and tars; a training step on token shards waits for less than 1 % of its time"
)
_SIDE = 256
_MIDDLE = ((WIDTH - HEIGHT) // 2, 0, (WIDTH + HEIGHT) // 2, HEIGHT)  # the largest square
_BATCH_SIZE = 32
_PILLOW = f"Pillow {PIL.__version__}"
_RATE_GOAL = 0.9
_BUSY_GOAL = 0.99  # 1 % waiting
_SECTIONS = ("images", "tokens")
_RECIPE = Path(__file__).parents[1] / "configs" / "prior" / "scenes.yaml"
_WORKERS = 2  # of the loader, where it has processes of its own


class Scale(NamedTuple):
    """How much is measured."""

    photos: int
    batches: int
    """of images in a turn"""
    rounds: int
    scenes: int
    """in the token shards"""
    steps: int
    """of the prior's training"""
    token_batches: int
    """which the loader makes alone"""


_FULL = Scale(photos=2_000, batches=32, rounds=11, scenes=20_000, steps=400, token_batches=400)
_QUICK = Scale(photos=300, batches=16, rounds=5, scenes=1_000, steps=60, token_batches=100)


def main(argv: Sequence[str]) -> int:
    """Measures and writes."""
    arguments = _parser().parse_args(argv)
    scale = _QUICK if arguments.quick else _FULL
    rows: list[Row] = []
    raw: dict[str, Any] = {"cores": usable_cores(), "batch_size": _BATCH_SIZE, **scale._asdict()}
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.only in (None, "images"):
        seconds = image_seconds(arguments.work / "photos", scale)
        raw["seconds_per_turn"] = seconds
        rows += image_rows(seconds, images=scale.batches * _BATCH_SIZE)
    if arguments.only in (None, "tokens"):
        with tempfile.TemporaryDirectory() as folder:
            found = token_figures(Path(folder), scale)
        raw["tokens"] = found
        rows += token_rows(found)
    write_results(arguments.out, claim=CLAIM, rows=rows, raw=raw)
    return 0


def image_seconds(directory: Path, scale: Scale) -> dict[str, list[float]]:
    """Seconds of every turn of every contestant; they take turns there and back, A B C, C B A."""
    print(f"writing {scale.photos:,} pictures of {WIDTH} x {HEIGHT}", file=sys.stderr, flush=True)
    directory /= str(scale.photos)
    write_photos(directory, scale.photos)
    paths = [str(path) for path in sorted((directory / "folder").glob("*.jpg"))]
    corpora = {
        kind: DataConfig(
            path=str(directory / kind), image_size=(_SIDE, _SIDE), cache_dir=str(directory / f"{kind}-manifest")
        ).open("train")
        for kind in ("folder", "tars")
    }
    with ExitStack() as stack:
        contestants: dict[str, Callable[[int], float]] = {
            "threads": _pillow(stack.enter_context(ThreadPoolExecutor(usable_cores())), paths, scale.batches),
            "processes": _pillow(
                stack.enter_context(ProcessPoolExecutor(usable_cores(), mp_context=get_context("spawn"))),
                paths,
                scale.batches,
            ),
        }
        for kind, corpus in corpora.items():
            for workers in (0, _WORKERS):
                contestants[f"{kind}, {workers} workers"] = _ours(corpus, workers, scale.batches)
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for take_turn in contestants.values():  # files into the page cache, processes started
            take_turn(0)
        order = list(contestants)
        for number in range(scale.rounds):
            for name in order:
                seconds[name].append(contestants[name](number))
            order.reverse()
    return seconds


def decode(path: str) -> NDArray[np.uint8]:
    """A file to uint8 [256, 256, 3] with the calls to Pillow that our corpora make, and nothing else."""
    with Image.open(path) as image:
        image.draft(None, (2 * _SIDE, 2 * _SIDE))
        resized = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, box=_MIDDLE, reducing_gap=3.0)
    return np.asarray(resized)


def decode_and_forget(path: str) -> None:
    """So that pixels need not travel between processes."""
    decode(path)


def _pillow(
    pool: ThreadPoolExecutor | ProcessPoolExecutor, paths: Sequence[str], batches: int
) -> Callable[[int], float]:
    count = batches * _BATCH_SIZE

    def take_turn(number: int) -> float:
        chosen = [paths[index % len(paths)] for index in range(number * count, (number + 1) * count)]
        began = time.perf_counter()
        for _ in pool.map(decode_and_forget, chosen, chunksize=_BATCH_SIZE // 4):
            pass
        return time.perf_counter() - began

    return take_turn


def _ours(corpus: Corpus, workers: int, batches: int) -> Callable[[int], float]:
    source = ImageBatches(LazyImages(corpus))  # type: ignore[arg-type]

    def take_turn(number: int) -> float:
        loader = KeyedLoader(source, batch_size=_BATCH_SIZE, seed=0, start_step=number * batches, num_workers=workers)
        with closing(_batches(loader)) as stream:
            # Processes begin with the turn and end with it, or they would read ahead while others are timed; the time
            # begins when each of them has made a batch.
            for _ in islice(stream, workers):
                pass
            began = time.perf_counter()
            for _ in islice(stream, batches):
                pass
            return time.perf_counter() - began

    return take_turn


def _batches(loader: KeyedLoader) -> Generator[Any, None, None]:
    """A stream that can be closed, which ends the loader's processes."""
    yield from loader


def image_rows(seconds: dict[str, list[float]], *, images: int) -> Iterator[Row]:
    """Rates, and ratios to the faster way of using Pillow within the same round."""
    faster = min(("threads", "processes"), key=lambda name: median(seconds[name]))
    pure = images / median(seconds[faster])
    place = f"JPEG of {WIDTH} x {HEIGHT} to {_SIDE} x {_SIDE}, {usable_cores()} cores"
    yield Row(f"{place}: Pillow alone, in {faster}", pure, "images/s", "", None, None)
    for name, found in seconds.items():
        if name in ("threads", "processes"):
            continue
        ratio = median(theirs / ours for theirs, ours in zip(seconds[faster], found, strict=True))
        against = f"{_PILLOW} in {usable_cores()} {faster}: {pure:.4g}"
        yield Row(f"{place}: {name}", images / median(found), "images/s", against, ratio, _RATE_GOAL)


def token_figures(directory: Path, scale: Scale) -> dict[str, Any]:
    """Trains the recipe with 0 and with more loader processes, and lets the loader run alone."""
    out, shards = directory / "model", directory / "shards"
    config = load(TrainConfig, [str(_RECIPE)], prog="benchmarks.loading")
    vae = DiscreteVAE(DiscreteVAEConfig())  # codes of an untrained one take as long to read
    write_part(out, "dvae", config=to_plain(vae.config), tensors=vae.state_dict())
    data = DataConfig(path="scenes", limit=scale.scenes)
    encode(EncodeConfig(data=data, out=str(out), shards=str(shards), bpe_dropout=config.bpe_dropout))
    found: dict[str, Any] = {"batch_size": config.trainer.batch_size}
    for workers in (0, _WORKERS):
        run_dir = directory / f"run-{workers}"
        trainer = replace(
            config.trainer,
            max_steps=scale.steps,
            num_workers=workers,
            device="cpu",
            log_every_steps=max(1, scale.steps // 20),
            validate_every_steps=scale.steps,
        )
        result = train(replace(config, out=str(out), shards=str(shards), run_dir=str(run_dir), trainer=trainer))
        metrics = read_metrics(run_dir)
        # in the first row workers start
        shares, rates = ([value for _, value in metrics[name]][1:] for name in ("waiting", "tokens_per_second"))
        found[f"{workers} workers"] = {
            "waiting": shares,
            "tokens_per_second": rates,
            "seconds_per_step": result["seconds"] / result["steps"],
            "batches_per_second": _batches_per_second(_token_source(out, shards, config), config, workers, scale),
        }
    return found


def _token_source(out: Path, shards: Path, config: TrainConfig) -> BatchSource:
    tokenizer = TextTokenizer(ModelFolder.open(out, parts=["dvae"]).tokenizer_proto())
    opened = TokenShards(shards)
    return TokenBatches(
        opened,
        split_rows(len(opened), config.validation_share)[0],
        tokenizer,
        condition_dropout=config.condition_dropout,
        bpe_dropout=config.bpe_dropout,
    )


def _batches_per_second(source: BatchSource, config: TrainConfig, workers: int, scale: Scale) -> float:
    loader = KeyedLoader(source, batch_size=config.trainer.batch_size, seed=0, num_workers=workers)
    with closing(_batches(loader)) as stream:
        for _ in islice(stream, 1 + workers):
            pass
        began = time.perf_counter()
        for _ in islice(stream, scale.token_batches):
            pass
        return scale.token_batches / (time.perf_counter() - began)


def token_rows(found: dict[str, Any]) -> Iterator[Row]:
    """What is left of a step without the waiting, which should be nearly all of it, and the loader's own rate."""
    for workers in (0, _WORKERS):
        name, of_run = f"{_RECIPE.stem} prior on token shards, {workers} workers", found[f"{workers} workers"]
        step = of_run["seconds_per_step"]
        seconds = [1 / rate for rate in of_run["tokens_per_second"]]  # all rows are of as many steps
        waiting = sum(map(mul, of_run["waiting"], seconds)) / sum(seconds)
        yield Row(
            f"{name}: share of a step of {1000 * step:.0f} ms that is not waiting",
            1 - waiting,
            "of the time",
            "",
            None,
            _BUSY_GOAL,
        )
        rate = of_run["batches_per_second"]
        yield Row(f"{name}: batches of {found['batch_size']}, loader alone", rate, "batches/s", "", None, None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=CLAIM)
    parser.add_argument("--quick", action="store_true", help="two minutes: fewer pictures, rounds and steps")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loading.json"), help="where to write")
    parser.add_argument("--work", type=Path, default=Path("out/loading"), help="keeps the pictures")
    parser.add_argument("--only", choices=_SECTIONS, help="this section")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
