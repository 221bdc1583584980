"""From pixels to samples with dalle-pytorch 1.6.6, the peer of benchmarks/versus_dalle_pytorch.py.

    python -m benchmarks.peers.dalle_pytorch_journey JOB.json     trains DiscreteVAE, then DALLE on its codes, and draws
    python -m benchmarks.peers.dalle_pytorch_journey --check      does the package work here?

It lives in an environment of its own and imports nothing of Tessera. The classes are the package's, DALLE with its
cache repaired; the loops are ours, since train_vae.py and train_dalle.py stop on current versions of their dependencies
and without a GPU. They do more for the model than those would: rates warm up and fall to zero, the temperature arrives
where it should while there is time left, and pictures are encoded once instead of in every step. The clock began when
the process was asked for: imports and loading count.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.peers.dalle_pytorch_prior import dalle_pytorch, with_repaired_cache
from benchmarks.peers.dalle_pytorch_vae import reconstruct, to_float

# N training images, B batch, H W image pixels, h w code grid, T text positions, P prompts, C candidates.

_ENCODED_AT_ONCE = 256
_LEFT_OVER_SECONDS = 1.0  # for writing files
_DRAWING_MAY_TAKE = 1.1  # times as long as was measured


class Clock:
    """Seconds since the work was asked for, and what they went into.

    Args:
        began: `time.monotonic()` of whoever asked; on one machine it is the same for all processes.
    """

    def __init__(self, began: float) -> None:
        self.began = began
        self.spent: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Notes how long the block takes."""
        before = self.seconds
        try:
            yield
        finally:
            self.spent[name] = self.seconds - before

    def until(self, end: float) -> Iterator[float]:
        """The progress in [0, 1) before every step of a training that ends at `end` seconds."""
        before = self.seconds
        while (now := self.seconds) < end:
            yield (now - before) / (end - before)


class VAETraining:
    """A DiscreteVAE and its training, step by step.

    Args:
        package: dalle_pytorch.
        images: uint8 [N, H, H, 3].
        settings: codes, codebook_channels, channels, num_layers, resnet_blocks, smooth_l1, straight_through, reinmax,
            batch_size, learning_rate, warmup (share of training), first_temperature, final_temperature,
            temperature_share (of training, after which it stays), precision (fp32 or bf16).
        seed: of weights and order.
    """

    def __init__(self, package: Any, images: NDArray[np.uint8], settings: dict[str, Any], *, seed: int) -> None:
        torch.manual_seed(seed)
        self.images, self.settings, self.steps = images, settings, 0
        self.vae = package.DiscreteVAE(
            image_size=images.shape[1],
            num_layers=settings["num_layers"],
            num_tokens=settings["codes"],
            codebook_dim=settings["codebook_channels"],
            hidden_dim=settings["channels"],
            num_resnet_blocks=settings["resnet_blocks"],
            smooth_l1_loss=settings["smooth_l1"],
            straight_through=settings["straight_through"],
            reinmax=settings["reinmax"],
            kl_div_loss_weight=0.0,  # its KL term is summed over batch and grid, and swamps the reconstruction
        ).train()
        self.optimizer = torch.optim.Adam(self.vae.parameters(), lr=settings["learning_rate"])
        self._rows = epochs(len(images), settings["batch_size"], seed=seed)

    def step(self, progress: float) -> float:
        """One optimizer step at `progress` in [0, 1) of the training; returns the loss."""
        settings = self.settings
        set_rate(self.optimizer, settings["learning_rate"] * rate(progress, settings["warmup"]))
        fallen = min(1.0, progress / settings["temperature_share"])
        first, final = settings["first_temperature"], settings["final_temperature"]
        images = to_float(self.images[next(self._rows)])  # [B, 3, H, H]
        with autocast(settings["precision"]):
            loss = self.vae(images, return_loss=True, temp=first * (final / first) ** fallen)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        return float(loss)


