"""The one decode loop: image codes out of a prior, one position at a time, with guidance and forced codes.

Each distinct prompt is prefilled once and shared by its candidates. Guidance is one forward of 2B rows, conditional
rows first, then the rows of the empty caption, in one cache. An image's codes depend on its prompt, seed, image index
and settings, not on what else is in the batch.

Legend: B images, R rows of one micro-batch, P distinct prompts in it, T text tokens, I image tokens, K codebook size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sampling import logits as logit_functions
from sampling.random_stream import uniforms
from tessera.errors import UserError
from tessera.precision import usable_memory_bytes
from transformer.cache import KVCache
from transformer.model import Prior

MAX_ROWS_CPU = 256  # beyond it cache and logits grow, and speed no longer does
MAX_ROWS_GPU = 1024
CACHE_SHARE = 8  # the cache of one forward takes at most one part in so many of the memory


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How codes are drawn from the prior's logits; filters apply in the order in which they stand here."""

    guidance: float = 1.0
    """Weight w of u + w (c - u): 0 ignores the prompt, 1 is off, above 1 follows the prompt more closely."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely code every time."""
    top_k: int = 0
    """Keep the k most likely codes; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely codes that sum to this probability; 1 keeps all."""
    min_p: float = 0.0
    """Keep codes at least this many times as likely as the most likely one; 0 keeps all."""

    def __post_init__(self) -> None:
        logit_functions.check_guidance(self.guidance)
        logit_functions.check_temperature(self.temperature)
        logit_functions.check_top_k(self.top_k)
        logit_functions.check_top_p(self.top_p)
        logit_functions.check_min_p(self.min_p)

    @property
    def guided(self) -> bool:
        """Whether the empty caption is decoded beside the prompt."""
        return self.guidance != 1.0


class Forced(NamedTuple):
    """Codes that are given instead of drawn: completion, inpainting, variations."""

    codes: Tensor
    """int64 [B, I]; read only where the mask is true."""
    mask: Tensor
    """bool [B, I]: true where the code is given."""


class Step(NamedTuple):
    """What the progress callback is told after each position; raising from the callback cancels the rest."""

    rows: range
    """Which images of the call this micro-batch holds."""
    position: int
    """The image position just filled, from 0."""
    codes: Tensor
    """int64 [R, I], filled up to and including `position`; to be read, not written."""


class Sampled(NamedTuple):
    """Codes and what the prior thinks of them, at temperature 1 and without filters whatever the settings."""

    codes: Tensor
    """int64 [B, I]."""
    log_likelihood: Tensor
    """log p(codes | text) in nats, float64 [B]."""
    log_ratio: Tensor | None
    """log p(codes | text) - log p(codes) in nats, float64 [B]; None without guidance (the second term is unknown)."""


