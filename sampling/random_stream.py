"""Counter-based randomness: each image has a stream of its own, keyed by (seed, image index), one number per position.

A number is a pure function of (seed, image index, position). It does not matter which images share a batch, in which
order they are drawn, or on which device: the integers are exact everywhere.

Generator: Philox4x32-10 of Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011),
section 3.3, checked against the known answers published with it. The key is the 64-bit seed; the counter is
(position, image index low, image index high, stream).

Legend: B images, I positions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tessera.errors import UserError

MAX_SEED = 2**63 - 1  # largest int64: seeds travel in tensors

_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9  # golden ratio
_WEYL_1 = 0xBB67AE85  # square root of 3, minus 1
_MASK = 0xFFFFFFFF
_ROUNDS = 10


class Words(NamedTuple):
    """Four 32-bit words, each an int64 tensor of one common shape with values in [0, 2^32)."""

    w0: Tensor
    w1: Tensor
    w2: Tensor
    w3: Tensor


def philox4x32(counter: Words, key_low: Tensor, key_high: Tensor) -> Words:
    """Encrypt a 128-bit counter under a 64-bit key: four words that look random.

    Args:
        counter: four int64 tensors that broadcast together, values in [0, 2^32).
        key_low: int64, lower 32 bits of the key, broadcasts with the counter.
        key_high: int64, upper 32 bits of the key.

    Returns:
        Four int64 tensors of the common shape, values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        # The product wraps in int64, but its bits are those of the unsigned one; masks drop the sign after the shift.
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _MASK) ^ c1 ^ key_low,
            product_1 & _MASK,
            ((product_0 >> 32) & _MASK) ^ c3 ^ key_high,
            product_0 & _MASK,
        )
        key_low = (key_low + _WEYL_0) & _MASK
        key_high = (key_high + _WEYL_1) & _MASK
    return Words(*torch.broadcast_tensors(c0, c1, c2, c3))


def check_seed(seed: int) -> None:
    """Raise UserError unless 0 <= seed <= 2^63 - 1."""
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed is {seed}, expected an integer from 0 to {MAX_SEED}")


def uniforms(seeds: Tensor, image_index: Tensor, *, num_positions: int, stream: int = 0) -> Tensor:
    """Uniform numbers for every position of every image, 53 random bits each.

    Args:
        seeds: int64 [B], >= 0.
        image_index: int64 [B], >= 0: the number of the image within its prompt and seed.
        num_positions: I, how many numbers each image needs.
        stream: which of the 2^32 independent streams of an image; another purpose takes another one.

    Returns:
        float64 [B, I] in [0, 1).

    Raises:
        UserError: the two tensors have different shapes, or hold a negative number.
        ValueError: there is no such stream.
    """
    if not 0 <= stream <= _MASK:
        raise ValueError(f"stream must lie in [0, 2^32); got {stream}")
    if seeds.ndim != 1 or seeds.shape != image_index.shape:
        raise UserError(
            f"seeds have shape {tuple(seeds.shape)}, image_index {tuple(image_index.shape)}: expected [B] and [B]"
        )
    if bool((seeds < 0).any()) or bool((image_index < 0).any()):
        raise UserError("seeds and image_index must not be negative")
    position = torch.arange(num_positions, dtype=torch.int64, device=seeds.device)[None, :]  # [1, I]
    index = image_index[:, None]  # [B, 1]
    counter = Words(position, index & _MASK, index >> 32, torch.full_like(position, stream))
    words = philox4x32(counter, (seeds & _MASK)[:, None], (seeds >> 32)[:, None])  # [B, I] each
    return ((words.w0 >> 5) * 2**26 + (words.w1 >> 6)).to(torch.float64) * 2.0**-53
