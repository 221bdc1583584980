"""Streams are those of Philox, look random in every direction, and belong to one image each."""

import math

import pytest
import torch
from torch import Tensor

from sampling.random_stream import MAX_SEED, Words, check_seed, philox4x32, uniforms
from tessera.errors import UserError


def stream(seeds: list[int], indices: list[int], num_positions: int = 16) -> Tensor:
    return uniforms(torch.tensor(seeds), torch.tensor(indices), num_positions=num_positions)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # known answers published with the generator (Random123, kat_vectors, philox4x32 10)
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, answer) -> None:
    words = philox4x32(Words(*map(torch.tensor, counter)), torch.tensor(key[0]), torch.tensor(key[1]))
    assert tuple(int(word) for word in words) == answer


def test_numbers_are_uniform() -> None:
    numbers = uniforms(torch.full((1000,), 3), torch.arange(1000), num_positions=256)
    count = numbers.numel()
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
    assert abs(float(numbers.mean()) - 1 / 2) < 4 * math.sqrt(1 / 12 / count)
    assert abs(float(numbers.var()) - 1 / 12) < 4 * math.sqrt(1 / 180 / count)
    observed = torch.histc(numbers, bins=256, min=0, max=1)
    chi_square = float(((observed - count / 256) ** 2 / (count / 256)).sum())
    assert abs(chi_square - 255) < 4 * math.sqrt(2 * 255)


@pytest.mark.parametrize("direction", ["position", "image index", "seed"])
def test_neighbors_are_not_correlated(direction: str) -> None:
    if direction == "seed":
        numbers = uniforms(torch.arange(500), torch.zeros(500, dtype=torch.int64), num_positions=500)
    else:
        numbers = uniforms(torch.full((500,), 7), torch.arange(500), num_positions=500)
    if direction == "position":
        numbers = numbers.T
    first, second = numbers[:-1].flatten(), numbers[1:].flatten()
    correlation = float(torch.corrcoef(torch.stack([first, second]))[0, 1])
    assert abs(correlation) < 4 / math.sqrt(first.numel())


def test_an_image_has_its_stream_whatever_is_drawn_beside_it() -> None:
    together = stream([5, 9, 5, 2**40], [0, 3, 1, 2**35])
    assert torch.equal(together[2], stream([5], [1])[0])
    assert torch.equal(together[3], stream([2**40], [2**35], 99)[0, :16])  # nor how many numbers are asked for


def test_every_bit_of_seed_and_index_counts() -> None:
    seeds = [0, 1, 2**31, 2**32, 2**62, MAX_SEED]
    rows = [tuple(stream([seed], [index])[0].tolist()) for seed in seeds for index in (0, 1, 2**32)]
    assert len(set(rows)) == len(rows)


def test_a_seed_out_of_range_is_refused() -> None:
    for seed in (-1, MAX_SEED + 1):
        with pytest.raises(UserError, match=f"seed is {seed}, expected an integer from 0 to"):
            check_seed(seed)
    with pytest.raises(UserError, match="must not be negative"):
        stream([-1], [0])
    with pytest.raises(UserError, match=r"\(2,\).*\(1,\)"):
        stream([1, 2], [0])
