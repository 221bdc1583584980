"""The one decode loop: image codes out of a prior, one position at a time, with guidance and forced codes.

Every image of a batch may have its own prompt, seed, settings and forced codes; what comes out depends on these alone,
not on what else is in the batch (see `transformer.decoder` for what that takes). Each distinct prompt is prefilled once
and shared by its candidates, together with the codes that are known from the start. Guidance is one forward: rows with
their prompts first, then a row of the empty caption for each image that is guided, in one cache.

Legend: B images, R images of one micro-batch, G guided ones among them, S = R + G rows of a forward, P distinct
prompts, T text tokens, I image tokens, K codebook size.
"""

import math
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sampling.graph import StepOnDevice, step_on_device
from sampling.jacobi import WINDOWS, jacobi_steps
from sampling.random_stream import uniforms
from sampling.settings import SamplingSettings
from sampling.step import Filters, Forced, State, advance, choose
from tessera.errors import UserError
from tessera.precision import usable_memory_bytes
from transformer.attention import choose_decode_backend
from transformer.decoder import Decoder

MAX_ROWS_CPU = 256  # beyond it cache and logits grow, and speed no longer does
MAX_ROWS_GPU = 1024
DETERMINISTIC_ROWS = 32
CACHE_SHARE = 8  # the cache of one forward takes at most one part in so many of the memory


class Pruning(NamedTuple):
    """When to give up candidates that look weak: halfway, say, the less likely half of each group."""

    groups: Tensor
    """int64 [B]: images of one number are candidates for the same place."""
    after: float = 0.5
    """Share of the image after which candidates are compared, in (0, 1)."""
    keep: float = 0.5
    """Share of the candidates of a group that goes on, in (0, 1]; at least one does."""


class Step(NamedTuple):
    """What is told after each position; who stops listening, or raises, cancels the rest."""

    images: tuple[int, ...]
    """Which images of the call this micro-batch holds, as R indices."""
    position: int
    """The image position just filled, from 0."""
    codes: Tensor
    """int64 [R, I], filled up to and including `position`; to be read, and copied by who wants to keep it."""


class Sampled(NamedTuple):
    """Codes and what the prior thinks of them, at temperature 1 and without filters whatever the settings."""

    codes: Tensor
    """int64 [B, I]; unfinished where `is_finished` is false."""
    log_likelihood: Tensor
    """log p(codes | text) in nats, float64 [B]."""
    log_ratio: Tensor
    """log p(codes | text) - log p(codes) in nats, float64 [B]; NaN without guidance (the second term is unknown)."""
    context_log_likelihood: Tensor
    """The part of `log_likelihood` that the forced codes have, float64 [B]: how well what was drawn fits them."""
    is_finished: Tensor
    """bool [B]: false for candidates that were pruned, whose figures end where they were."""


