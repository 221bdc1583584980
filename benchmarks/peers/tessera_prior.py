"""Our side of benchmarks/sampling.py: `python -m benchmarks.peers.tessera_prior JOB.json`.

Its protocol is that of the peers: a worker prints its version once everything is imported. After the first line of
standard input it builds what the job names, and prints the number of parameters. Every further line is a number n,
answered with the seconds that n calls took.
"""

import contextlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tessera
from dvae.model import DiscreteVAE, DiscreteVAEConfig
from sampling.decode import sample_codes, sample_steps
from sampling.settings import SamplingSettings
from tessera.precision import autocast, resolve_precision
from transformer.decoder import Decoder
from transformer.masks import MaskKind
from transformer.model import Prior, PriorConfig, SequenceLayout

# B images, T text tokens, I image tokens, K codebook size.

_KEPT_SHARE = 0.1  # of the codebook: what dalle-pytorch calls filter_thres = 0.9
_RANDOM_STD = 0.05
# as many parameters as the peer's, see benchmarks/tokenizer_contestants.py
_VAE = DiscreteVAEConfig(levels=(8, 8, 4, 4), patch_size=4, widths=(128,), blocks=(2,))


class Prompts(NamedTuple):
    """Random captions without padding, and random pictures."""

    text_ids: Tensor
    """int64 [B, T]"""
    codes: Tensor
    """int64 [B, I]"""


def build_prior(shape: dict[str, int], *, attention: tuple[MaskKind, ...] = ("full",)) -> Prior:
    """A prior with random weights whose logits differ from each other.

    Args:
        shape: the fields of `benchmarks.sampling_contestants.Shape`.
        attention: mask kinds, repeated over the layers.
    """
    torch.manual_seed(0)
    layout = SequenceLayout(
        text_len=shape["text_len"],
        grid_height=shape["grid"],
        grid_width=shape["grid"],
        text_vocab_size=shape["text_ids"],
        codebook_size=shape["codes"],
    )
    prior = Prior(
        PriorConfig(
            layout=layout,
            dim=shape["dim"],
            depth=shape["depth"],
            heads=shape["heads"],
            mlp_ratio=4.0,
            attention=attention,
        )
    )
    for parameter in prior.parameters():
        if not parameter.any():  # heads and projections begin at zero
            nn.init.normal_(parameter, std=_RANDOM_STD)
    return prior.eval().requires_grad_(False)


def prompts(shape: dict[str, int], batch: int) -> Prompts:
    """Different ones for every image."""
    return Prompts(
        torch.randint(shape["text_ids"], (batch, shape["text_len"])),
        torch.randint(shape["codes"], (batch, shape["grid"] ** 2)),
    )


def sampling_arguments(decoder: Decoder, text_ids: Tensor, *, seed: int, guidance: float) -> dict[str, Any]:
    """Of `sample_codes` and `sample_steps`: temperature 1 among the most likely tenth."""
    top_k = math.ceil(_KEPT_SHARE * decoder.layout.codebook_size)
    return {
        "settings": SamplingSettings(guidance=guidance, top_k=top_k),
        "seeds": torch.full((len(text_ids),), seed),
        "image_index": torch.arange(len(text_ids)),
    }


def generate(decoder: Decoder, text_ids: Tensor, *, seed: int, guidance: float = 1.0) -> Tensor:
    """Draws codes int64 [B, I] for text ids int64 [B, T]."""
    return sample_codes(decoder, text_ids, **sampling_arguments(decoder, text_ids, seed=seed, guidance=guidance)).codes


@torch.inference_mode()
def first_row(decoder: Decoder, vae: DiscreteVAE, text_ids: Tensor, *, seed: int, guidance: float = 1.0) -> Tensor:
    """Draws the first row of codes; returns the picture float [B, 3, H, W], all else of which shows code 0."""
    layout = decoder.layout
    steps = sample_steps(decoder, text_ids, **sampling_arguments(decoder, text_ids, seed=seed, guidance=guidance))
    with closing(steps):
        codes = next(step.codes for step in steps if step.position == layout.grid_width - 1)
    return vae.decode(codes.unflatten(1, (layout.grid_height, layout.grid_width)) % vae.codebook_size)


