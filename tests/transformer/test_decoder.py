"""A decoder predicts what its prior does, row by row, in every storage and for every mask."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from transformer.decoder import Decoder
from transformer.frozen_linear import Storage
from transformer.masks import MaskKind
from transformer.model import Prior, PriorConfig, SequenceLayout

# R rows, P prompts, T text positions, I image positions, K codebook size.

LAYOUT = SequenceLayout(text_len=5, grid_height=3, grid_width=4, text_vocab_size=20, codebook_size=17)
DIGITS = SequenceLayout(
    text_len=5, grid_height=3, grid_width=4, text_vocab_size=20, codebook_size=18, codebook_levels=(3, 3, 2)
)
ALL_KINDS: tuple[MaskKind, ...] = ("row", "column", "full", "conv")


def random_prior(
    attention: tuple[MaskKind, ...] = ALL_KINDS, *, layout: SequenceLayout = LAYOUT, **options: Any
) -> Prior:
    sizes: dict[str, Any] = {"dim": 32, "depth": len(attention), "heads": 2, "kernel_size": 3, **options}
    prior = Prior(PriorConfig(layout=layout, attention=attention, **sizes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return prior.eval()


def random_inputs(rows: int, layout: SequenceLayout = LAYOUT) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(0, layout.num_text_ids, (rows, layout.text_len), generator=generator)
    return text, torch.randint(0, layout.codebook_size, (rows, layout.image_len), generator=generator)


def decoded_logits(decoder: Decoder, text: Tensor, codes: Tensor, *, known: int = 0) -> Tensor:
    """The logits [R, I, K] of all codes: the first `known` codes fed with the text, the others one at a time."""
    cache = decoder.new_cache(len(text))
    logits = [decoder.prefill(text, cache, codes[:, :known] if known else None)]
    for position in range(known, decoder.layout.image_len - 1):
        logits.append(decoder.decode(codes[:, position], position, cache)[:, None])
    return torch.cat(logits, dim=1)


def expected_logits(prior: Prior, text: Tensor, codes: Tensor) -> Tensor:
    with torch.no_grad():
        return prior(text, codes).image_logits


VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"attention": ("full",)},
    "row": {"attention": ("row",)},
    "own-row": {"attention": ("row",), "row_mode": "own_row"},
    "column": {"attention": ("column",)},
    "conv": {"attention": ("conv",)},
    "conv-clip": {"attention": ("conv",), "conv_mode": "clip", "kernel_size": 5},
    "conv-quadrant": {"attention": ("conv",), "conv_mode": "quadrant", "kernel_size": 2},
    "conv-torus": {"attention": ("conv",), "conv_mode": "torus"},
    "conv-dilated": {"attention": ("conv",), "dilation": 2},
    "all": {"attention": ALL_KINDS},
    "grouped": {"heads": 4, "key_value_heads": 2},
    "one-key-head": {"heads": 4, "key_value_heads": 1},
    "other-wavelengths": {"rope_theta": 10.0, "mlp_ratio": 2.0},
    "digits": {"layout": DIGITS},
}


@pytest.mark.parametrize("known", [0, 1, 6, 11])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_logits_are_those_of_the_prior(variant: str, known: int) -> None:
    options = VARIANTS[variant]
    prior = random_prior(**options)
    text, codes = random_inputs(2, prior.layout)
    logits = decoded_logits(Decoder(prior), text, codes, known=known)
    assert logits.shape == (2, prior.layout.image_len, prior.layout.codebook_size)
    torch.testing.assert_close(logits, expected_logits(prior, text, codes), atol=1e-4, rtol=1e-4)


def test_every_gain_of_the_prior_counts() -> None:
    """Gains are multiplied into matrices and turns, where one could be left out."""
    text, codes = random_inputs(2)
    names = [name for name, _ in random_prior().named_parameters() if "norm" in name or "gain" in name]
    assert len(names) == 4 * 4 + 1
    for name in names:
        prior = random_prior()
        gain = prior.get_parameter(name)
        gain.data = torch.rand(gain.shape) * 3
        logits = decoded_logits(Decoder(prior), text, codes, known=3)
        torch.testing.assert_close(logits, expected_logits(prior, text, codes), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(logits, expected_logits(random_prior(), text, codes), atol=1e-3), name


@pytest.mark.parametrize(("weights", "tolerance"), [("bf16", 0.03), ("int8", 0.06)])
@pytest.mark.parametrize("layout", [LAYOUT, DIGITS], ids=["plain", "digits"])
def test_fewer_bits_stay_close(weights: Storage, tolerance: float, layout: SequenceLayout) -> None:
    prior = random_prior(layout=layout)
    text, codes = random_inputs(4, layout)
    exact = expected_logits(prior, text, codes)
    logits = decoded_logits(Decoder(prior, weights=weights), text, codes, known=2)
    assert logits.dtype == torch.float32
    assert 0 < float((logits - exact).square().mean().sqrt()) < tolerance * float(exact.std())


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("known", [0, 5])
def test_a_row_is_the_same_bit_for_bit_alone_and_in_every_batch(weights: Storage, known: int) -> None:
    # channels as of real priors, which libraries multiply in other ways than tiny ones
    prior = random_prior(dim=64 if weights != "fp32" else 256, heads=4, key_value_heads=2)
    decoder = Decoder(prior, weights=weights)
    assert decoder.row_independent
    text, codes = random_inputs(33)
    text[7:12] = text[6]
    together = decoded_logits(decoder, text, codes, known=known)
    order = torch.randperm(33)
    first = 0
    for rows in (1, 2, 3, 8, 16, 1, 1, 1):  # 33 in all
        batch = order[first : first + rows]
        assert torch.equal(decoded_logits(decoder, text[batch], codes[batch], known=known), together[batch])
        first += rows
    assert first == 33


def test_prompts_may_be_prefilled_together_where_rows_may_depend_on_each_other() -> None:
    prior = random_prior()
    text, codes = random_inputs(5)
    decoder = Decoder(prior, row_independent=False)
    assert not decoder.row_independent
    logits = decoded_logits(decoder, text, codes, known=4)
    torch.testing.assert_close(logits, expected_logits(prior, text, codes), atol=1e-4, rtol=1e-4)


def test_prefilled_codes_leave_the_cache_that_decoded_ones_do() -> None:
    decoder = Decoder(random_prior(("row", "column", "full", "conv"), key_value_heads=1))
    text, codes = random_inputs(2)
    at_once, one_by_one = decoder.new_cache(2), decoder.new_cache(2)
    decoder.prefill(text, at_once, codes[:, :9])
    decoder.prefill(text, one_by_one)
    for position in range(9):
        decoder.decode(codes[:, position], position, one_by_one)
    for first, second in zip(at_once.layers, one_by_one.layers, strict=True):
        torch.testing.assert_close(first.keys, second.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(first.values, second.values, atol=1e-5, rtol=1e-5)
        assert first.keys.any() and not torch.equal(first.keys[0], first.keys[1])


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_window_gives_what_its_positions_give_one_by_one(variant: str, weights: Storage) -> None:
    decoder = Decoder(random_prior(**VARIANTS[variant]), weights=weights)
    text, codes = random_inputs(2, decoder.layout)
    window, singly = decoder.new_cache(2, spare=3), decoder.new_cache(2, spare=3)
    decoder.prefill(text, window)
    decoder.prefill(text, singly)
    position = 0
    for width in (4, 1, 3, 2):
        wrong = (codes[:, position : position + 4] + 1) % decoder.layout.codebook_size
        if position + 4 < decoder.layout.image_len:
            decoder.decode_window(wrong, position, window)  # drafts that prove wrong leave no trace
        logits = decoder.decode_window(codes[:, position : position + width], position, window)
        for offset in range(width):
            expected = decoder.decode(codes[:, position + offset], position + offset, singly)
            assert torch.equal(logits[:, offset], expected)
        position += width


def test_candidates_share_one_prefilled_prompt() -> None:
    decoder = Decoder(random_prior())
    text, codes = random_inputs(2)
    shared = decoder.new_cache(2)
    decoder.prefill(text, shared)
    index = torch.tensor([1, 0, 1])
    alone = decoder.new_cache(3)
    decoder.prefill(text[index], alone)
    expanded = shared.expand(index)
    first = codes.flatten()[:3]
    assert torch.equal(decoder.decode(first, 0, expanded), decoder.decode(first, 0, alone))
    for layer in shared.layers:
        assert not layer.keys[:, :, LAYOUT.text_len :].any(), "decoding candidates must leave the prompt's cache alone"


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_later_changes_of_the_prior_are_not_seen(weights: Storage) -> None:
    prior = random_prior()
    text, codes = random_inputs(2)
    decoder = Decoder(prior, weights=weights)
    before = decoded_logits(decoder, text, codes, known=2)
    with torch.no_grad():
        for tensor in (*prior.parameters(), *prior.buffers()):
            tensor.zero_()
    assert torch.equal(decoded_logits(decoder, text, codes, known=2), before)


def test_a_decoder_keeps_no_prior() -> None:
    prior = random_prior()
    decoder, gone = Decoder(prior), weakref.ref(prior)
    del prior
    gc.collect()
    assert gone() is None
    assert decoder.null_text_ids().tolist() == [20, 21, 22, 23, 24]


def test_a_cache_is_as_large_as_its_masks_ask() -> None:
    decoder = Decoder(random_prior(heads=4, key_value_heads=2))
    image_slots = 5 + 12 + 12 + 6  # of row, column, full and conv in a grid of 3 x 4
    numbers = 2 * 2 * 8 * (4 * 5 + image_slots)  # keys and values x heads x channels x slots
    assert decoder.cache_bytes_per_row == 4 * numbers
    cache = decoder.new_cache(3)
    assert cache.num_bytes == 3 * 4 * numbers
    assert [layer.keys.shape[2] for layer in cache.layers] == [10, 17, 17, 11]


@pytest.mark.parametrize(("weights", "bytes_each"), [("fp32", 4), ("bf16", 2), ("int8", 1)])
def test_weight_bytes_are_those_of_the_matrices_of_which_the_head_is_fp32(weights: Storage, bytes_each: int) -> None:
    prior = random_prior(heads=4, key_value_heads=2)
    layers = sum(parameter.numel() for parameter in prior.blocks.parameters() if parameter.dim() == 2)
    expected = layers * bytes_each + 17 * 32 * 4
    assert Decoder(prior, weights=weights).weight_bytes == expected


def test_what_does_not_fit_the_layout_is_refused() -> None:
    decoder = Decoder(random_prior())
    text, codes = random_inputs(2)
    cache = decoder.new_cache(2)
    with pytest.raises(ValueError, match=r"text_ids must have shape \[prompts, 5\]; got \(2, 4\)"):
        decoder.prefill(text[:, :4], cache)
    with pytest.raises(ValueError, match=r"text_ids must have shape \[prompts, 5\]; got \(5,\)"):
        decoder.prefill(text[0], cache)
    with pytest.raises(ValueError, match=r"codes must have shape \[2, fewer than 12\]; got \(2, 12\)"):
        decoder.prefill(text, cache, codes)
    with pytest.raises(ValueError, match=r"codes must have shape \[2, fewer than 12\]; got \(1, 3\)"):
        decoder.prefill(text, cache, codes[:1, :3])
    with pytest.raises(ValueError, match="storage is one of fp32, bf16, int8; got 'fp8'"):
        Decoder(random_prior(), weights="fp8")  # type: ignore[arg-type]


def test_a_row_is_the_same_when_three_threads_share_the_work() -> None:
    layout = SequenceLayout(text_len=4, grid_height=2, grid_width=2, text_vocab_size=9, codebook_size=13)
    prior = Prior(PriorConfig(layout=layout, dim=256, depth=1, heads=4))
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_(std=0.3)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        decoder, codes = Decoder(prior.eval()), torch.arange(250) % 13
        text_ids = torch.randint(0, 13, (250, 4))
        cache = decoder.new_cache(250)
        decoder.prefill(text_ids, cache)
        together = decoder.decode(codes, 0, cache)
        for row in (0, 33, 66, 83, 84, 166, 167, 249):  # those at the ends of a thread's share, and others
            cache = decoder.new_cache(1)
            decoder.prefill(text_ids[row : row + 1], cache)
            assert torch.equal(decoder.decode(codes[row : row + 1], 0, cache)[0], together[row])
    finally:
        torch.set_num_threads(before)
