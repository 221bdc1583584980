"""The dVAE on one GPU: the DALL-E paper's network at 256 px, and an emoji tokenizer of 128 px after ten minutes.

python -m benchmarks.tokenizer_gpu [--quick] [--out benchmarks/results/tokenizer_gpu.json]

The network is that of configs/dvae/openai.yaml, on random pixels, in bf16. Emoji are those of benchmarks/tokenizer.py:
a twentieth of the designs is held out. Training that was interrupted goes on where it ended.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.record import Row, write_results
from benchmarks.tokenizer_corpora import Pictures, prepare
from benchmarks.tokenizer_jobs import measure, spread
from dvae.model import DiscreteVAE
from dvae.model import load as load_vae
from dvae.pixels import to_float
from dvae.reconstruct import reconstruct
from dvae.sheets import sheet_of_rows
from dvae.similarity import psnr
from dvae.train import TrainConfig, objective_of, train
from recipes.speed import median_seconds, training_step
from tessera.config import load
from tessera.errors import run_command
from tessera.model_folder import ModelFolder
from tessera.precision import autocast, resolve_device, resolve_precision

# B batch, H W image pixels.

CLAIM = "the dVAE of the DALL-E paper trains and codes 256 px images on one GPU; emoji of 128 px after ten minutes"
_GIB = 2**30
_OPENAI, _EMOJI = "configs/dvae/openai.yaml", "configs/dvae/emoji.yaml"
_EMOJI_SETTINGS = ("model.widths=[128,256]", "model.blocks=[2,4]", "model.levels=[8,8,8,8]", "trainer.batch_size=64")
_SMALLEST_OPENAI = ("model.widths=[8,8,8,8]", "model.blocks=[1,1,1,1]", "model.codebook_size=16")
_SECTIONS = ("openai", "emoji")
_UNITS = {
    "psnr": "dB",
    "ssim": "",
    "sharpness": "of the originals'",
    "codebook_usage": "share of K",
    "perplexity": "codes",
}


class Scale(NamedTuple):
    """How much is done."""

    batch_sizes: tuple[int, ...]
    image_size: int  # of the paper's network
    budget_seconds: float  # of each timed thing
    emoji_size: int
    emoji_seconds: float
    limit: int | None  # emoji trained on
    overrides: tuple[str, ...]  # of the paper's network


FULL = Scale((8, 16, 32, 64, 128), 256, 10.0, 128, 600.0, None, ())
QUICK = FULL._replace(batch_sizes=(16, 64), budget_seconds=3.0, emoji_seconds=60.0)
DRY = Scale((1, 2), 32, 0.1, 32, 1.0, 40, _SMALLEST_OPENAI)


def main(argv: Sequence[str]) -> int:
    """Measures on the GPU; or runs the logic on the CPU and keeps nothing."""
    arguments = _parser().parse_args(argv)
    if arguments.dry:
        with tempfile.TemporaryDirectory() as scratch:
            return _run(DRY, "cpu", arguments, work=Path(scratch), out=Path(scratch) / "dry.json")
    if not torch.cuda.is_available():
        print("tokenizer_gpu measures nothing: torch sees no CUDA GPU; --dry runs its logic on the CPU")
        return 0
    scale = QUICK if arguments.quick else FULL
    scale = scale._replace(emoji_seconds=arguments.seconds or scale.emoji_seconds)
    work = arguments.work / ("quick" if arguments.quick else "full")
    return _run(scale, "cuda", arguments, work=work, out=arguments.out)


def _run(scale: Scale, device: str, arguments: argparse.Namespace, *, work: Path, out: Path) -> int:
    work.mkdir(parents=True, exist_ok=True)
    if "openai" in arguments.only:
        config = load(TrainConfig, [_OPENAI, f"trainer.device={device}", *scale.overrides], prog="tokenizer_gpu")
        _store(work / "openai.json", openai_rows(config, scale))
    if "emoji" in arguments.only:
        pictures = prepare(
            "emoji", work / "corpus", limit=scale.limit, image_size=scale.emoji_size, font=arguments.font
        )
        sheet = arguments.sheet if arguments.sheet and not arguments.dry else work / "sheet.png"
        _store(work / "emoji.json", emoji_rows(pictures, scale, device, work=work, sheet=sheet))
    stored = [work / f"{section}.json" for section in _SECTIONS]
    rows = [Row(**row) for path in stored if path.exists() for row in json.loads(path.read_text())]
    write_results(out, claim=CLAIM, rows=rows)
    if arguments.dry:
        print("a dry run on the CPU: its figures mean nothing, and none were kept")
    return 0


def openai_rows(config: TrainConfig, scale: Scale) -> Iterator[Row]:
    """Training, encoding and decoding in batches of growing size, until one no longer fits."""
    for batch in scale.batch_sizes:
        gc.collect()
        torch.cuda.empty_cache()
        try:
            yield from _rows_of_batch(config, scale, batch)
        except torch.OutOfMemoryError:
            print(f"openai preset: batches of {batch} do not fit")
            return


def _rows_of_batch(config: TrainConfig, scale: Scale, batch: int) -> Iterator[Row]:
    device = resolve_device(config.trainer.device)
    precision = resolve_precision("bf16", device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    vae, objective = DiscreteVAE(config.model).to(device), objective_of(config)
    objective.to_device_of(vae)
    optimizer = objective.build_optimizer(vae, config.optim)
    images = torch.rand(batch, 3, scale.image_size, scale.image_size, device=device)  # [B, 3, H, W]

    def loss() -> Tensor:
        with autocast(precision, device):
            return objective(vae, images, progress=1.0).total

    step = training_step(optimizer, loss, clip_norm=config.optim.clip_norm)
    train_seconds = median_seconds(step, device, budget=scale.budget_seconds)
    peak_bytes = torch.cuda.max_memory_allocated(device) if on_gpu else 0
    vae.eval()
    with torch.inference_mode(), autocast(precision, device):
        codes = vae.encode(images)
        encode_seconds = median_seconds(lambda: vae.encode(images), device, budget=scale.budget_seconds)
        decode_seconds = median_seconds(lambda: vae.decode(codes), device, budget=scale.budget_seconds)
    name = f"openai preset, {scale.image_size} px, {precision.name}, batch {batch}"
    yield Row(f"{name}: training", batch / train_seconds, "images/s", "", None, None)
    yield Row(f"{name}: most memory held in training", peak_bytes / _GIB, "GiB", "", None, None)
    yield Row(f"{name}: encoding", batch / encode_seconds, "images/s", "", None, None)
    yield Row(f"{name}: decoding", batch / decode_seconds, "images/s", "", None, None)


def emoji_rows(pictures: Pictures, scale: Scale, device: str, *, work: Path, sheet: Path) -> Iterator[Row]:
    """Trains by the clock, measures unseen designs next to drawings trained on, and writes a sheet of unseen ones."""
    budget = [f"trainer.budget_seconds={scale.emoji_seconds}", "trainer.max_steps=1000000"]
    places = [f"trainer.device={device}", f"out={work / 'model'}", f"run_dir={work / 'run'}"]
    config = load(TrainConfig, [_EMOJI, *_EMOJI_SETTINGS, *budget, *places], prog="tokenizer_gpu")
    trained = train(replace(config, data=pictures.data))
    vae = load_vae(ModelFolder.open(work / "model", parts=["dvae"]), device=device)
    precision = resolve_precision("auto", device)
    name = f"emoji, {scale.emoji_size} px, f={vae.downsampling}, K={vae.codebook_size:,}, {trained['seconds']:.0f} s"
    yield Row(f"{name}: steps", trained["steps"], f"of {config.trainer.batch_size} images", "", None, None)
    for place, path in (("unseen designs", pictures.held_out), ("drawings trained on", pictures.seen)):
        original = np.load(path)
        images, codes = reconstruct(vae, original, precision=precision)
        for figure, value in measure(original, images, codes, codebook_size=vae.codebook_size).items():
            yield Row(f"{name}, {place}: {figure}", value, _UNITS[figure], "", None, None)
        if path == pictures.held_out:
            shown = spread(len(original))[::2]
            _write_sheet(sheet, original[shown], images[shown], codes[shown], title=f"{name}, {place}")


def _write_sheet(
    path: Path, original: NDArray[np.uint8], images: NDArray[np.uint8], codes: NDArray[np.int64], *, title: str
) -> None:
    first, second = (to_float(torch.from_numpy(pixels.copy())) for pixels in (original, images))
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = sheet_of_rows(original, images, codes, decibels=psnr(second, first).tolist(), title=title)
    Image.fromarray(rows).save(path)
    print(f"written to {path}")


def _store(path: Path, rows: Iterable[Row]) -> None:
    path.write_text(json.dumps([row._asdict() for row in rows]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--quick", action="store_true", help="two batch sizes, a minute of training")
    parser.add_argument("--dry", action="store_true", help="the logic on the CPU with tiny shapes; keeps no figures")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/tokenizer_gpu.json"), help="where to write"
    )
    parser.add_argument("--sheet", type=Path, help="sheet of emoji, such as docs/tokenizer-emoji-128.png")
    parser.add_argument("--work", type=Path, default=Path("out/tokenizer-gpu"), help="keeps what is done")
    parser.add_argument("--only", nargs="+", choices=_SECTIONS, default=_SECTIONS, help="these sections")
    parser.add_argument("--seconds", type=float, help="training time of the emoji tokenizer")
    parser.add_argument("--font", help="color emoji font; searched for by default")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
