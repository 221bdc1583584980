"""The decode loop draws from the right distribution, image by image, with both branches of guidance at every step."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from sampling import logits as logit_functions
from sampling.bf16_weights import use_bf16_weights
from sampling.decode import Forced, Sampled, SamplingSettings, Step, filter_logits, rows_that_fit, sample_codes
from sampling.likelihood import likelihood_ratio
from sampling.random_stream import uniforms
from tessera.errors import UserError
from transformer.cache import KVCache
from transformer.masks import MaskKind
from transformer.model import Prior, PriorConfig, SequenceLayout

LAYOUT = SequenceLayout(text_len=5, grid_height=3, grid_width=4, text_vocab_size=20, codebook_size=17)


def random_prior(
    *, layout: SequenceLayout = LAYOUT, attention: tuple[MaskKind, ...] = ("row", "column", "full", "conv")
) -> Prior:
    prior = Prior(PriorConfig(layout=layout, dim=32, depth=len(attention), heads=2, attention=attention, kernel_size=3))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return prior.eval().requires_grad_(False)


def random_texts(count: int, layout: SequenceLayout = LAYOUT) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, layout.num_text_ids, (count, layout.text_len), generator=generator)


def sample(prior: Prior, text_ids: Tensor, settings: SamplingSettings, *, seed: int = 3, **options) -> Sampled:
    count = len(text_ids)
    seeds = options.pop("seeds", torch.full((count,), seed))
    image_index = options.pop("image_index", torch.arange(count))
    return sample_codes(prior, text_ids, settings=settings, seeds=seeds, image_index=image_index, **options)


def uncached(prior: Prior, text_ids: Tensor, settings: SamplingSettings, *, seed: int = 3) -> Tensor:
    """The definition: a full teacher-forced pass for every position, both branches every time."""
    layout = prior.layout
    draws = uniforms(torch.full((len(text_ids),), seed), torch.arange(len(text_ids)), num_positions=layout.image_len)
    null = prior.null_text_ids()[None].expand_as(text_ids)
    codes = torch.zeros(len(text_ids), layout.image_len, dtype=torch.int64)
    for position in range(layout.image_len):
        conditional = prior(text_ids, codes).image_logits[:, position]
        unconditional = prior(null, codes).image_logits[:, position]
        mixed = unconditional + settings.guidance * (conditional - unconditional)
        codes[:, position] = logit_functions.choose(filter_logits(mixed, settings), draws[:, position])
    return codes


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("attention", [("full",), ("row", "column"), ("conv",)], ids=lambda pattern: "-".join(pattern))
def test_the_loop_equals_uncached_guided_decoding(attention: tuple[MaskKind, ...], guidance: float) -> None:
    prior = random_prior(attention=attention)
    settings = SamplingSettings(guidance=guidance, temperature=0.8, top_k=12, top_p=0.95, min_p=0.01)
    texts = random_texts(6)
    assert torch.equal(sample(prior, texts, settings).codes, uncached(prior, texts, settings))


def test_guidance_0_ignores_the_prompt_and_guidance_3_does_not() -> None:
    prior, texts = random_prior(), random_texts(8)
    unconditional = sample(prior, prior.null_text_ids()[None].expand_as(texts), SamplingSettings()).codes
    assert torch.equal(sample(prior, texts, SamplingSettings(guidance=0.0)).codes, unconditional)
    conditional = sample(prior, texts, SamplingSettings()).codes
    guided = sample(prior, texts, SamplingSettings(guidance=3.0)).codes
    assert not torch.equal(conditional, unconditional)
    assert not torch.equal(guided, conditional)


@pytest.mark.parametrize("settings", [SamplingSettings(), SamplingSettings(guidance=2.0, temperature=0.7, top_k=2)])
def test_drawn_codes_follow_the_distribution(settings: SamplingSettings) -> None:
    layout = SequenceLayout(text_len=2, grid_height=1, grid_width=2, text_vocab_size=4, codebook_size=4)
    prior, count = random_prior(layout=layout), 6000
    text = random_texts(1, layout).expand(count, -1)
    codes = sample(prior, text, settings, max_rows=4096).codes

    pairs = torch.tensor(list(itertools.product(range(4), repeat=2)))  # [16, 2]
    null = prior.null_text_ids()[None].expand(16, -1)
    logits = [prior(ids, pairs).image_logits for ids in (text[:16], null)]  # [16, 2, 4] both
    mixed = logit_functions.guidance(*logits, weight=settings.guidance)
    probabilities = filter_logits(mixed.flatten(0, 1), settings).softmax(dim=1).view(16, 2, 4)
    expected = probabilities.gather(2, pairs[:, :, None])[:, :, 0].prod(dim=1) * count

    observed = torch.bincount(codes[:, 0] * 4 + codes[:, 1], minlength=16)
    possible = expected > 0
    assert not observed[~possible].any()
    freedom = int(possible.sum()) - 1
    chi_square = float(((observed - expected) ** 2 / expected)[possible].sum())
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_an_image_is_the_same_alone_and_in_any_batch(guidance: float) -> None:
    prior, settings = random_prior(), SamplingSettings(guidance=guidance, temperature=0.9)
    texts = random_texts(4).repeat_interleave(3, dim=0)  # 4 prompts x 3 candidates
    index = torch.arange(3).repeat(4)
    seeds = torch.tensor([7, 8, 7, 2**50]).repeat_interleave(3)

    def draw(rows: Tensor, **options) -> Tensor:
        return sample(prior, texts[rows], settings, seeds=seeds[rows], image_index=index[rows], **options).codes

    together = draw(torch.arange(12))
    assert len({tuple(row.tolist()) for row in together}) == 12
    for row in range(12):
        assert torch.equal(draw(torch.tensor([row]))[0], together[row])
    mixed = torch.randperm(12)
    assert torch.equal(draw(mixed), together[mixed])
    for max_rows in (1, 2, 5):
        assert torch.equal(draw(torch.arange(12), max_rows=max_rows), together)


def test_the_callers_tensors_are_left_alone() -> None:
    prior, texts = random_prior(), random_texts(3)
    seeds, index = torch.tensor([1, 2, 3]), torch.tensor([0, 1, 0])
    forced = Forced(torch.full((3, 12), 5), torch.rand(3, 12) < 0.5)
    tensors = (texts, seeds, index, *forced)
    before = [tensor.clone() for tensor in tensors]
    sample(prior, texts, SamplingSettings(guidance=4.0), seeds=seeds, image_index=index, forced=forced)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)


def test_log_likelihoods_are_those_of_a_teacher_forced_pass_whatever_the_settings() -> None:
    prior, texts = random_prior(), random_texts(5)
    sampled = sample(prior, texts, SamplingSettings(guidance=3.0, temperature=0.3, top_k=4))
    logits = prior(texts, sampled.codes).image_logits
    expected = logits.log_softmax(dim=2).gather(2, sampled.codes[:, :, None]).sum(dim=(1, 2))
    torch.testing.assert_close(sampled.log_likelihood.float(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sampled.log_ratio, likelihood_ratio(prior, sampled.codes, texts), atol=1e-4, rtol=1e-4)
    assert sample(prior, texts, SamplingSettings()).log_ratio is None


def test_forced_codes_stay_and_shape_what_follows_but_not_what_precedes() -> None:
    prior, texts = random_prior(), random_texts(4)
    free = sample(prior, texts, SamplingSettings()).codes
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[:, 5:7] = True
    wanted = (free + 1) % LAYOUT.codebook_size
    codes = sample(prior, texts, SamplingSettings(), forced=Forced(wanted, mask)).codes
    assert torch.equal(codes[mask], wanted[mask])
    assert torch.equal(codes[:, :5], free[:, :5])
    assert not torch.equal(codes[:, 7:], free[:, 7:])


def test_temperature_0_takes_the_most_likely_code_at_every_step() -> None:
    prior, texts = random_prior(), random_texts(3)
    codes = sample(prior, texts, SamplingSettings(temperature=0.0)).codes
    assert torch.equal(prior(texts, codes).image_logits.argmax(dim=2), codes)


class CountingPrior(Prior):
    """Counts the rows of each call."""

    prefilled: int = 0
    decoded: int = 0

    def prefill(self, text_ids: Tensor, cache: KVCache) -> Tensor:
        self.prefilled += len(text_ids)
        return super().prefill(text_ids, cache)

    def decode(self, codes: Tensor, position: int | Tensor, cache: KVCache) -> Tensor:
        self.decoded += 1
        return super().decode(codes, position, cache)


def test_each_prompt_is_prefilled_once_and_guidance_takes_one_forward_per_step() -> None:
    prior = CountingPrior(PriorConfig(layout=LAYOUT, dim=16, depth=1, heads=2)).eval()
    texts = random_texts(3).repeat_interleave(4, dim=0)
    sample(prior, texts, SamplingSettings(guidance=2.0))
    assert prior.prefilled == 3 + 1  # and the empty caption
    assert prior.decoded == LAYOUT.image_len - 1  # nothing follows the last code


def test_progress_is_told_after_every_position_and_can_cancel() -> None:
    prior, texts = random_prior(), random_texts(5)
    steps: list[Step] = []
    sample(prior, texts, SamplingSettings(), max_rows=3, on_step=steps.append)
    assert [step.position for step in steps] == list(range(12)) * 2
    assert [step.rows for step in steps[::12]] == [range(3), range(3, 5)]

    def stop(step: Step) -> None:
        if step.position == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(prior, texts, SamplingSettings(), on_step=stop)


def test_a_large_cache_means_fewer_rows_in_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = random_prior()
    assert rows_that_fit(prior) == 256
    image_slots = 5 + 12 + 12 + 6  # what row, column, full and conv layers reach
    bytes_per_row = 2 * 32 * (4 * 5 + image_slots) * 4  # keys and values x channels x slots x float32
    assert prior.new_cache(3).num_bytes == 3 * bytes_per_row
    monkeypatch.setattr("sampling.decode.usable_memory_bytes", lambda: 8 * 5 * bytes_per_row)
    assert rows_that_fit(prior) == 5


def test_no_images_are_legal() -> None:
    sampled = sample(random_prior(), random_texts(0), SamplingSettings(guidance=2.0))
    assert sampled.codes.shape == (0, 12)
    assert sampled.log_ratio is not None and sampled.log_ratio.shape == (0,)


def test_a_prior_that_returns_nan_is_reported() -> None:
    prior = random_prior()
    prior.norm.weight.fill_(math.nan)
    with pytest.raises(UserError, match="not finite numbers"):
        sample(prior, random_texts(2), SamplingSettings())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_ids": torch.zeros(2, 4, dtype=torch.int64)}, r"\(2, 4\), expected \[B, 5\]"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, r"seeds have shape \(3,\), expected \(2,\)"),
        ({"image_index": torch.zeros(1, dtype=torch.int64)}, r"image_index have shape \(1,\)"),
        ({"max_rows": 0}, "max_rows is 0"),
        (
            {"forced": Forced(torch.zeros(2, 9, dtype=torch.int64), torch.ones(2, 12, dtype=torch.bool))},
            r"forced codes have shape \(2, 9\), expected \(2, 12\)",
        ),
        (
            {"forced": Forced(torch.full((2, 12), 17), torch.ones(2, 12, dtype=torch.bool))},
            "range from 17 to 17, expected 0 to 16",
        ),
    ],
)
def test_wrong_inputs_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample(random_prior(), change.pop("text_ids", random_texts(2)), SamplingSettings(), **change)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"min_p": 2.0}, {"guidance": -1.0}]
)
def test_settings_out_of_range_are_refused_when_they_are_made(wrong: dict) -> None:
    with pytest.raises(UserError, match="expected"):
        SamplingSettings(**wrong)


def test_bf16_weights_keep_the_rest_in_fp32_and_stay_close() -> None:
    prior, texts = random_prior(), random_texts(4)
    codes = sample(prior, texts, SamplingSettings()).codes
    expected = prior(texts, codes).image_logits
    use_bf16_weights(prior)
    assert prior.text_head.weight.dtype == torch.bfloat16
    assert prior.text_embedding.weight.dtype == torch.float32
    actual = prior(texts, codes).image_logits
    assert actual.dtype == torch.float32
    assert 0 < float((actual - expected).abs().max()) < 0.1 * float(expected.std())
    again = sample(prior, texts, SamplingSettings(guidance=2.0))
    torch.testing.assert_close(again.log_ratio, likelihood_ratio(prior, again.codes, texts), atol=0.2, rtol=0.05)