class PriorTraining:
    """A DALLE and its training, step by step.

    Args:
        package: dalle_pytorch.
        vae: trained; DALLE holds it for decoding.
        codes: int64 [N, h * w].
        texts: text ids and, for every image, which of them are its captions.
        settings: text_ids (in all), dim, depth, heads, head_channels, batch_size, learning_rate, warmup (share of
            training), betas, weight_decay, clip_norm, precision (fp32 or bf16).
        seed: of weights, order and the choice of captions.
    """

    def __init__(
        self,
        package: Any,
        vae: nn.Module,
        codes: NDArray[np.int64],
        texts: dict[str, NDArray[np.int64]],
        settings: dict[str, Any],
        *,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        self.codes, self.ids, self.first, self.settings, self.steps = codes, texts["ids"], texts["first"], settings, 0
        self.dalle = with_repaired_cache(package.DALLE)(
            dim=settings["dim"],
            vae=vae,
            num_text_tokens=settings["text_ids"],
            text_seq_len=self.ids.shape[1],
            depth=settings["depth"],
            heads=settings["heads"],
            dim_head=settings["head_channels"],
        ).train()
        learned = [parameter for parameter in self.dalle.parameters() if parameter.requires_grad]
        self.learned = learned
        self.optimizer = torch.optim.AdamW(
            learned,
            lr=settings["learning_rate"],
            betas=tuple(settings["betas"]),
            weight_decay=settings["weight_decay"],
        )
        self._rows = epochs(len(codes), settings["batch_size"], seed=seed)
        self._choices = np.random.default_rng(seed)

    def step(self, progress: float) -> float:
        """One optimizer step at `progress` in [0, 1) of the training; returns the loss."""
        settings = self.settings
        set_rate(self.optimizer, settings["learning_rate"] * rate(progress, settings["warmup"]))
        rows = next(self._rows)
        captions = self._choices.integers(self.first[rows], self.first[rows + 1])
        text, codes = torch.from_numpy(self.ids[captions]), torch.from_numpy(self.codes[rows])  # [B, T], [B, h * w]
        with autocast(settings["precision"]):
            loss = self.dalle(text, codes, return_loss=True)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.learned, settings["clip_norm"])
        self.optimizer.step()
        self.steps += 1
        return float(loss)


def rate(progress: float, warmup: float) -> float:
    """The learning rate's factor: up to 1 over the share `warmup`, then down to 0 along a cosine."""
    if progress < warmup:
        return max(progress / warmup, 0.01)
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def set_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def epochs(count: int, batch_size: int, *, seed: int) -> Iterator[NDArray[np.int64]]:
    """Rows of batch after batch, every row once before any comes again."""
    generator = np.random.default_rng(seed)
    rows = np.empty(0, np.int64)
    while True:
        while len(rows) < batch_size:
            rows = np.concatenate([rows, generator.permutation(count)])
        yield rows[:batch_size]
        rows = rows[batch_size:]


