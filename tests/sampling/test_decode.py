"""The decode loop draws from the right distribution, image by image, with both branches of guidance at every step."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from sampling import logits as logit_functions
from sampling.decode import Pruning, Sampled, Step, rows_that_fit, sample_codes, sample_steps
from sampling.likelihood import likelihood_ratio
from sampling.random_stream import uniforms
from sampling.settings import SamplingSettings
from sampling.step import Filters, Forced
from tessera.errors import UserError
from transformer.cache import KVCache
from transformer.decoder import Decoder
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


def sample(
    prior: Prior | Decoder,
    text_ids: Tensor,
    settings: SamplingSettings | list[SamplingSettings],
    *,
    seed: int = 3,
    **options,
) -> Sampled:
    count = len(text_ids)
    decoder = prior if isinstance(prior, Decoder) else Decoder(prior)
    seeds = options.pop("seeds", torch.full((count,), seed))
    image_index = options.pop("image_index", torch.arange(count))
    return sample_codes(decoder, text_ids, settings=settings, seeds=seeds, image_index=image_index, **options)


def filter_logits(logits: Tensor, settings: SamplingSettings) -> Tensor:
    filters = Filters.of([settings] * len(logits), codebook_size=logits.shape[1], device=logits.device)
    return filters(logits)


def uncached(prior: Prior, text_ids: Tensor, settings: SamplingSettings, *, seed: int = 3) -> Tensor:
    """The definition: a full teacher-forced pass for every position, both branches every time."""
    layout = prior.layout
    draws = uniforms(torch.full((len(text_ids),), seed), torch.arange(len(text_ids)), num_positions=layout.image_len)
    null = prior.null_text_ids()[None].expand_as(text_ids)
    codes = torch.zeros(len(text_ids), layout.image_len, dtype=torch.int64)
    weights = settings.guidance_weights(layout.image_len)
    for position in range(layout.image_len):
        conditional = prior(text_ids, codes).image_logits[:, position]
        unconditional = prior(null, codes).image_logits[:, position]
        mixed = unconditional + weights[position] * (conditional - unconditional)
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
    mixed = logit_functions.guidance(*(each.flatten(0, 1) for each in logits), weight=settings.guidance)
    probabilities = filter_logits(mixed, settings).softmax(dim=1).view(16, 2, 4)
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
    assert sample(prior, texts, SamplingSettings()).log_ratio.isnan().all()


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


class CountingDecoder(Decoder):
    """Counts the rows of each call."""

    prefilled: int = 0
    decoded: int = 0

    def prefill(self, text_ids: Tensor, cache: KVCache, codes: Tensor | None = None) -> Tensor:
        self.prefilled += len(text_ids)
        return super().prefill(text_ids, cache, codes)

    def decode(self, codes: Tensor, position: int | Tensor, cache: KVCache) -> Tensor:
        self.decoded += 1
        return super().decode(codes, position, cache)


def test_each_prompt_is_prefilled_once_and_guidance_takes_one_forward_per_step() -> None:
    decoder = CountingDecoder(random_prior())
    texts = random_texts(3).repeat_interleave(4, dim=0)
    sample(decoder, texts, SamplingSettings(guidance=2.0))
    assert decoder.prefilled == 3 + 1  # and the empty caption
    assert decoder.decoded == LAYOUT.image_len - 1  # nothing follows the last code


def test_progress_is_told_after_every_position_and_can_cancel() -> None:
    prior, texts = random_prior(), random_texts(5)
    steps: list[Step] = []
    sample(prior, texts, SamplingSettings(), max_rows=3, on_step=steps.append)
    assert [step.position for step in steps] == list(range(12)) * 2
    assert [step.images for step in steps[::12]] == [(0, 1, 2), (3, 4)]

    def stop(step: Step) -> None:
        if step.position == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(prior, texts, SamplingSettings(), on_step=stop)


def test_a_large_cache_means_fewer_rows_in_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(random_prior())
    assert rows_that_fit(decoder) == 256
    image_slots = 5 + 12 + 12 + 6  # what row, column, full and conv layers reach
    bytes_per_row = 2 * 32 * (4 * 5 + image_slots) * 4  # keys and values x channels x slots x float32
    assert decoder.new_cache(3).num_bytes == 3 * bytes_per_row
    monkeypatch.setattr("sampling.decode.usable_memory_bytes", lambda: 8 * 5 * bytes_per_row)
    assert rows_that_fit(decoder) == 5


def test_no_images_are_legal() -> None:
    sampled = sample(random_prior(), random_texts(0), SamplingSettings(guidance=2.0))
    assert sampled.codes.shape == (0, 12)
    assert sampled.log_ratio.shape == (0,)


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


def various(count: int) -> list[SamplingSettings]:
    """Settings of every kind, in turn."""
    kinds = [
        SamplingSettings(),
        SamplingSettings(temperature=0.0),
        SamplingSettings(guidance=3.0, top_k=4),
        SamplingSettings(top_p=0.7),
        SamplingSettings(guidance=2.0, guidance_schedule="power-cosine", temperature=1.3, min_p=0.05),
        SamplingSettings(guidance=0.0, top_k=9, top_p=0.9),
        SamplingSettings(guidance=5.0, guidance_schedule="linear", guidance_threshold=2.0),
    ]
    return [kinds[image % len(kinds)] for image in range(count)]


def test_requests_of_mixed_kind_give_what_each_gives_alone() -> None:
    decoder, count = Decoder(random_prior()), 60
    texts, settings, seeds = random_texts(count), various(count), torch.arange(count) % 11
    forced = Forced(torch.randint(0, 17, (count, 12)), torch.zeros(count, 12, dtype=torch.bool))
    forced.mask[::5, :4] = True  # completion
    forced.mask[1::5, 3:9] = True  # inpainting

    def draw(images: list[int]) -> Sampled:
        return sample(
            decoder,
            texts[images],
            [settings[image] for image in images],
            seeds=seeds[images],
            image_index=torch.tensor(images),
            forced=Forced(forced.codes[images], forced.mask[images]),
        )

    alone = [draw([image]) for image in range(count)]
    order = torch.randperm(count).tolist()
    for size in (2, 3, 8, 16):
        for first in range(0, count, size):
            images = order[first : first + size]
            mixed = draw(images)
            for place, image in enumerate(images):
                for figures, expected in zip(mixed, alone[image], strict=True):
                    torch.testing.assert_close(figures[place], expected[0], rtol=0, atol=0, equal_nan=True)


def test_guidance_follows_its_schedule() -> None:
    prior, texts = random_prior(), random_texts(6)
    for settings in (
        SamplingSettings(guidance=4.0, guidance_schedule="linear"),
        SamplingSettings(guidance=4.0, guidance_schedule="power-cosine", guidance_power=2.0),
        SamplingSettings(guidance=4.0, guidance_schedule="linear", guidance_threshold=2.5),
    ):
        assert torch.equal(sample(prior, texts, settings).codes, uncached(prior, texts, settings))


def test_codes_known_from_the_start_are_read_at_once_and_give_the_same_image() -> None:
    decoder, texts = CountingDecoder(random_prior()), random_texts(3)
    whole = sample(decoder, texts, SamplingSettings(guidance=2.0))
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[:, :7] = True
    decoder.decoded = 0
    completed = sample(decoder, texts, SamplingSettings(guidance=2.0), forced=Forced(whole.codes, mask))
    assert torch.equal(completed.codes, whole.codes)
    assert decoder.decoded == 12 - 7 - 1
    torch.testing.assert_close(completed.log_likelihood, whole.log_likelihood, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(completed.log_ratio, whole.log_ratio, atol=1e-4, rtol=1e-4)


def test_an_image_that_is_known_entirely_comes_back() -> None:
    codes = torch.randint(0, 17, (2, 12))
    sampled = sample(
        random_prior(), random_texts(2), SamplingSettings(), forced=Forced(codes, torch.ones(2, 12, dtype=torch.bool))
    )
    assert torch.equal(sampled.codes, codes)
    torch.testing.assert_close(sampled.context_log_likelihood, sampled.log_likelihood)


def test_the_likelihood_of_what_was_given_is_told_apart() -> None:
    prior, texts = random_prior(), random_texts(4)
    forced = Forced(torch.randint(0, 17, (4, 12)), torch.rand(4, 12) < 0.5)
    sampled = sample(prior, texts, SamplingSettings(), forced=forced)
    of_codes = prior(texts, sampled.codes).image_logits.log_softmax(dim=2).gather(2, sampled.codes[:, :, None])[..., 0]
    expected = (of_codes * forced.mask).sum(dim=1).double()
    torch.testing.assert_close(sampled.context_log_likelihood, expected, atol=1e-4, rtol=1e-4)
    assert not sample(prior, texts, SamplingSettings()).context_log_likelihood.any()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_pruning_keeps_the_likelier_candidates_of_each_group_and_changes_none(guidance: float) -> None:
    prior, texts = random_prior(), random_texts(3).repeat_interleave(4, dim=0)
    settings, groups = SamplingSettings(guidance=guidance), torch.arange(3).repeat_interleave(4)
    whole = sample(prior, texts, settings)
    steps: list[Step] = []
    pruned = sample(prior, texts, settings, pruning=Pruning(groups, after=0.5, keep=0.5), on_step=steps.append)
    assert pruned.is_finished.view(3, 4).sum(dim=1).tolist() == [2, 2, 2]
    assert torch.equal(pruned.codes[pruned.is_finished], whole.codes[pruned.is_finished])
    torch.testing.assert_close(
        pruned.log_ratio[pruned.is_finished], whole.log_ratio[pruned.is_finished], rtol=0, atol=0, equal_nan=True
    )
    assert [len(step.images) for step in steps] == [12] * 6 + [6] * 6
    assert steps[-1].images == tuple(pruned.is_finished.nonzero()[:, 0].tolist())
    # what was given up has the figures of the first half, and was no better than what stayed
    half = torch.zeros(12, 12, dtype=torch.bool)
    half[:, :6] = True
    texts_of = {"text": texts, "empty": prior.null_text_ids()[None].expand_as(texts)}
    so_far = {
        name: (
            prior(ids, whole.codes).image_logits.log_softmax(dim=2).gather(2, whole.codes[:, :, None])[..., 0] * half
        )
        .sum(dim=1)
        .double()
        for name, ids in texts_of.items()
    }
    score = so_far["text"] - (so_far["empty"] if guidance != 1 else 0)
    for group in range(3):
        own = groups == group
        assert score[own & pruned.is_finished].min() > score[own & ~pruned.is_finished].max()


def test_closing_the_generator_ends_the_work() -> None:
    decoder, texts = CountingDecoder(random_prior()), random_texts(2)
    steps = sample_steps(
        decoder,
        texts,
        settings=SamplingSettings(),
        seeds=torch.zeros(2, dtype=torch.int64),
        image_index=torch.arange(2),
    )
    for step in steps:
        if step.position == 3:
            break
    steps.close()
    assert decoder.decoded == 4
