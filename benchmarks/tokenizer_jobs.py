"""One training of one contestant in benchmarks/tokenizer.py: run in a process of its own, measured alike, kept on disk.

Ours is trained by `python -m dvae.train`, the peer by a script inside its own environment; both leave codes and decoded
pictures, and one yardstick measures them. A job that is done is never run again unless its settings change.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.tokenizer_corpora import CorpusName, Pictures
from dvae.model import load as load_vae
from dvae.pixels import to_float
from dvae.reconstruct import reconstruct
from dvae.similarity import psnr, ssim
from dvae.train import TrainConfig, train
from dvae.usage import code_usage
from tessera.atomic_write import atomic_write
from tessera.config import from_plain, to_plain
from tessera.data.order import sample_keys
from tessera.model_folder import ModelFolder
from tessera.plain_yaml import write_yaml
from tessera.precision import resolve_precision

# B batch, N images, H W image pixels, h w code grid.

PEER_WORKER = Path(__file__).parent / "peers" / "dalle_pytorch_vae.py"
_MOST_STEPS = 1_000_000  # for trainings that end by the clock
_ORDERED_STEPS = 4_000  # batches whose order is written for the peer; then it begins anew
_KEPT_PICTURES = 16
_RESULT, _KEPT, _IDENTITY = "result.json", "pictures.npy", "identity.json"
_AT_ONCE = 100  # images per measurement


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training."""

    contestant: str
    """a name of benchmarks/tokenizer_contestants.py's tables"""
    corpus: CorpusName
    """what it trains on"""
    f: Literal[4, 8]
    """downsampling"""
    until: Literal["steps", "seconds"]
    """what is equal for all: the number of optimizer steps or the training time"""
    amount: float
    """how many of them"""
    seed: int = 0
    """of weights, order and crops"""

    @property
    def name(self) -> str:
        """A folder's name."""
        contestant = self.contestant.replace(" ", "-")
        return f"{self.corpus}-f{self.f}-{self.amount:g}-{self.until}-{contestant}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how jobs run."""

    work: Path
    """folder that keeps results, and everything that is half done"""
    threads: int
    """of each process"""
    peer_python: Path | None
    """interpreter of the peer's environment; None where it is not installed"""
    in_process: bool = False
    """train ours in this process: quicker to start, for dry runs"""

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}


class JobError(RuntimeError):
    """A contestant's process failed; the message names its log."""


def run_ours(job: Job, settings: Mapping[str, Any], pictures: Pictures, place: Place) -> dict[str, Any]:
    """Trains one of ours, or finds its result.

    Args:
        job: what to train.
        settings: of `dvae.train.TrainConfig`, nested, without data, budget, seed and folders.
        pictures: the corpus.
        place: where and how.

    Returns:
        The job's fields, settings, steps, seconds, images_per_second, parameters, and what `measure` finds on pictures
        "held_out" and "seen".

    Raises:
        JobError: if the training fails.
    """
    if done := stored(job, settings, pictures, place):
        return done
    folder = place.work / "jobs" / job.name
    _claim(folder, settings, pictures)
    model, run_dir = folder / "model", folder / "run"
    config = ours_config(job, settings, pictures) | {"out": str(model), "run_dir": str(run_dir)}
    write_yaml(folder / "job.yaml", config)
    if place.in_process:
        train(from_plain(TrainConfig, config, source="job.yaml"))
    else:
        run_quietly([sys.executable, "-m", "dvae.train", str(folder / "job.yaml")], place, log=folder / "log.txt")
    trained = json.loads((run_dir / "finished.json").read_text())
    vae = load_vae(ModelFolder.open(model, parts=["dvae"]))
    result = {
        "steps": trained["steps"],
        "seconds": trained["seconds"],
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
    }
    precision = resolve_precision("auto", "cpu")
    for name, path in (("held_out", pictures.held_out), ("seen", pictures.seen)):
        original = np.load(path)
        images, codes = reconstruct(vae, original, precision=precision)
        result[name] = measure(original, images, codes, codebook_size=vae.codebook_size)
        if name == "held_out":
            np.save(folder / _KEPT, images[spread(len(images))])
    shutil.rmtree(run_dir)
    return _finish(folder, job, settings, result, batch_size=config["trainer"]["batch_size"])


def run_peer(job: Job, settings: Mapping[str, Any], pictures: Pictures, place: Place) -> dict[str, Any]:
    """Trains the peer, or finds its result; like `run_ours`, with the settings of its worker.

    Raises:
        JobError: if the training fails.
    """
    if done := stored(job, settings, pictures, place):
        return done
    folder = place.work / "jobs" / job.name
    _claim(folder, settings, pictures)
    (folder / "job.json").write_text(json.dumps(peer_job(folder, job, settings, pictures)))
    command = [str(place.peer_python), "-W", "ignore", str(PEER_WORKER), "train", str(folder / "job.json")]
    run_quietly(command, place, log=folder / "log.txt")
    result = json.loads((folder / "trained.json").read_text())
    for name, path in (("held_out", pictures.held_out), ("seen", pictures.seen)):
        images, codes = np.load(folder / f"{name}-images.npy"), np.load(folder / f"{name}-codes.npy")
        result[name] = measure(np.load(path), images, codes, codebook_size=settings["codes"])
        if name == "held_out":
            np.save(folder / _KEPT, images[spread(len(images))])
        for kind in ("images", "codes"):
            (folder / f"{name}-{kind}.npy").unlink()
    return _finish(folder, job, settings, result, batch_size=settings["batch_size"])