def sample_codes(
    decoder: Decoder,
    text_ids: Tensor,
    *,
    settings: SamplingSettings | Sequence[SamplingSettings],
    seeds: Tensor,
    image_index: Tensor,
    forced: Forced | None = None,
    stream: int = 0,
    pruning: Pruning | None = None,
    speculate: bool = True,
    max_rows: int | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Sampled:
    """Draw the codes of B images; see `sample_steps` for the arguments.

    Args:
        on_step: called after each position of each micro-batch; raising from it cancels the rest.

    Returns:
        Codes and log-likelihoods, on the decoder's device.

    Raises:
        UserError: see `sample_steps`.
    """
    steps = sample_steps(
        decoder,
        text_ids,
        settings=settings,
        seeds=seeds,
        image_index=image_index,
        forced=forced,
        stream=stream,
        pruning=pruning,
        speculate=speculate,
        max_rows=max_rows,
    )
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value
        if on_step is not None:
            on_step(step)


@torch.inference_mode()
def sample_steps(
    decoder: Decoder,
    text_ids: Tensor,
    *,
    settings: SamplingSettings | Sequence[SamplingSettings],
    seeds: Tensor,
    image_index: Tensor,
    forced: Forced | None = None,
    stream: int = 0,
    pruning: Pruning | None = None,
    speculate: bool = True,
    max_rows: int | None = None,
) -> Generator[Step, None, Sampled]:
    """Draw the codes of B images, position by position.

    Args:
        decoder: the prior, prepared for decoding; its device decides where the work runs.
        text_ids: int64 [B, T], one row per image; equal rows are prefilled once per micro-batch.
        settings: how to draw, for all images or one for each.
        seeds: int64 [B], >= 0.
        image_index: int64 [B], >= 0: which candidate of its prompt and seed an image is.
        forced: codes to keep where their mask is true; None draws all. Those at the start are prefilled with the text.
        stream: which of an image's random streams to draw from; see `sampling.random_stream.uniforms`.
        pruning: when to give up candidates; those of one group and micro-batch are compared by log p(codes | text) of
            the codes so far, less log p(codes) where they are guided. None finishes all.
        speculate: whether an image that is decoded alone on a CPU may take several positions in one forward; its codes
            are the same, see `sampling.jacobi`.
        max_rows: most rows in one forward, >= 1 (guidance takes two rows per image); None takes `rows_that_fit`.

    Yields:
        A `Step` after each position of each micro-batch that is drawn. Closing the generator cancels the rest.

    Returns:
        Codes and log-likelihoods, on the decoder's device.

    Raises:
        UserError: a shape or a value is wrong, or the prior returns logits that are not numbers.
    """
    batch_size, image_len, device = text_ids.shape[0], decoder.layout.image_len, decoder.device
    each = [settings] * batch_size if isinstance(settings, SamplingSettings) else list(settings)
    _check_inputs(decoder, text_ids, each, seeds, image_index, forced, pruning)
    if max_rows is None:
        max_rows = rows_that_fit(decoder)
    if max_rows < 1:
        raise UserError(f"max_rows is {max_rows}, expected at least 1")
    text_ids = text_ids.to(device)
    draws = uniforms(seeds.to(device), image_index.to(device), num_positions=image_len, stream=stream)  # [B, I]
    weights = {setting: setting.guidance_weights(image_len).to(device) for setting in set(each)}
    if forced is None:
        known_at_start = [0] * batch_size
    else:
        forced = Forced(forced.codes.to(device), forced.mask.to(device))
        known_at_start = forced.mask.long().cumprod(dim=1).sum(dim=1).clamp_max(image_len - 1).tolist()

    result = Sampled(
        codes=torch.zeros(batch_size, image_len, dtype=torch.int64, device=device),
        log_likelihood=torch.zeros(batch_size, dtype=torch.float64, device=device),
        log_ratio=torch.full((batch_size,), torch.nan, dtype=torch.float64, device=device),
        context_log_likelihood=torch.zeros(batch_size, dtype=torch.float64, device=device),
        is_finished=torch.ones(batch_size, dtype=torch.bool, device=device),
    )
    is_fixed = has_fixed_rows(decoder)
    for images in _micro_batches(each, known_at_start, max_rows, is_fixed=is_fixed):
        index = torch.tensor(images, device=device)
        part = _MicroBatch(
            images=tuple(images),
            num_images=len(set(images)),
            text_ids=text_ids[index],
            draws=draws[index],
            settings=[each[image] for image in images],
            guided=[row for row, image in enumerate(images) if is_fixed or each[image].guided],
            weights=torch.stack([weights[each[image]] for image in images]),
            forced=None if forced is None else Forced(forced.codes[index], forced.mask[index]),
            start=known_at_start[images[0]],
            groups=None if pruning is None else pruning.groups.to(device)[index],
        )
        sampled = yield from _sample(decoder, part, pruning, speculate=speculate)
        for whole, own in zip(result, sampled, strict=True):
            whole[index] = own
    if not bool(result.log_likelihood.isfinite().all()):
        raise UserError(
            "the prior returned logits that are not finite numbers: its weights are damaged or its training diverged; "
            "train it again with a lower learning rate, or use precision fp32"
        )
    return result


def rows_that_fit(decoder: Decoder) -> int:
    """How many rows one forward should hold: enough to keep the hardware busy, bounded by the memory of the cache.

    Where every forward has to have the same number of rows, on any GPU, it is `DETERMINISTIC_ROWS`.
    """
    if has_fixed_rows(decoder):
        return DETERMINISTIC_ROWS
    if decoder.device.type == "cuda":
        memory_bytes, most = torch.cuda.get_device_properties(decoder.device).total_memory, MAX_ROWS_GPU
    else:
        memory_bytes, most = usable_memory_bytes(), MAX_ROWS_CPU
    return max(2, min(most, memory_bytes // CACHE_SHARE // decoder.cache_bytes_per_row))


def has_fixed_rows(decoder: Decoder) -> bool:
    """Whether forwards are filled up to one number of rows: GPUs, unlike our CPU path, round by it."""
    return decoder.row_independent and decoder.device.type != "cpu"


class _MicroBatch(NamedTuple):
    """The R images of one forward, and what `_sample` needs to know of them."""

    images: tuple[int, ...]
    num_images: int  # different ones; what follows repeats the first
    text_ids: Tensor  # int64 [R, T]
    draws: Tensor  # float64 [R, I]
    settings: list[SamplingSettings]
    guided: list[int]  # the places of those with a row of the empty caption
    weights: Tensor  # float32 [R, I], of guidance
    forced: Forced | None
    start: int  # how many codes are known from the first one on; the same for all
    groups: Tensor | None  # int64 [R], of pruning


def _micro_batches(
    settings: Sequence[SamplingSettings], known_at_start: Sequence[int], max_rows: int, *, is_fixed: bool
) -> list[list[int]]:
    """Images that are decoded together: as many as fit, with equally many codes known at the start.

    Where the loop begins is then a matter of the image alone, and so is every rounding error. Libraries for GPUs choose
    their kernels by the number of rows: with `is_fixed` every batch is filled up, with repetitions of its first.
    """
    rows_of = [2 if setting.guided or is_fixed else 1 for setting in settings]
    batches: list[list[int]] = []
    rows, before = 0, -1
    for image in sorted(range(len(settings)), key=lambda image: known_at_start[image]):  # stable
        if not batches or rows + rows_of[image] > max_rows or known_at_start[image] != before:
            batches.append([])
            rows = 0
        batches[-1].append(image)
        rows, before = rows + rows_of[image], known_at_start[image]
    if is_fixed:
        for batch in batches:
            batch.extend([batch[0]] * (max(1, max_rows // 2) - len(batch)))
    return batches


def _sample(
    decoder: Decoder, part: _MicroBatch, pruning: Pruning | None, *, speculate: bool
) -> Generator[Step, None, Sampled]:
    """Decode one micro-batch of R images."""
    image_len, device = decoder.layout.image_len, part.draws.device
    is_alone = speculate and len(part.images) == 1 and device.type == "cpu"
    state = _prefill(decoder, part)
    codes = torch.empty_like(state.codes)
    log_probabilities = torch.full((2, *state.codes.shape), torch.nan, device=device)  # with prompts, without
    left = torch.arange(len(part.images), device=device)  # images that have not been given up

    def keep_figures() -> None:
        codes[left] = state.codes
        log_probabilities[0, left] = state.log_probabilities[: len(left)]
        log_probabilities[1, left[state.guided]] = state.log_probabilities[len(left) :]

    give_up_after = -1  # never
    if pruning is not None:
        give_up_after = min(max(part.start, round(pruning.after * image_len) - 1), image_len - 2)
    step = _captured(decoder, state, part.start)
    positions = jacobi_steps(decoder, state, part.start) if is_alone else range(part.start, image_len)
    try:
        for position in positions:
            if is_alone:
                pass  # jacobi_steps has filled it already
            elif position + 1 == image_len:
                choose(state, position)
            elif step is not None:
                step()
                state = step.state
            else:
                choose(state, position)
                advance(decoder, state, position)
            if len(left) == len(part.images):
                yield Step(part.images[: part.num_images], position, state.codes[: part.num_images])
            else:
                yield Step(tuple(part.images[row] for row in left.tolist()), position, state.codes)
            if position == give_up_after and pruning is not None:
                keep_figures()
                assert part.groups is not None
                best = _best(state, part.groups[left], pruning.keep)
                if len(best) < len(left):
                    state, left = state.select(best), left[best]
                    _release(step)
                    step = _captured(decoder, state, position + 1)
    finally:
        _release(step)
    keep_figures()
    is_guided = torch.tensor([setting.guided for setting in part.settings], device=device)
    conditional, unconditional = log_probabilities.double()  # [R, I] each
    log_likelihood = conditional.sum(dim=1)
    return Sampled(
        codes=codes,
        log_likelihood=log_likelihood,
        log_ratio=torch.where(is_guided, log_likelihood - unconditional.sum(dim=1), torch.nan),
        context_log_likelihood=(
            torch.zeros_like(log_likelihood) if part.forced is None else (conditional * part.forced.mask).sum(dim=1)
        ),
        is_finished=torch.isin(torch.arange(len(part.images), device=device), left),
    )


def _prefill(decoder: Decoder, part: _MicroBatch) -> State:
    """Run each distinct prompt with its known codes once, and spread what comes out over the rows that share it."""
    layout, device, start = decoder.layout, part.draws.device, part.start
    guided = torch.tensor(part.guided, dtype=torch.int64, device=device)  # [G]
    codes = torch.zeros(len(part.images), layout.image_len, dtype=torch.int64, device=device)  # [R, I]
    if part.forced is not None:
        codes[:, :start] = part.forced.codes[:, :start]
    known = torch.cat([part.text_ids, codes[:, :start]], dim=1)  # [R, T + start]
    without_prompt = known[guided]
    without_prompt[:, : layout.text_len] = decoder.null_text_ids()
    prompts, row_prompt = torch.unique(torch.cat([known, without_prompt]), dim=0, return_inverse=True)  # [P, ...], [S]
    text_ids, first_codes = prompts.split([layout.text_len, start], dim=1)
    # Also for images that are not alone: in a cache of another size keys stand, and are added up, in another order.
    cache = decoder.new_cache(len(prompts), spare=WINDOWS[-1] - 1 if device.type == "cpu" else 0)
    logits = decoder.prefill(text_ids, cache, first_codes)  # [P, start + 1, K]
    log_probabilities = logits.new_zeros(len(row_prompt), layout.image_len)  # [S, I]
    if start:
        of_codes = logits[:, :start].log_softmax(dim=2).gather(2, first_codes[:, :, None])[:, :, 0]  # [P, start]
        log_probabilities[:, :start] = of_codes[row_prompt]
    return State(
        cache=cache.expand(row_prompt),
        logits=logits[row_prompt, -1],
        fed=row_prompt.new_zeros(len(row_prompt)),
        codes=codes,
        log_probabilities=log_probabilities,
        guided=guided,
        draws=part.draws,
        weights=part.weights,
        filters=Filters.of(part.settings, codebook_size=layout.codebook_size, device=device),
        forced=part.forced,
    )


def _best(state: State, groups: Tensor, keep: float) -> Tensor:
    """Which of R images go on, ascending: the share of each group, int64 [R], that the prior likes best so far."""
    num_images = len(state.codes)
    scores = state.log_probabilities.double().sum(dim=1)  # [S]
    likelihood, empty = scores[:num_images], scores[num_images:]
    likelihood = likelihood.index_add(0, state.guided, -empty)
    kept = []
    for group in groups.unique().tolist():
        own = (groups == group).nonzero()[:, 0]
        most = max(1, math.ceil(keep * len(own)))
        kept.append(own[likelihood[own].sort(descending=True, stable=True).indices[:most]])
    return torch.cat(kept).sort().values


def _captured(decoder: Decoder, state: State, position: int) -> StepOnDevice | None:
    """The loop's step as a CUDA graph, where the position can be read on the device and a forward is left to do."""
    if decoder.device.type != "cuda" or position + 1 >= decoder.layout.image_len:
        return None
    backend = choose_decode_backend(
        device=decoder.device, head_dim=decoder.head_dim, dtype=decoder.dtype, backend=decoder.attention_backend
    )
    if backend != "triton":
        return None
    step = step_on_device(decoder, state, position)
    step.in_use = True
    return step


def _release(step: StepOnDevice | None) -> None:
    if step is not None:
        step.in_use = False


def _check_inputs(
    decoder: Decoder,
    text_ids: Tensor,
    settings: Sequence[SamplingSettings],
    seeds: Tensor,
    image_index: Tensor,
    forced: Forced | None,
    pruning: Pruning | None,
) -> None:
    """Check shapes once, with expected and got in the message."""
    layout = decoder.layout
    if text_ids.ndim != 2 or text_ids.shape[1] != layout.text_len:
        raise UserError(f"text_ids have shape {tuple(text_ids.shape)}, expected [B, {layout.text_len}]")
    batch = (text_ids.shape[0],)
    if len(settings) != text_ids.shape[0]:
        raise UserError(f"there are {len(settings)} settings for {text_ids.shape[0]} images, expected one, or one each")
    for name, tensor in (("seeds", seeds), ("image_index", image_index)):
        if tuple(tensor.shape) != batch:
            raise UserError(f"{name} have shape {tuple(tensor.shape)}, expected {batch}: one per row of text_ids")
    if pruning is not None:
        if tuple(pruning.groups.shape) != batch:
            raise UserError(f"pruning groups have shape {tuple(pruning.groups.shape)}, expected {batch}")
        if not 0 < pruning.after < 1 or not 0 < pruning.keep <= 1:
            raise UserError(
                f"pruning keeps {pruning.keep} after {pruning.after} of the image, expected shares in (0, 1] and (0, 1)"
            )
        if has_fixed_rows(decoder):
            raise UserError(
                "pruning changes the number of rows, on which rounding depends on a GPU: choose one of both"
            )
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
