"""Trains the dVAE and exports it into a model folder: `tessera train-dvae CONFIG.yaml key=value ...`."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dvae.adversarial import AdversarialConfig
from dvae.codebook import draw_codebook
from dvae.lit import DiscreteVAELit
from dvae.losses import LossConfig
from dvae.lpips import SMALLEST_SIDE, Lpips
from dvae.model import DiscreteVAE, DiscreteVAEConfig
from dvae.objective import Objective
from dvae.pixels import to_float
from dvae.reconstruct import encode_images, images_per_forward, reconstruct
from dvae.schedule import ScheduleConfig
from dvae.sheets import most_rows, sheet_of_rows
from dvae.similarity import psnr, ssim
from dvae.usage import code_usage
from tessera.config import from_plain, load, to_plain
from tessera.data.config import DataConfig
from tessera.data.corpus import LazyImages, open_images
from tessera.data.images import save_png
from tessera.data.order import SampleKey, mix
from tessera.data.shards import batches
from tessera.errors import UserError
from tessera.model_folder import ModelFolder, write_part
from tessera.precision import autocast, resolve_device, resolve_precision
from tessera.training import stage
from tessera.training.optim import OptimizerConfig
from tessera.training.processes import first_goes_ahead, is_first, join, on_first
from tessera.training.run import TrainerConfig, run_training

# N images, H W pixels.

_MEASURED_IMAGES = 500
_VALIDATION_BATCHES = 4
_SHOWN_IMAGES = 8
_PANEL_PIXELS = 192  # small pictures are enlarged to about so many
PICTURES_DIR = "pictures"
_HELD_IN_MEMORY_BYTES = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run of the dVAE."""

    data: DataConfig = DataConfig()
    """what to train on"""
    model: DiscreteVAEConfig = DiscreteVAEConfig()
    """quantizer and sizes"""
    loss: LossConfig = LossConfig()
    """weights of the terms that are added up"""
    adversarial: AdversarialConfig = AdversarialConfig()
    """a discriminator whose judgment is one more term; off by default"""
    schedule: ScheduleConfig = ScheduleConfig()
    """when the gumbel quantizer's temperature falls and its KL weight rises"""
    optim: OptimizerConfig = OptimizerConfig()
    """rates"""
    trainer: TrainerConfig = TrainerConfig(batch_size=32)
    """how long and on what"""
    flip: bool = False
    """mirror half of the pictures left to right"""
    crop: int | None = None
    """train on square crops of this many pixels, a multiple of the downsampling; null for whole pictures"""
    crop_candidates: int = 3
    """crops drawn per picture, of which the one with the largest variance is used"""
    init_from: str | None = None
    """model folder whose dvae the training starts from; null begins with new weights"""
    out: str = "my-model"
    """model folder that receives the dvae part"""
    run_dir: str = "runs/dvae"
    """receives checkpoints, metrics and pictures; the same command resumes from it"""


class _Mapped(NamedTuple):
    """An array in a file, as `open_images` gives it."""

    path: str