@torch.inference_mode()
def position_seconds(decoder: Decoder, given: Prompts) -> list[float]:
    """The seconds of each decode step: entry i feeds code i of every row."""
    cache = decoder.new_cache(len(given.text_ids))
    decoder.prefill(given.text_ids, cache)
    codes = given.codes.T.contiguous()  # [I, B]
    seconds = []
    for position in range(len(codes) - 1):
        began = time.perf_counter()
        decoder.decode(codes[position], position, cache)
        seconds.append(time.perf_counter() - began)
    return seconds


class Work(NamedTuple):
    """What a worker is asked to time."""

    call: Callable[[], object]
    parameters: int


def generation(job: dict[str, Any]) -> Work:
    """All codes of a batch, from text ids; with "first_row", the picture of the first row of codes instead."""
    prior = build_prior(job["shape"])
    decoder = Decoder(prior, weights=job["weights"])
    text_ids = prompts(job["shape"], job["batch"]).text_ids
    seeds, guidance = iter(range(2**31)), job["guidance"]
    if job["first_row"]:
        vae = DiscreteVAE(_VAE).eval()
        call = partial(first_row, decoder, vae, text_ids, guidance=guidance)
    else:
        call = partial(generate, decoder, text_ids, guidance=guidance)
    return Work(lambda: call(seed=next(seeds)), num_parameters(prior))


def pixels(job: dict[str, Any]) -> Work:
    """Pictures of given codes, 4 pixels on the side for each."""
    grid, vae = job["shape"]["grid"], DiscreteVAE(_VAE).eval()
    codes = torch.randint(_VAE.num_codes, (job["batch"], grid, grid))
    return Work(lambda: vae.decode(codes), num_parameters(vae))


def training(job: dict[str, Any]) -> Work:
    """Forward and backward pass and a step of Adam for all parameters."""
    from tessera.training.memory import reuse_freed_memory
    from tessera.training.optim import OptimizerConfig, build_optimizer
    from transformer.lit import prior_loss

    reuse_freed_memory()  # as tessera.training.run does on CPUs
    prior = build_prior(job["shape"]).train().requires_grad_(True)
    optimizer = build_optimizer(prior, OptimizerConfig(hidden="adamw", learning_rate=1e-3))
    precision = resolve_precision(job["precision"], "cpu")
    text_ids, codes = prompts(job["shape"], job["batch"])

    def step() -> None:
        with autocast(precision, "cpu"):
            loss = prior_loss(prior(text_ids, codes), text_ids, codes, text_vocab_size=job["shape"]["text_ids"])
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()

    return Work(step, num_parameters(prior))


def train_as_shipped(job: dict[str, Any]) -> None:
    """The training of `tessera train-prior` with all that surrounds its steps; it asks for the lines itself."""
    from benchmarks.peers.tessera_vae import EndOfInputError, SlicedBatches
    from tessera.data.order import SampleKey
    from tessera.training.optim import OptimizerConfig
    from tessera.training.run import TrainerConfig, run_training
    from transformer.lit import PriorLit

    prior = build_prior(job["shape"]).train().requires_grad_(True)
    given = prompts(job["shape"], job["batch"])

    class SameTokens:
        def __len__(self) -> int:
            return len(given.codes)

        def batch(self, keys: Sequence[SampleKey]) -> dict[str, Tensor]:
            return {"text_ids": given.text_ids, "codes": given.codes}

    optim = OptimizerConfig()
    config = TrainerConfig(
        max_steps=1_000_000,
        batch_size=job["batch"],
        device="cpu",
        precision=job["precision"],
        checkpoint_every_seconds=1e9,  # checkpoints belong to the cost of a step as little as the end of training does
    )
    print(num_parameters(prior), flush=True)
    with tempfile.TemporaryDirectory() as run_dir, contextlib.suppress(EndOfInputError):
        source = SlicedBatches(SameTokens())
        run_training(
            PriorLit(prior, optim=optim), source, name="slices", config=config, optim=optim, run_dir=Path(run_dir)
        )


def num_parameters(model: nn.Module) -> int:
    """Numbers that a model learns."""
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Answers the lines of standard input."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    print(f"tessera {tessera.__version__}, torch {torch.__version__}", flush=True)
    sys.stdin.readline()
    if job["work"] == "train as shipped":
        train_as_shipped(job)
        return
    work = {"generate": generation, "pixels": pixels, "train": training}[job["work"]](job)
    print(work.parameters, flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            work.call()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
