"""Trains the DiscreteVAE of dalle-pytorch 1.6.6, the peer of benchmarks/tokenizer.py, in an environment of its own.

    dalle_pytorch_vae.py train JOB.json     trains, then writes codes and reconstructions of the pictures asked for
    dalle_pytorch_vae.py slices JOB.json    answers every number n on standard input with the seconds that n steps took
    dalle_pytorch_vae.py --check            does the package work here?

It imports nothing of Tessera. The loop is that of the package's own train_vae.py, which stops on current versions of
its dependencies and without a GPU: Adam, and the rate, temperature and loss that the job names.
"""

import json
import math
import sys
import time
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# B batch, H W image pixels, h w code grid, N images.

_AT_ONCE = 64  # images per forward pass of an evaluation
_DECAY_EVERY_STEPS = 100  # train_vae.py multiplies the rate at every hundredth batch of an epoch


def discrete_vae_class() -> type:
    """The class, behind two lines that stand in for a module that its dependency's dependency has lost."""
    lost = types.ModuleType("pytorch_lightning.utilities.distributed")
    lost.rank_zero_only = lambda function: function  # type: ignore[attr-defined]
    sys.modules[lost.__name__] = lost
    from dalle_pytorch import DiscreteVAE  # type: ignore[import-not-found]

    return DiscreteVAE


class Training:
    """One run of the peer, step by step.

    Args:
        job: images (path of uint8 [N, H, H, 3]), order (path of int64 [steps, B], which images each batch holds; begun
            anew when it ends), seed, precision (fp32 or bf16), codes, codebook_channels, channels, num_layers,
            resnet_blocks, smooth_l1, learning_rate, decay ("exponential" as in train_vae.py, or "cosine" to zero),
            decay_rate, final_temperature, temperature_share (of training over which the temperature falls from 1).
    """

    def __init__(self, job: dict[str, Any]) -> None:
        torch.manual_seed(job["seed"])
        self.job = job
        self.images = np.array(np.load(job["images"]))
        self.order = np.load(job["order"])
        self.vae = discrete_vae_class()(
            image_size=self.images.shape[1],
            num_layers=job["num_layers"],
            num_tokens=job["codes"],
            codebook_dim=job["codebook_channels"],
            hidden_dim=job["channels"],
            num_resnet_blocks=job["resnet_blocks"],
            smooth_l1_loss=job["smooth_l1"],
            straight_through=False,
            kl_div_loss_weight=0.0,
        ).train()
        self.optimizer = torch.optim.Adam(self.vae.parameters(), lr=job["learning_rate"])
        self.steps = 0

    def step(self, progress: float) -> None:
        """One optimizer step at `progress` in [0, 1] of the training."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.job["learning_rate"] * self._rate(progress)
        rows = self.order[self.steps % len(self.order)]
        images = to_float(self.images[rows])  # [B, 3, H, H]
        with self._autocast():
            loss = self.vae(images, return_loss=True, temp=self._temperature(progress))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1

    def _rate(self, progress: float) -> float:
        if self.job["decay"] == "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        return self.job["decay_rate"] ** (self.steps // _DECAY_EVERY_STEPS)

    def _temperature(self, progress: float) -> float:
        # what train_vae.py documents: exponential, down to a floor. Its own loop multiplies the decay up (the exponent
        # grows with the square of the step), and at its default rate a short run would end where it began, at 1
        done = min(1.0, progress / self.job["temperature_share"])
        return self.job["final_temperature"] ** done

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.job["precision"] == "bf16" else nullcontext()


def to_float(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [0, 1], as torchvision's ToTensor would."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float().div(255)


def train(job: dict[str, Any]) -> None:
    """Trains for job["steps"] steps or job["seconds"] seconds, and writes trained.json and arrays into job["out"]."""
    training = Training(job)
    started = time.monotonic()
    for progress in _progress(job["steps"], job["seconds"], started):
        training.step(progress)
    seconds = time.monotonic() - started
    out = Path(job["out"])
    for name, path in job["reconstruct"].items():
        codes, images = reconstruct(training.vae, np.load(path))
        np.save(out / f"{name}-codes.npy", codes)
        np.save(out / f"{name}-images.npy", images)
    result = {
        "steps": training.steps,
        "seconds": seconds,
        "parameters": sum(parameter.numel() for parameter in training.vae.parameters()),
    }
    (out / "trained.json").write_text(json.dumps(result))


def _progress(steps: int | None, seconds: float | None, started: float) -> Iterator[float]:
    """The progress in [0, 1] before every step."""
    if steps is not None:
        yield from (step / steps for step in range(steps))
        return
    assert seconds is not None
    while (spent := time.monotonic() - started) < seconds:
        yield spent / seconds


def reconstruct(vae: Any, images: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Codes int64 [N, h, w] and pixels uint8 [N, H, W, 3] after hard codes, for images uint8 [N, H, W, 3]."""
    all_codes, all_images = [], []
    vae.eval()
    with torch.no_grad():
        for start in range(0, len(images), _AT_ONCE):
            codes = vae.get_codebook_indices(to_float(images[start : start + _AT_ONCE]))  # [B, h * w]
            side = math.isqrt(codes.shape[1])
            # decode() stays in the normalized space, [-1, 1] for [0, 1]
            pixels = (vae.decode(codes) * 0.5 + 0.5).clamp(0, 1)
            all_codes.append(codes.unflatten(1, (side, side)).numpy())
            all_images.append((pixels * 255).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(all_codes), np.concatenate(all_images)


def slices(job: dict[str, Any]) -> None:
    """Trains as many steps as each line of standard input says, and prints the seconds that they took."""
    training = Training(job)
    for line in sys.stdin:
        started = time.perf_counter()
        for _ in range(int(line)):
            training.step(0.5)
        print(time.perf_counter() - started, flush=True)


def check() -> None:
    """Codes and decodes one picture of noise."""
    vae = discrete_vae_class()(image_size=64, num_layers=3, num_tokens=16, codebook_dim=8, hidden_dim=8)
    codes, images = reconstruct(vae, np.zeros((1, 64, 64, 3), np.uint8))
    print(f"dalle-pytorch {version('dalle-pytorch')} on torch {torch.__version__}: codes {codes.shape}, {images.shape}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        check()
    else:
        {"train": train, "slices": slices}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