class ImageBatches:
    """A `BatchSource` over images, mirrored and cropped at random.

    Most of a picture is often flat. Of several crops that are drawn, the one with the largest variance is trained on:
    the same number of pixels holds more that there is to learn.

    Args:
        images: uint8 [N, H, W, 3], in memory, on the disk, or decoded as they are asked for.
        flip: mirror half of the draws left to right.
        crop: side in pixels of the square crops, at most H and W; None for whole images.
        crop_candidates: crops drawn per image.
        crop_step: crops begin at multiples of so many pixels; with the downsampling factor, a crop is cut into the same
            patches as the whole image.
    """

    def __init__(
        self,
        images: NDArray[np.uint8] | LazyImages,
        *,
        flip: bool = False,
        crop: int | None = None,
        crop_candidates: int = 3,
        crop_step: int = 1,
    ) -> None:
        self.images, self.flip = images, flip
        self.crop, self.crop_candidates, self.crop_step = crop, crop_candidates, crop_step

    def __len__(self) -> int:
        return len(self.images)

    def __getstate__(self) -> dict[str, Any]:
        # A loader process that is started afresh maps the file itself; what is mapped would be sent to each of them.
        images = self.images
        return {**self.__dict__, "images": _Mapped(str(images.filename)) if isinstance(images, np.memmap) else images}

    def __setstate__(self, state: dict[str, Any]) -> None:
        images = state["images"]
        if isinstance(images, _Mapped):
            images = np.load(images.path, mmap_mode="r")
        self.__dict__.update(state, images=images)

    def batch(self, keys: Sequence[SampleKey]) -> dict[str, torch.Tensor]:
        chosen = np.asarray(self.images[[key.index for key in keys]])  # [B, H, W, 3], a copy
        seeds = np.array([key.seed for key in keys])
        if self.crop is not None:
            chosen = self._crops(chosen, seeds, self.crop)  # [B, h, w, 3]
        if self.flip:
            mirrored = (seeds & 1).astype(bool)
            chosen[mirrored] = chosen[mirrored, :, ::-1]
        return {"images": torch.from_numpy(chosen)}

    def _crops(self, pictures: NDArray[np.uint8], seeds: NDArray[np.int64], side: int) -> NDArray[np.uint8]:
        count, height, width = pictures.shape[:3]
        candidate = np.arange(self.crop_candidates)
        top = mix(seeds[:, None], 2 * candidate) % np.uint64((height - side) // self.crop_step + 1)  # [B, candidates]
        left = mix(seeds[:, None], 2 * candidate + 1) % np.uint64((width - side) // self.crop_step + 1)
        top, left = top * np.uint64(self.crop_step), left * np.uint64(self.crop_step)
        # a few pixels of all candidates at once: enough to compare them
        steps = np.arange(0, side, 4)
        places = np.arange(count)
        ys = (top[..., None].astype(np.int64) + steps)[..., :, None]  # [B, candidates, side / 4, 1]
        xs = (left[..., None].astype(np.int64) + steps)[..., None, :]
        thinned = pictures[places[:, None, None, None], ys, xs].astype(np.float32)
        best = thinned.var(axis=(2, 3)).sum(axis=-1).argmax(axis=1)  # [B]
        chosen = np.empty((count, side, side, 3), np.uint8)
        for place, index in enumerate(best):
            y, x = int(top[place, index]), int(left[place, index])
            chosen[place] = pictures[place, y : y + side, x : x + side]
        return chosen


def measure(vae: DiscreteVAE, images: NDArray[np.uint8], *, precision: str = "auto") -> dict[str, float]:
    """Reconstruction quality and codebook use on images uint8 [N, H, W, 3].

    Returns:
        psnr in dB and ssim, averaged over images; codebook_usage in [0, 1]; perplexity in [1, K]; dead_codes.
    """
    device = next(vae.parameters()).device
    chosen = resolve_precision(precision, device)
    decibels, similarities, all_codes = [], [], []
    with torch.no_grad():
        for batch in batches(len(images), images_per_forward(vae.config, *images.shape[1:3])):
            original = to_float(torch.from_numpy(images[batch.start : batch.stop].copy())).to(device)
            with autocast(chosen, device):
                codes = vae.encode(original)
                reconstruction = vae.decode(codes)
            decibels.append(psnr(reconstruction, original).cpu())
            similarities.append(ssim(reconstruction, original).cpu())
            all_codes.append(codes.flatten().cpu())
    usage = code_usage(torch.cat(all_codes), vae.codebook_size)
    return {
        "psnr": float(torch.cat(decibels).mean()),
        "ssim": float(torch.cat(similarities).mean()),
        "codebook_usage": usage.share,
        "perplexity": usage.perplexity,
        "dead_codes": usage.dead,
    }


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains, measures on the validation split and exports; resumes or returns at once where that was done before.

    Returns:
        steps, skipped_steps (whose gradient was not finite), seconds, metrics (see `measure`), and sha256 of the part
        that was exported.

    Raises:
        UserError: if sizes or losses do not fit together, or the corpus cannot be used.
        KeyboardInterrupt: after saving, when the user interrupted.
    """
    processes = join(config.trainer.device)
    run_dir, folder = Path(config.run_dir), Path(config.out)
    begins_with = None
    if config.init_from is not None:
        begins_with = stage.weights_to_start_from(config.init_from, "dvae")
        sizes = from_plain(DiscreteVAEConfig, begins_with.config("dvae"), source=f"{begins_with.path}/dvae/config.yaml")
        config = replace(config, model=sizes)
    check_sizes(config, num_processes=processes.world_size)
    with first_goes_ahead():
        train_corpus = config.data.open("train")
        inputs = {"corpus": train_corpus.fingerprint()}
        if begins_with is not None:
            inputs["init_from"] = begins_with.part_sha256("dvae")
        finished = stage.begin(run_dir, config, inputs=inputs)
        if finished is not None and _is_exported(folder, finished["sha256"]):
            return finished
        images = open_images(train_corpus, directory=config.data.cache_path, most_gib=config.data.cache_gib)
        measured_on = "held-out"
        try:
            held_out = config.data.open("validation", beside=train_corpus)
            held_out_images = open_images(held_out, directory=config.data.cache_path, most_gib=config.data.cache_gib)
            validation_images = np.array(held_out_images[:_MEASURED_IMAGES])
        except UserError:  # a handful of images leaves none to hold out
            validation_images, measured_on = np.asarray(images[:_MEASURED_IMAGES]), "training"
    if isinstance(images, np.memmap) and images.nbytes <= _HELD_IN_MEMORY_BYTES:
        images = np.array(images)  # pages of a mapped file may be dropped and read again at every epoch
    torch.manual_seed(config.trainer.seed)
    model = DiscreteVAE(config.model)
    if begins_with is not None:
        stage.start_from(model, begins_with, "dvae")
    objective = objective_of(config)
    batch_size = min(config.trainer.batch_size, images_per_forward(config.model, *config.data.image_size))
    validation = [
        {"images": torch.from_numpy(validation_images[b.start : b.stop].copy())}
        for b in list(batches(len(validation_images), batch_size))[:_VALIDATION_BATCHES]
    ]
    result = run_training(
        DiscreteVAELit(
            model,
            objective,
            optim=config.optim,
            show=_painter(run_dir, validation_images, config) if processes.is_first else None,
        ),
        ImageBatches(
            images,
            flip=config.flip,
            crop=config.crop,
            crop_candidates=config.crop_candidates,
            crop_step=config.model.downsampling,
        ),
        name="dvae",
        config=config.trainer,
        optim=config.optim,
        run_dir=run_dir,
        validation=validation,
    )
    model = model.to(resolve_device(config.trainer.device)).eval()
    metrics = measure(model, validation_images, precision=config.trainer.precision)

    def export() -> dict[str, Any]:
        shown = f"{len(validation_images):,} {measured_on} images"
        _save_codebook(run_dir, model, validation_images, config, source=shown)
        sha256 = write_part(
            folder,
            "dvae",
            config=to_plain(config.model),
            tensors=model.state_dict(),
            metadata={
                "image_size": list(config.data.image_size),
                "corpus": train_corpus.name,
                "images": len(images),
                "steps": result.steps,
                "measured": metrics,
                "measured_on": measured_on,
            },
        )
        finished = {
            "steps": result.steps,
            "skipped_steps": int(result.metrics.get("skipped_steps", 0)),
            "seconds": result.seconds,
            "metrics": metrics,
            "sha256": sha256,
        }
        stage.finish(run_dir, finished)
        return finished

    return on_first(export)


def _painter(
    run_dir: Path, images: NDArray[np.uint8], config: TrainConfig
) -> Callable[[int, DiscreteVAE], NDArray[np.uint8]]:
    """Draws what is left of the same few held-out pictures every time."""
    precision = resolve_precision(config.trainer.precision, resolve_device(config.trainer.device))
    height, width = config.data.image_size
    scale = max(1, _PANEL_PIXELS // max(height, width))
    shown = images[: min(_SHOWN_IMAGES, most_rows(scale * height))]

    def paint(step: int, model: DiscreteVAE) -> NDArray[np.uint8]:
        after, codes = reconstruct(model, shown, precision=precision)
        pair = [to_float(torch.from_numpy(np.array(pictures))) for pictures in (after, shown)]
        decibels = psnr(pair[0], pair[1]).tolist()
        picture = sheet_of_rows(shown, after, codes, scale=scale, decibels=decibels, title=f"step {step:,}")
        save_png(run_dir / PICTURES_DIR / f"reconstructions-{step:09d}.png", picture, {})
        return picture

    return paint


def _save_codebook(
    run_dir: Path, model: DiscreteVAE, images: NDArray[np.uint8], config: TrainConfig, *, source: str
) -> None:
    precision = resolve_precision(config.trainer.precision, resolve_device(config.trainer.device))
    codes = encode_images(model, images, precision=precision)
    counts = np.bincount(codes.ravel(), minlength=model.codebook_size)
    picture = draw_codebook(model, counts, precision=precision, source=source)
    save_png(run_dir / PICTURES_DIR / "codebook.png", picture, {})


def objective_of(config: TrainConfig) -> Objective:
    """What a configuration minimizes, with its networks built.

    Raises:
        UserError: if the files of the perceptual distance cannot be used.
    """
    loss, lpips = config.loss, None
    if loss.lpips:
        assert loss.lpips_backbone is not None and loss.lpips_heads is not None
        lpips = Lpips(backbone=Path(loss.lpips_backbone).expanduser(), heads=Path(loss.lpips_heads).expanduser())
    return Objective(loss=loss, schedule=config.schedule, adversarial=config.adversarial, lpips=lpips)


def check_sizes(config: TrainConfig, *, num_processes: int = 1) -> None:
    """Raises UserError where image size, crops, downsampling, losses and trainer do not fit together."""
    height, width = config.data.image_size
    f = config.model.downsampling
    if height % f or width % f:
        raise UserError(
            f"data.image_size must be divisible by {f} (patch_size {config.model.patch_size}, "
            f"{len(config.model.widths)} resolutions); got {height}x{width}"
        )
    if config.crop is not None and (config.crop % f or not 0 < config.crop <= min(height, width)):
        raise UserError(f"crop must be a multiple of {f} of at most {min(height, width)} pixels; got {config.crop}")
    if config.crop_candidates < 1:
        raise UserError(f"crop_candidates must be at least 1; got {config.crop_candidates}")
    config.loss.check(config.model.pixels)
    side = config.crop or min(height, width)
    if config.loss.lpips and side < SMALLEST_SIDE:
        raise UserError(f"loss.lpips needs pictures of at least {SMALLEST_SIDE} pixels a side; got {side}")
    if config.adversarial.is_on and side < 2**config.adversarial.layers:
        raise UserError(
            f"a discriminator of {config.adversarial.layers} layers needs pictures of at least "
            f"{2**config.adversarial.layers} pixels a side; got {side}: set adversarial.layers"
        )
    if config.trainer.checkpoint_activations:
        raise UserError("trainer.checkpoint_activations is for the prior; a dvae needs less with trainer.accumulate")
    if config.adversarial.is_on and config.adversarial.adaptive and num_processes > 1:
        raise UserError(
            f"adversarial.adaptive weighs by gradients that {num_processes} processes do not share: set "
            "adversarial.adaptive=false, or train in one process"
        )
    if config.adversarial.is_on and config.adversarial.adaptive and config.trainer.compile:
        raise UserError(
            "adversarial.adaptive goes backward several times, which compiled models cannot: set "
            "trainer.compile=false or adversarial.adaptive=false"
        )


def _is_exported(folder: Path, sha256: str) -> bool:
    try:
        return ModelFolder.open(folder, parts=["dvae"]).part_sha256("dvae") == sha256
    except UserError:
        return False


def main(argv: Sequence[str]) -> int:
    """The command."""
    config = load(TrainConfig, argv, prog="tessera train-dvae")
    result = train(config)
    if not is_first():
        return 0
    shown = "  ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items())
    skipped = f" ({result['skipped_steps']:,} of them skipped)" if result["skipped_steps"] else ""
    print(f"dvae in {config.out}: {result['steps']:,} steps{skipped}, {result['seconds']:,.0f} s, {shown}")
    return 0


if __name__ == "__main__":
    from tessera.errors import run_command

    sys.exit(run_command(main, sys.argv[1:]))