def measure(
    original: NDArray[np.uint8], images: NDArray[np.uint8], codes: NDArray[np.int64], *, codebook_size: int
) -> dict[str, float]:
    """One yardstick for all.

    Args:
        original: uint8 [N, H, W, 3].
        images: their reconstructions, of the same shape.
        codes: int64 [N, h, w].
        codebook_size: K.

    Returns:
        psnr in dB, ssim, sharpness (the mean step between neighboring pixels over that of the originals: below 1 is
        blur), codebook_usage in [0, 1], perplexity in [1, K].
    """
    decibels, similarities, contrasts = [], [], np.zeros(2)
    for start in range(0, len(original), _AT_ONCE):
        first, second = (
            to_float(torch.from_numpy(part[start : start + _AT_ONCE].copy())) for part in (original, images)
        )
        decibels.append(psnr(second, first))
        similarities.append(ssim(second, first))
        contrasts += [float(sum(pixels.diff(dim=dim).abs().sum() for dim in (2, 3))) for pixels in (first, second)]
    usage = code_usage(torch.from_numpy(codes), codebook_size)
    return {
        "psnr": float(torch.cat(decibels).mean()),
        "ssim": float(torch.cat(similarities).mean()),
        "sharpness": float(contrasts[1] / contrasts[0]),
        "codebook_usage": usage.share,
        "perplexity": usage.perplexity,
    }


def kept_pictures(place: Place, job: Job) -> NDArray[np.uint8] | None:
    """Reconstructions uint8 [16, H, W, 3] of pictures spread over the held-out ones; None if the job is not done."""
    path = place.work / "jobs" / job.name / _KEPT
    return np.load(path) if path.exists() else None


def spread(count: int) -> NDArray[np.int64]:
    """Which of so many pictures have their reconstructions kept."""
    return np.linspace(0, count - 1, min(count, _KEPT_PICTURES)).round().astype(np.int64)


def ours_config(job: Job, settings: Mapping[str, Any], pictures: Pictures) -> dict[str, Any]:
    """The nested plain values of a `dvae.train.TrainConfig`."""
    budget: dict[str, Any] = {"max_steps": int(job.amount)}
    if job.until == "seconds":
        budget = {"max_steps": _MOST_STEPS, "budget_seconds": float(job.amount)}
    # looking at its validation pictures would cost ours training time; they are measured afterwards
    trainer = {"validate_every_steps": _MOST_STEPS, "device": "cpu", "seed": job.seed, **settings["trainer"], **budget}
    return {**settings, "data": to_plain(pictures.data), "trainer": trainer}


def peer_job(folder: Path, job: Job, settings: Mapping[str, Any], pictures: Pictures) -> dict[str, Any]:
    """The job of the peer's worker; writes the order in which ours sees the pictures, which the peer follows."""
    count = len(np.load(pictures.train, mmap_mode="r"))
    batch_size = settings["batch_size"]
    steps = int(job.amount) if job.until == "steps" else _ORDERED_STEPS
    keys = sample_keys(0, steps * batch_size, size=count, seed=job.seed)
    np.save(folder / "order.npy", np.array([key.index for key in keys]).reshape(steps, batch_size))
    return {
        **settings,
        "images": str(pictures.train),
        "order": str(folder / "order.npy"),
        "seed": job.seed,
        "steps": int(job.amount) if job.until == "steps" else None,
        "seconds": job.amount if job.until == "seconds" else None,
        "reconstruct": {"held_out": str(pictures.held_out), "seen": str(pictures.seen)},
        "out": str(folder),
    }


def run_quietly(command: Sequence[str], place: Place, *, log: Path) -> None:
    """Runs a process to its end, its output in a file.

    Raises:
        JobError: if it fails.
    """
    with log.open("a") as file:
        code = subprocess.run(command, env=place.environment, stdout=file, stderr=file, check=False).returncode
    if code:
        last = log.read_text().strip().splitlines()[-1:]
        raise JobError(f"exit code {code}, see {log}: {' '.join(last)}")


def stored(job: Job, settings: Mapping[str, Any], pictures: Pictures, place: Place) -> dict[str, Any] | None:
    """The result of a job that was done with these settings on these pictures."""
    folder = place.work / "jobs" / job.name
    result = folder / _RESULT
    return json.loads(result.read_text()) if result.exists() and _is_same(folder, settings, pictures) else None


def _claim(folder: Path, settings: Mapping[str, Any], pictures: Pictures) -> None:
    """Makes the folder of a job, without anything that other settings have left there."""
    if folder.exists() and not _is_same(folder, settings, pictures):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _IDENTITY).write_text(json.dumps(_identity(settings, pictures)))


def _is_same(folder: Path, settings: Mapping[str, Any], pictures: Pictures) -> bool:
    path = folder / _IDENTITY
    return path.exists() and json.loads(path.read_text()) == _identity(settings, pictures)


def _identity(settings: Mapping[str, Any], pictures: Pictures) -> dict[str, Any]:
    # the file of the training pictures is named by their fingerprint
    return json.loads(json.dumps({"settings": settings, "pictures": pictures.train.name}))


def _finish(
    folder: Path, job: Job, settings: Mapping[str, Any], trained: Mapping[str, Any], *, batch_size: int
) -> dict[str, Any]:
    rate = trained["steps"] * batch_size / trained["seconds"]
    result = {**asdict(job), **trained, "images_per_second": rate, "settings": dict(settings)}
    with atomic_write(folder / _RESULT) as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    return result
