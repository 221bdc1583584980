"""How fast this machine is: a matrix product, and a few real training steps of throwaway models."""

import math
import shutil
import sysconfig
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dvae.model import DiscreteVAE
from dvae.train import objective_of
from recipes.plan import Plan, Speed
from recipes.plan_sizes import DataFacts, Machine, layout_for, trained_size
from scorer.lit import scorer_loss
from scorer.model import ClipScorer
from tessera.precision import autocast, describe_hardware, resolve_device, resolve_precision
from tessera.training.memory import reuse_freed_memory
from tessera.training.optim import build_optimizer
from transformer.decoder import Decoder
from transformer.lit import prior_loss
from transformer.model import Prior

# B batch, T text positions, I image positions, h w code grid, H W pixels.

_PRODUCT_SIDE = {"cpu": 1024, "cuda": 8192}
_DRAWN_TOGETHER = 128


def measure_machine(device: str = "auto", precision: str = "auto") -> Machine:
    """Times a matrix product on the device that will train, in the precision in which it will."""
    chosen = resolve_device(device)
    format_ = resolve_precision(precision, chosen)
    side = _PRODUCT_SIDE.get(chosen.type, 1024)
    dtype = torch.bfloat16 if format_.name == "bf16" else torch.float32
    left, right = torch.randn(2, side, side, dtype=dtype, device=chosen).unbind(0)
    seconds = median_seconds(lambda: left @ right, chosen, budget=0.5)
    hardware = describe_hardware()
    on_gpu = chosen.type == "cuda"
    return Machine(
        kind="cuda" if on_gpu else "cpu",
        memory_gib=float((hardware["gpu_memory_gib"] if on_gpu else hardware["memory_gib"]) or 8.0),
        flops=2 * side**3 / seconds,
        precision=format_.name,
        can_compile=_can_compile(),
    )


def _can_compile() -> bool:
    """Whether torch.compile can build its kernels: it takes a C++ compiler and Python's header files."""
    has_compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    return has_compiler and (Path(sysconfig.get_path("include")) / "Python.h").exists()


def measure_speed(plan: Plan, facts: DataFacts, *, seconds: float) -> Speed:
    """Times optimizer steps and drawing with models of the plan's sizes on random data.

    Args:
        plan: with sizes; numbers of steps are not read.
        facts: about the corpus.
        seconds: about how long all of this may take.
    """
    if resolve_device(plan.prior.trainer.device).type == "cpu":
        reuse_freed_memory()
    dvae_step = _dvae_step_seconds(plan, facts, budget=0.3 * seconds)
    prior_step, image = _prior_seconds(plan, facts, budget=0.5 * seconds)
    scorer_step = _scorer_step_seconds(plan, facts, budget=0.2 * seconds)
    return Speed(dvae_step=dvae_step, prior_step=prior_step, scorer_step=scorer_step, image=image)