def autocast(precision: str) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def encode(vae: Any, images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Codes int64 [N, h * w] of images uint8 [N, H, H, 3]."""
    parts = range(0, len(images), _ENCODED_AT_ONCE)
    with torch.no_grad():
        return np.concatenate(
            [vae.get_codebook_indices(to_float(images[start : start + _ENCODED_AT_ONCE])).numpy() for start in parts]
        )


def draw(dalle: Any, text: Tensor, *, filter_threshold: float, temperature: float) -> NDArray[np.uint8]:
    """Pictures uint8 [B, H, H, 3] of text ids [B, T] by the package's own loop, unguided, as its guidance is broken."""
    # decode() stays in the normalized space, [-1, 1] for [0, 1]
    images = dalle.generate_images(text.clone(), filter_thres=filter_threshold, temperature=temperature, use_cache=True)
    return ((images * 0.5 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def draw_all(
    dalle: Any, prompts: NDArray[np.int64], settings: dict[str, Any], filter_threshold: float, temperature: float
) -> NDArray[np.uint8]:
    """Pictures uint8 [P, C, H, H, 3] of all prompts [P, T]."""
    repeated = torch.from_numpy(prompts).repeat_interleave(settings["candidates"], dim=0)  # [P * C, T]
    pictures = [
        draw(dalle, part, filter_threshold=filter_threshold, temperature=temperature)
        for part in repeated.split(settings["batch_size"])
    ]
    flat = np.concatenate(pictures)
    return flat.reshape(len(prompts), settings["candidates"], *flat.shape[1:])


def journey(job: dict[str, Any]) -> None:
    """All of it; writes samples-0.npy within the time, then what is not on the clock, and log.json.

    Args:
        job: began (`time.monotonic()`), seconds (for everything), threads, seed, images (path of uint8 [N, H, H, 3]),
            texts (path of ids int64 [M, T], 0 is padding, and first int64 [N + 1], where the captions of an image
            begin), prompts (path of int64 [P, T]), originals (path of uint8 [M, H, H, 3], to be reconstructed), vae,
            vae_share (of the time), prior, draw (candidates, batch_size, settings: pairs of filter_thres and
            temperature, of which the first is drawn within the time, the others after it), out (folder).
    """
    clock = Clock(job["began"])
    out = Path(job["out"])
    torch.set_num_threads(job["threads"])
    with clock.phase("imports"):
        package = dalle_pytorch()
    with clock.phase("loading"):
        images = np.array(np.load(job["images"]))
        texts = dict(np.load(job["texts"]))
        prompts = np.load(job["prompts"])

    with clock.phase("vae"):
        vae_training = VAETraining(package, images, job["vae"], seed=job["seed"])
        end = clock.seconds + job["vae_share"] * job["seconds"]
        losses = [vae_training.step(progress) for progress in clock.until(end)]
    vae = vae_training.vae.eval()
    with clock.phase("encoding"):
        codes = encode(vae, images)

    with clock.phase("prior"):
        training = PriorTraining(package, vae, codes, texts, job["prior"], seed=job["seed"])
        dalle, drawing = training.dalle, job["draw"]
        seconds = _seconds_to_draw(dalle, prompts, drawing)
        end = job["seconds"] - _DRAWING_MAY_TAKE * seconds - _LEFT_OVER_SECONDS
        prior_losses = [training.step(progress) for progress in clock.until(end)]
    dalle.eval()
    torch.manual_seed(job["seed"])
    with clock.phase("drawing"):
        np.save(out / "samples-0.npy", draw_all(dalle, prompts, drawing, *drawing["settings"][0]))
    total = clock.seconds

    for number, settings in enumerate(drawing["settings"][1:], 1):
        np.save(out / f"samples-{number}.npy", draw_all(dalle, prompts, drawing, *settings))
    np.save(out / "reconstructions.npy", reconstruct(vae, np.load(job["originals"]))[1])
    of_vae = count_parameters(vae)
    log = {
        "seconds": total,
        "spent": clock.spent,
        "vae_steps": vae_training.steps,
        "vae_loss": float(np.mean(losses[-50:])),
        "vae_parameters": of_vae,
        "codes_in_use": len(np.unique(codes)),
        "prior_steps": training.steps,
        "prior_loss": float(np.mean(prior_losses[-50:])),
        "prior_parameters": count_parameters(dalle) - of_vae,
    }
    (out / "log.json").write_text(json.dumps(log, indent=1))


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _seconds_to_draw(dalle: Any, prompts: NDArray[np.int64], drawing: dict[str, Any]) -> float:
    """What drawing all prompts will take; weights do not change it."""
    filter_threshold, temperature = drawing["settings"][0]
    batch = torch.from_numpy(np.resize(prompts, (drawing["batch_size"], prompts.shape[1])))

    def timed(work: Callable[[], object]) -> float:
        began = time.monotonic()
        work()
        return time.monotonic() - began

    def work() -> object:
        return draw(dalle, batch, filter_threshold=filter_threshold, temperature=temperature)

    work()  # the first one is slower
    return timed(work) * len(prompts) * drawing["candidates"] / drawing["batch_size"]


def check() -> None:
    """Makes a step of each training and draws a picture; imports are compiled and in the page cache afterwards."""
    package = dalle_pytorch()
    sizes = {"codes": 16, "codebook_channels": 8, "channels": 8, "num_layers": 3, "resnet_blocks": 1}
    loss = {"smooth_l1": False, "straight_through": False, "reinmax": False}
    training = {"batch_size": 2, "learning_rate": 1e-3, "warmup": 0.1, "precision": "fp32"}
    temperature = {"first_temperature": 1.0, "final_temperature": 0.5, "temperature_share": 1.0}
    images = np.zeros((4, 32, 32, 3), np.uint8)
    vae_training = VAETraining(package, images, {**sizes, **loss, **training, **temperature}, seed=0)
    vae_training.step(0.5)
    vae = vae_training.vae
    texts = {"ids": np.ones((4, 6), np.int64), "first": np.arange(5)}
    shape = {"text_ids": 10, "dim": 64, "depth": 1, "heads": 1, "head_channels": 64}
    optimizer = {"betas": (0.9, 0.95), "weight_decay": 0.0, "clip_norm": 1.0}
    prior = PriorTraining(package, vae, encode(vae, images), texts, {**shape, **training, **optimizer}, seed=0)
    prior.step(0.5)
    drawn = draw(prior.dalle, torch.ones(1, 6, dtype=torch.int64), filter_threshold=0.9, temperature=1.0)
    print(f"dalle-pytorch on torch {torch.__version__}: drew {drawn.shape}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        check()
    else:
        journey(json.loads(Path(sys.argv[1]).read_text()))
