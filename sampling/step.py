"""One position of the decode loop: from logits to a code for each image, and on to the logits of the next position.

Everything stays on the device. The position is a number, or a tensor there: a CUDA graph of one step then serves all.

Legend: R images, G guided ones among them, S = R + G rows of a forward (prompts first), I image tokens, K codebook
size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sampling import logits as logit_functions
from sampling.settings import SamplingSettings
from transformer.cache import KVCache
from transformer.decoder import Decoder


class Forced(NamedTuple):
    """Codes that are given instead of drawn: completion, inpainting, variations."""

    codes: Tensor
    """int64 [B, I]; read only where the mask is true."""
    mask: Tensor
    """bool [B, I]: true where the code is given."""


@dataclass(frozen=True, eq=False)
class Filters:
    """Temperature, top-k, top-p and min-p of R images; None where no image asks for it.

    Attributes:
        temperature: float32 [R].
        top_k: int64 [R].
        largest_k: the largest top_k that filters anything.
        top_p: float32 [R].
        min_p: float32 [R].
    """

    temperature: Tensor | None
    top_k: Tensor | None
    largest_k: int
    top_p: Tensor | None
    min_p: Tensor | None

    @classmethod
    def of(cls, settings: Sequence[SamplingSettings], *, codebook_size: int, device: torch.device) -> "Filters":
        """The filters of R images, one of `settings` each."""

        def column(name: str, neutral: float, dtype: torch.dtype = torch.float32) -> Tensor | None:
            values = [getattr(setting, name) for setting in settings]
            # whole numbers must not make a column of integers: a later batch may bring others into the same buffer
            is_neutral = all(value == neutral for value in values)
            return None if is_neutral else torch.tensor(values, device=device, dtype=dtype)

        filtering = [setting.top_k for setting in settings if 0 < setting.top_k < codebook_size]
        return cls(
            temperature=column("temperature", 1.0),
            top_k=column("top_k", 0, torch.int64) if filtering else None,
            largest_k=max(filtering, default=0),
            top_p=column("top_p", 1.0),
            min_p=column("min_p", 0.0),
        )

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [R, K] with what is filtered out at -inf."""
        if self.temperature is not None:
            logits = logit_functions.temperature(logits, self.temperature)
        if self.top_k is not None:
            logits = logit_functions.top_k(logits, self.top_k, largest=self.largest_k)
        if self.top_p is not None:
            logits = logit_functions.top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = logit_functions.min_p(logits, self.min_p)
        return logits

    def map(self, function: Callable[[Tensor], Tensor]) -> "Filters":
        """The same with a function applied to each tensor."""
        tensors = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        return replace(self, **{name: function(value) for name, value in tensors.items() if value is not None})


@dataclass(eq=False)
class State:
    """What a micro-batch of R images is at one position; a step changes it in place.

    Attributes:
        cache: keys and values of S rows, of all positions before.
        logits: float32 [S, K], of the next position.
        fed: int64 [S], the codes drawn last.
        codes: int64 [R, I], filled so far.
        log_probabilities: float32 [S, I], of the codes given the row's text, in nats; filled so far.
        guided: int64 [G], which images have a row of the empty caption.
        draws: float64 [R, I], one uniform number for each position.
        weights: float32 [R, I], of guidance.
        filters: temperature and the like.
        forced: codes that are given, or None.
    """

    cache: KVCache
    logits: Tensor
    fed: Tensor
    codes: Tensor
    log_probabilities: Tensor
    guided: Tensor
    draws: Tensor
    weights: Tensor
    filters: Filters
    forced: Forced | None

    def select(self, images: Tensor) -> "State":
        """The state of some of the images, int64 [fewer], ascending."""
        num_images = len(self.codes)
        is_left = torch.zeros(num_images, dtype=torch.bool, device=images.device)
        is_left[images] = True
        guided_left = is_left[self.guided]  # bool [G]
        rows = torch.cat([images, num_images + guided_left.nonzero()[:, 0]])
        place = is_left.long().cumsum(0) - 1  # of an image among those that are left
        return State(
            cache=self.cache.expand(rows),
            logits=self.logits[rows],
            fed=self.fed[rows],
            codes=self.codes[images],
            log_probabilities=self.log_probabilities[rows],
            guided=place[self.guided[guided_left]],
            draws=self.draws[images],
            weights=self.weights[images],
            filters=self.filters.map(lambda values: values[images]),
            forced=None if self.forced is None else Forced(self.forced.codes[images], self.forced.mask[images]),
        )


def choose(state: State, position: int | Tensor) -> None:
    """Fill image position `position`, 0-based, of every image."""
    num_images, num_guided = len(state.codes), len(state.guided)
    logits = state.logits
    mixed = logits[:num_images]
    if num_guided:
        empty = logits[num_images:]
        # an image without guidance stands in for its own other side: u + w (c - u) is then c, whatever w
        unconditional = empty if num_guided == num_images else mixed.index_copy(0, state.guided, empty)
        mixed = logit_functions.guidance(mixed, unconditional, weight=_column(state.weights, position))
    drawn = logit_functions.choose(state.filters(mixed), _column(state.draws, position))  # [R]
    if state.forced is not None:
        drawn = torch.where(_column(state.forced.mask, position), _column(state.forced.codes, position), drawn)
    _fill(state.codes, position, drawn)
    state.fed = torch.cat([drawn, drawn[state.guided]]) if num_guided else drawn
    _fill(state.log_probabilities, position, logits.log_softmax(dim=1).gather(1, state.fed[:, None])[:, 0])


def advance(decoder: Decoder, state: State, position: int | Tensor) -> None:
    """From the codes at `position` to the logits of position + 1."""
    state.logits = decoder.decode(state.fed, position, state.cache)


def _column(values: Tensor, position: int | Tensor) -> Tensor:
    """[R, I] to [R]."""
    return values.index_select(1, position)[:, 0] if isinstance(position, Tensor) else values[:, position]


def _fill(values: Tensor, position: int | Tensor, new: Tensor) -> None:
    """Write [R] to one column of [R, I]."""
    if isinstance(position, Tensor):
        values.index_copy_(1, position.long(), new[:, None].to(values.dtype))
    else:
        values[:, position] = new
