"""Several codes of one image per forward, and exactly those of the plain loop: Jacobi decoding with fixed noise.

At batch 1 a forward of eight positions costs little more than one of one position: reading the weights is what takes
time. So codes further on are drafted, fed together with the last known one, and drawn anew from the logits that come
out, each with the random number of its own position. Up to the first one that differs from its draft, all were drawn
after the right codes: they are what the plain loop draws, in the same rounding. What was drawn after a wrong draft is
the next draft (Teng et al. 2024, "Speculative Jacobi Decoding", 2410.01699, section 3); theirs accepts by a test of
probabilities and keeps the distribution, ours compares and keeps the very image. The first draft of a position is a
copy of the code above, or to the left in the first row.

How many positions are fed follows from how often drafts were right lately.

Legend: W positions of a window, S rows of a forward (1, or 2 with guidance), I image tokens, K codebook size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sampling.step import Forced, State, advance, choose
from transformer.decoder import Decoder

WINDOWS = (1, 2, 4, 8)
"""How many positions one forward may take."""
_COSTS = (1.0, 1.4, 1.7, 2.3)  # of such forwards and what goes with them, as multiples of the first; 256 channels
_MEMORY = 0.9  # of the running share of drafts that were right, per draft


def jacobi_steps(decoder: Decoder, state: State, start: int) -> Iterator[int]:
    """Fill the codes of one image from `start` on, as `choose` and `advance` in turns would.

    Args:
        decoder: predicts the codes; on a CPU.
        state: of one image, with the logits of `start`, and a cache with positions to spare.
        start: the first position to fill.

    Yields:
        Each position once it is filled.
    """
    image_len, width = decoder.layout.image_len, decoder.layout.grid_width
    drafts = torch.zeros(image_len + 1, dtype=torch.int64)
    drafted_to = start + 1  # beyond it there are no drafts yet
    right_share = 0.5
    choose(state, start)
    yield start
    position = start
    while position + 1 < image_len:
        drafts[position] = state.codes[0, position]
        count = min(_window(right_share), image_len - 1 - position)
        for place in range(max(drafted_to, position + 1), position + count + 1):
            drafts[place] = drafts[place - width] if place >= width else drafts[place - 1]
            if state.forced is not None and place < image_len and state.forced.mask[0, place]:
                drafts[place] = state.forced.codes[0, place]
        drafted_to = max(drafted_to, position + count + 1)
        ahead = slice(position + 1, position + 1 + count)
        window = state
        if count == 1:
            advance(decoder, state, position)
            choose(state, position + 1)
            new = state.codes[0, ahead]
        else:
            fed = drafts[position : position + count].expand(len(state.fed), -1)  # [S, W]
            window = _at_positions(state, decoder.decode_window(fed, position, state.cache), position + 1)
            choose(window, 0)
            new = window.codes[:, 0]  # [W]
        is_right = (new == drafts[ahead]).tolist()
        num_right = is_right.index(False) if False in is_right else count
        num_known = min(num_right + 1, count)
        if count > 1:
            _keep(state, window, position + 1, num_known)
        drafts[ahead] = new
        for was_right in is_right[:num_known]:
            right_share = _MEMORY * right_share + (1 - _MEMORY) * was_right
        for place in range(position + 1, position + 1 + num_known):
            yield place
        position += num_known


def _window(right_share: float) -> int:
    """How many positions to feed: the most codes per time, if each draft is right with this probability."""

    def codes_per_time(place: int) -> float:
        return sum(right_share**draft for draft in range(WINDOWS[place])) / _COSTS[place]

    return WINDOWS[max(range(len(WINDOWS)), key=codes_per_time)]


def _at_positions(state: State, logits: Tensor, first: int) -> State:
    """The W positions of a window as W images of one position each, so that one call of `choose` fills them all.

    Args:
        state: of one image.
        logits: float32 [S, W, K].
        first: position of the first.
    """
    rows, count, _ = logits.shape
    here = slice(first, first + count)
    forced = state.forced
    return State(
        cache=state.cache,
        logits=logits.flatten(0, 1),
        fed=state.fed,
        codes=state.codes.new_zeros(count, 1),
        log_probabilities=state.log_probabilities.new_zeros(rows * count, 1),
        guided=torch.arange(count if rows == 2 else 0),
        draws=state.draws[0, here, None],
        weights=state.weights[0, here, None],
        filters=state.filters.map(lambda values: values.expand(count)),
        forced=None if forced is None else Forced(forced.codes[0, here, None], forced.mask[0, here, None]),
    )


def _keep(state: State, window: State, first: int, count: int) -> None:
    """Write the first `count` positions of a window to the image."""
    here = slice(first, first + count)
    state.codes[0, here] = window.codes[:count, 0]
    by_row = window.log_probabilities.view(len(state.log_probabilities), -1)  # [S, W]
    state.log_probabilities[:, here] = by_row[:, :count]
    state.fed = state.codes[0, first + count - 1].expand(len(state.fed))
