"""Several codes per forward are the codes of the plain loop, bit for bit, and fewer forwards where drafts are right."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from sampling.decode import Sampled, sample_codes
from sampling.jacobi import WINDOWS, _window
from sampling.settings import SamplingSettings
from sampling.step import Forced
from transformer.cache import KVCache
from transformer.decoder import Decoder
from transformer.masks import ConvMode, MaskKind
from transformer.model import Prior, PriorConfig, SequenceLayout

LAYOUT = SequenceLayout(text_len=5, grid_height=6, grid_width=5, text_vocab_size=20, codebook_size=7)


def random_prior(layout: SequenceLayout = LAYOUT, std: float = 0.3, **config) -> Prior:
    prior = Prior(PriorConfig(layout=layout, dim=32, depth=2, heads=4, kernel_size=3, **config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return prior.eval().requires_grad_(False)


def draw(decoder: Decoder, settings: SamplingSettings, *, seed: int = 0, speculate: bool, **options) -> Sampled:
    text = torch.arange(decoder.layout.text_len)[None] + seed % 3
    seeds, index = torch.tensor([seed]), torch.tensor([0])
    return sample_codes(
        decoder, text, settings=settings, seeds=seeds, image_index=index, speculate=speculate, **options
    )


def assert_same(one: Sampled, other: Sampled) -> None:
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("kinds", "conv_mode"),
    [(("full",), "raster"), (("row", "column"), "raster"), (("conv",), "raster"), (("row", "conv"), "torus")],
    ids=["full", "row-column", "conv", "row-torus"],
)
@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(),
        SamplingSettings(guidance=3.0, guidance_schedule="linear", temperature=0.7, top_k=5, top_p=0.9),
        SamplingSettings(temperature=0.0, min_p=0.1),
    ],
    ids=["plain", "guided", "greedy"],
)
def test_the_image_is_that_of_the_plain_loop(
    kinds: tuple[MaskKind, ...], conv_mode: ConvMode, settings: SamplingSettings
) -> None:
    decoder = Decoder(random_prior(attention=kinds, conv_mode=conv_mode, key_value_heads=2))
    for seed in range(4):
        plain = draw(decoder, settings, seed=seed, speculate=False)
        assert_same(draw(decoder, settings, seed=seed, speculate=True), plain)


def test_forced_codes_are_kept_and_are_good_drafts() -> None:
    decoder = CountingDecoder(random_prior(std=0.02))  # flat: what is not given is seldom guessed
    codes, mask = torch.randint(0, 7, (1, 30)), torch.ones(1, 30, dtype=torch.bool)
    mask[0, 2:6] = False
    plain = draw(decoder, SamplingSettings(), speculate=False, forced=Forced(codes, mask))
    decoder.passes = 0
    assert_same(draw(decoder, SamplingSettings(), speculate=True, forced=Forced(codes, mask)), plain)
    assert decoder.passes < 27 / 2


class CountingDecoder(Decoder):
    """Counts forwards."""

    passes: int = 0

    def decode(self, codes: Tensor, position: int | Tensor, cache: KVCache) -> Tensor:
        self.passes += 1
        return super().decode(codes, position, cache)

    def decode_window(self, codes: Tensor, position: int, cache: KVCache) -> Tensor:
        self.passes += 1
        return super().decode_window(codes, position, cache)


def test_a_picture_of_one_color_takes_few_forwards_and_noise_no_more_than_the_plain_loop() -> None:
    prior = random_prior()
    assert prior.image_head.own.weight.shape[0] == 7
    prior.image_head.own.weight[:] = 0  # every code is as likely as the others
    noise = CountingDecoder(prior)
    draw(noise, SamplingSettings(), speculate=True)
    assert noise.passes <= 29
    same = CountingDecoder(prior)
    draw(same, SamplingSettings(temperature=0.0), speculate=True)  # the first of equals: code 0 everywhere
    assert same.passes <= 10


def test_each_position_is_told_in_order_and_images_that_share_a_batch_take_the_plain_loop() -> None:
    decoder, positions = CountingDecoder(random_prior()), []
    draw(
        decoder, SamplingSettings(temperature=0.0), speculate=True, on_step=lambda step: positions.append(step.position)
    )
    assert positions == list(range(30))
    decoder.passes = 0
    text = torch.zeros(2, 5, dtype=torch.int64)
    sample_codes(decoder, text, settings=SamplingSettings(), seeds=torch.zeros(2).long(), image_index=torch.arange(2))
    assert decoder.passes == 29


def test_drawn_codes_follow_the_distribution() -> None:
    layout = SequenceLayout(text_len=2, grid_height=1, grid_width=3, text_vocab_size=4, codebook_size=2)
    prior, count = random_prior(layout), 600
    decoder, observed = Decoder(prior), torch.zeros(2, 2, 2)
    for index in range(count):
        (codes,) = sample_codes(
            decoder,
            torch.zeros(1, 2, dtype=torch.int64),
            settings=SamplingSettings(),
            seeds=torch.tensor([1]),
            image_index=torch.tensor([index]),
        ).codes.tolist()
        observed[tuple(codes)] += 1
    every = torch.tensor(list(itertools.product(range(2), repeat=3)))  # [8, 3]
    chances = prior(torch.zeros(8, 2, dtype=torch.int64), every).image_logits.log_softmax(dim=2)
    expected = chances.gather(2, every[:, :, None]).sum(dim=(1, 2)).exp() * count
    chi_square = float(((observed.flatten() - expected) ** 2 / expected).sum())
    assert chi_square < 7 + 4 * math.sqrt(2 * 7)


def test_the_window_grows_with_the_share_of_right_drafts() -> None:
    sizes = [_window(share / 20) for share in range(21)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1 and sizes[-1] == WINDOWS[-1]