@torch.inference_mode()
def sample_codes(
    prior: Prior,
    text_ids: Tensor,
    *,
    settings: SamplingSettings,
    seeds: Tensor,
    image_index: Tensor,
    forced: Forced | None = None,
    max_rows: int | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Sampled:
    """Draw the codes of B images.

    Args:
        prior: the model, in evaluation mode; its device decides where the work runs.
        text_ids: int64 [B, T], one row per image; equal rows are prefilled once per micro-batch.
        settings: how to draw.
        seeds: int64 [B], >= 0.
        image_index: int64 [B], >= 0: which candidate of its prompt and seed an image is.
        forced: codes to keep where their mask is true; None draws all.
        max_rows: most rows in one forward, >= 1 (guidance takes two rows per image); None takes `rows_that_fit`.
        on_step: called after each position of each micro-batch.

    Returns:
        Codes and log-likelihoods, on the prior's device.

    Raises:
        UserError: a shape or a value is wrong, or the prior returns logits that are not numbers.
    """
    device = next(prior.parameters()).device
    batch_size, image_len = text_ids.shape[0], prior.layout.image_len
    _check_inputs(prior, text_ids, seeds, image_index, forced)
    if max_rows is None:
        max_rows = rows_that_fit(prior)
    if max_rows < 1:
        raise UserError(f"max_rows is {max_rows}, expected at least 1")
    text_ids = text_ids.to(device)
    draws = uniforms(seeds.to(device), image_index.to(device), num_positions=image_len)  # [B, I]
    images_per_forward = max(1, max_rows // 2 if settings.guided else max_rows)
    parts: list[Sampled] = []
    for start in range(0, batch_size, images_per_forward):
        rows = range(start, min(start + images_per_forward, batch_size))
        here = slice(rows.start, rows.stop)
        part_forced = None if forced is None else Forced(forced.codes[here].to(device), forced.mask[here].to(device))
        parts.append(_sample_rows(prior, text_ids[here], draws[here], settings, part_forced, rows, on_step))
    if not parts:
        empty = torch.zeros(0, dtype=torch.float64, device=device)
        codes = torch.zeros(0, image_len, dtype=torch.int64, device=device)
        return Sampled(codes, empty, empty if settings.guided else None)
    ratios = [part.log_ratio for part in parts if part.log_ratio is not None]
    return Sampled(
        codes=torch.cat([part.codes for part in parts]),
        log_likelihood=torch.cat([part.log_likelihood for part in parts]),
        log_ratio=torch.cat(ratios) if ratios else None,
    )


def _sample_rows(
    prior: Prior,
    text_ids: Tensor,
    draws: Tensor,
    settings: SamplingSettings,
    forced: Forced | None,
    rows: range,
    on_step: Callable[[Step], None] | None,
) -> Sampled:
    """Decode one micro-batch of R images."""
    num_rows, image_len = draws.shape
    cache, logits = _prefill(prior, text_ids, guided=settings.guided)  # logits [R or 2R, K]
    codes = torch.zeros(num_rows, image_len, dtype=torch.int64, device=draws.device)
    log_likelihood = torch.zeros(logits.shape[0], dtype=torch.float64, device=draws.device)  # [R or 2R]
    for position in range(image_len):
        logits = logits.float()
        if settings.guided:
            conditional, unconditional = logits[:num_rows], logits[num_rows:]
            mixed = logit_functions.guidance(conditional, unconditional, weight=settings.guidance)
        else:
            mixed = logits
        drawn = logit_functions.choose(filter_logits(mixed, settings), draws[:, position])  # [R]
        if forced is not None:
            drawn = torch.where(forced.mask[:, position], forced.codes[:, position], drawn)
        codes[:, position] = drawn
        fed = torch.cat([drawn, drawn]) if settings.guided else drawn  # [R or 2R]
        chosen = logits.gather(1, fed[:, None])[:, 0]
        log_likelihood += chosen - logits.logsumexp(dim=1)
        if on_step is not None:
            on_step(Step(rows, position, codes))
        if position + 1 < image_len:
            logits = prior.decode(fed, position, cache)
    if not bool(log_likelihood.isfinite().all()):
        raise UserError(
            "the prior returned logits that are not finite numbers: its weights are damaged or its training diverged; "
            "train it again with a lower learning rate, or use precision fp32"
        )
    if not settings.guided:
        return Sampled(codes, log_likelihood, None)
    conditional, unconditional = log_likelihood[:num_rows], log_likelihood[num_rows:]
    return Sampled(codes, conditional, conditional - unconditional)


def _prefill(prior: Prior, text_ids: Tensor, *, guided: bool) -> tuple[KVCache, Tensor]:
    """Run each distinct prompt once and spread cache and logits over the R (guided: 2R) rows that share it."""
    prompts, row_prompt = torch.unique(text_ids, dim=0, return_inverse=True)  # [P, T], [R]
    if guided:
        null = prior.null_text_ids().to(text_ids.device)[None, :]  # [1, T]
        row_prompt = torch.cat([row_prompt, torch.full_like(row_prompt, prompts.shape[0])])
        prompts = torch.cat([prompts, null])
    # The dtype of what is written to it: of the first parameters, the embeddings, not of a head that may be in bf16.
    cache = prior.new_cache(prompts.shape[0], dtype=next(prior.parameters()).dtype)
    logits = prior.prefill(prompts, cache)  # [P, K]
    return cache.expand(row_prompt), logits[row_prompt]


def rows_that_fit(prior: Prior) -> int:
    """How many rows one forward should hold: enough to keep the hardware busy, bounded by the memory of the cache."""
    parameter = next(prior.parameters())
    bytes_per_row = prior.cache_bytes_per_row(parameter.dtype)
    if parameter.device.type == "cuda":
        memory_bytes, most = torch.cuda.get_device_properties(parameter.device).total_memory, MAX_ROWS_GPU
    else:
        memory_bytes, most = usable_memory_bytes(), MAX_ROWS_CPU
    return max(2, min(most, memory_bytes // CACHE_SHARE // bytes_per_row))


def filter_logits(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Apply temperature, top-k, top-p and min-p of `settings` to logits [B, K]."""
    logits = logit_functions.temperature(logits, settings.temperature)
    logits = logit_functions.top_k(logits, settings.top_k)
    logits = logit_functions.top_p(logits, settings.top_p)
    return logit_functions.min_p(logits, settings.min_p)


def _check_inputs(prior: Prior, text_ids: Tensor, seeds: Tensor, image_index: Tensor, forced: Forced | None) -> None:
    """Check shapes once, with expected and got in the message."""
    layout = prior.layout
    if text_ids.ndim != 2 or text_ids.shape[1] != layout.text_len:
        raise UserError(f"text_ids have shape {tuple(text_ids.shape)}, expected [B, {layout.text_len}]")
    batch = (text_ids.shape[0],)
    for name, tensor in (("seeds", seeds), ("image_index", image_index)):
        if tuple(tensor.shape) != batch:
            raise UserError(f"{name} have shape {tuple(tensor.shape)}, expected {batch}: one per row of text_ids")
    if forced is None:
        return
    expected = (text_ids.shape[0], layout.image_len)
    for name, tensor in (("codes", forced.codes), ("mask", forced.mask)):
        if tuple(tensor.shape) != expected:
            raise UserError(f"forced {name} have shape {tuple(tensor.shape)}, expected {expected}")
    given = forced.codes[forced.mask]
    if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < layout.codebook_size:
        raise UserError(
            f"forced codes range from {int(given.min())} to {int(given.max())}, "
            f"expected 0 to {layout.codebook_size - 1}"
        )