def _dvae_step_seconds(plan: Plan, facts: DataFacts, *, budget: float) -> float:
    device = resolve_device(plan.dvae.trainer.device)
    precision = resolve_precision(plan.dvae.trainer.precision, device)
    model = DiscreteVAE(plan.dvae.model).to(device)
    size = trained_size(facts.image_size, plan.dvae.crop)
    parts = plan.dvae.trainer.accumulate
    images = torch.rand(plan.dvae.trainer.batch_size // parts, 3, *size, device=device)  # [B, 3, H, W]
    objective = objective_of(plan.dvae)
    objective.to_device_of(model)

    def loss() -> Tensor:
        with autocast(precision, device):
            return objective(model, images, progress=1.0).total

    optimizer = objective.build_optimizer(model, plan.dvae.optim)
    step = training_step(optimizer, loss, clip_norm=plan.dvae.optim.clip_norm)
    return parts * median_seconds(step, device, budget=budget)  # a little much: the update is made once


def _prior_seconds(plan: Plan, facts: DataFacts, *, budget: float) -> tuple[float, float]:
    """Seconds of one optimizer step, and of drawing and decoding one image."""
    device = resolve_device(plan.prior.trainer.device)
    precision = resolve_precision(plan.prior.trainer.precision, device)
    layout = layout_for(facts, plan.dvae.model)
    config = replace(plan.prior.model, layout=layout)
    model = Prior(config, attention_backend=plan.prior.attention.backend).to(device)
    parts = plan.prior.trainer.accumulate
    rows = plan.prior.trainer.batch_size // parts
    text_ids = torch.randint(layout.num_text_ids, (rows, layout.text_len), device=device)  # [B, T]
    codes = torch.randint(layout.codebook_size, (rows, layout.image_len), device=device)  # [B, I]

    def loss() -> Tensor:
        with autocast(precision, device):
            output = model(text_ids, codes)
        return prior_loss(output, text_ids, codes, text_vocab_size=layout.text_vocab_size).total

    step_seconds = parts * median_seconds(
        training_step(build_optimizer(model, plan.prior.optim), loss, clip_norm=plan.prior.optim.clip_norm),
        device,
        budget=0.7 * budget,
    )

    decoder = Decoder(model.eval(), weights=precision.name)
    cache = decoder.new_cache(_DRAWN_TOGETHER)
    drawn = torch.zeros(_DRAWN_TOGETHER, dtype=torch.int64, device=device)
    decoder.prefill(text_ids[:1].expand(_DRAWN_TOGETHER, -1), cache)
    # attention to half of the image is the average over all positions
    half = min(layout.image_len // 2, layout.image_len - 2)

    def draw() -> None:
        # as much work as the sampler's choice of a code
        decoder.decode(drawn, half, cache).softmax(dim=1).double().cumsum(dim=1)

    token_seconds = median_seconds(draw, device, budget=0.2 * budget) / _DRAWN_TOGETHER
    vae = DiscreteVAE(plan.dvae.model).eval().to(device)
    grids = torch.zeros(16, layout.grid_height, layout.grid_width, dtype=torch.int64, device=device)

    def decode() -> None:
        with autocast(precision, device):
            vae.decode(grids)

    return step_seconds, layout.image_len * token_seconds + median_seconds(decode, device, budget=0.1 * budget) / 16


def _scorer_step_seconds(plan: Plan, facts: DataFacts, *, budget: float) -> float:
    device = resolve_device(plan.scorer.trainer.device)
    precision = resolve_precision(plan.scorer.trainer.precision, device)
    layout = layout_for(facts, plan.dvae.model)
    config = replace(
        plan.scorer.model,
        image_size=facts.image_size,
        text_len=layout.text_len,
        text_vocab_size=layout.text_vocab_size,
    )
    model = ClipScorer(config).to(device)
    rows, captions = plan.scorer.trainer.batch_size, plan.scorer.num_captions
    images = torch.rand(rows, 3, *facts.image_size, device=device)  # [B, 3, H, W]
    text_ids = torch.randint(layout.text_vocab_size, (rows, captions, layout.text_len), device=device)  # [B, G, T]
    not_negative = torch.zeros(rows, rows, dtype=torch.bool, device=device)  # [B, B]
    blind = torch.zeros(rows, dtype=torch.bool, device=device)  # [B]

    def loss() -> Tensor:
        with autocast(precision, device):
            return scorer_loss(
                model,
                images,
                text_ids,
                not_negative,
                blind=blind,
                contrastive_weight=plan.scorer.contrastive_weight,
            ).total

    return median_seconds(
        training_step(build_optimizer(model, plan.scorer.optim), loss, clip_norm=plan.scorer.optim.clip_norm),
        device,
        budget=budget,
    )


def training_step(
    optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], *, clip_norm: float | None
) -> Callable[[], None]:
    """A whole optimizer step, to be timed."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, math.inf if clip_norm is None else clip_norm)
        optimizer.step()

    return step


def median_seconds(work: Callable[[], object], device: torch.device, *, budget: float) -> float:
    """The median time of a call after the first one, which warms up; at least two calls in all."""
    times: list[float] = []
    deadline = time.monotonic() + budget
    while len(times) < 2 or (time.monotonic() < deadline and len(times) < 50):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    steady = sorted(times[1:])
    return max(steady[math.floor((len(steady) - 1) / 2)], 1e-9)
