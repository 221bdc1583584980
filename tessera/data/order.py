"""The order of training samples: a keyed permutation per epoch, computed and not stored.

Position p of epoch e maps to a sample through a four-round Feistel network over the next power of four, walked until it
lands below the number of samples (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Any position is
reached in O(1), so that resuming, workers and ranks need no state but the position.
"""

from typing import NamedTuple

import numpy as np

# The constants of the splitmix64 finalizer (Steele et al. 2014, "Fast splittable pseudorandom number generators").
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def mix(*values: int | np.ndarray) -> np.ndarray:
    """Hashes integers (broadcast against each other) into uint64: equal inputs, equal output, on any machine."""
    with np.errstate(over="ignore"):
        state = np.uint64(0)
        for value in values:
            state = (state ^ np.asarray(value).astype(np.uint64)) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * _MIX1
            state = (state ^ (state >> np.uint64(27))) * _MIX2
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def permuted(positions: np.ndarray, *, size: int, key: int) -> np.ndarray:
    """Where the keyed permutation of [0, size) sends `positions`.

    Args:
        positions: int64, each in [0, size).
        size: number of samples, at least 1.
        key: selects the permutation.
    """
    half_bits = max(1, (int(size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    value = positions.astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        left, right = value[outside] >> shift, value[outside] & mask
        for round_number in range(4):
            left, right = right, left ^ (mix(key, round_number, right) & mask)
        value[outside] = (left << shift) | right
        outside = value >= size
    return value.astype(np.int64)


class SampleKey(NamedTuple):
    """One draw of one sample.

    Attributes:
        index: which sample of the corpus.
        seed: what every random choice about this draw (augmentation, caption, dropout) is derived from; a function of
            (run seed, epoch, index) alone.
    """

    index: int
    seed: int


def sample_keys(start: int, count: int, *, size: int, seed: int) -> list[SampleKey]:
    """The draws at global positions start .. start + count - 1 of the endless stream of epochs."""
    positions = np.arange(start, start + count)
    epochs = positions // size
    index = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        index[chosen] = permuted(positions[chosen] % size, size=size, key=int(mix(seed, int(epoch), 1)))
    seeds = mix(seed, epochs, index) >> np.uint64(1)
    return [SampleKey(int(i), int(s)) for i, s in zip(index, seeds, strict=True)]
