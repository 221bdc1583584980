"""One step draws for each image what it would draw for it alone, whatever the others ask for."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sampling.settings import SamplingSettings
from sampling.step import Filters, Forced, State, advance, choose
from transformer.cache import KVCache
from transformer.decoder import Decoder
from transformer.model import Prior, PriorConfig, SequenceLayout

# R images, G guided ones among them, S = R + G rows of a forward, I image tokens, K codebook size.

LAYOUT = SequenceLayout(text_len=3, grid_height=2, grid_width=3, text_vocab_size=9, codebook_size=13)
NUM_CODES, IMAGE_LEN = LAYOUT.codebook_size, LAYOUT.image_len
KINDS = [
    SamplingSettings(),
    SamplingSettings(guidance=3.0),
    SamplingSettings(temperature=0.0),
    SamplingSettings(guidance=2.0, guidance_schedule="linear", top_k=4),
    SamplingSettings(guidance=0.0, top_p=0.6),
    SamplingSettings(min_p=0.2, temperature=1.7),
    SamplingSettings(guidance=5.0, top_k=7, top_p=0.8, temperature=0.5),
]


def random_decoder() -> Decoder:
    prior = Prior(PriorConfig(layout=LAYOUT, dim=16, depth=2, heads=2, attention=("row", "full")))
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return Decoder(prior.eval())


def random_state(decoder: Decoder, settings: list[SamplingSettings], *, forced: bool = False) -> State:
    """Of one image for each of the settings, at its first position."""
    count = len(settings)
    guided = torch.tensor([image for image, setting in enumerate(settings) if setting.guided], dtype=torch.int64)
    rows = count + len(guided)
    cache = decoder.new_cache(rows)
    texts = torch.randint(0, LAYOUT.num_text_ids, (rows, LAYOUT.text_len))
    with torch.inference_mode():
        logits = decoder.prefill(texts, cache)[:, -1]
    mask = torch.rand(count, IMAGE_LEN) < 0.4
    return State(
        cache=cache,
        logits=logits.clone(),
        fed=torch.zeros(rows, dtype=torch.int64),
        codes=torch.zeros(count, IMAGE_LEN, dtype=torch.int64),
        log_probabilities=torch.zeros(rows, IMAGE_LEN),
        guided=guided,
        draws=torch.rand(count, IMAGE_LEN, dtype=torch.float64),
        weights=torch.stack([setting.guidance_weights(IMAGE_LEN) for setting in settings]),
        filters=Filters.of(settings, codebook_size=NUM_CODES, device=torch.device("cpu")),
        forced=Forced(torch.randint(0, NUM_CODES, (count, IMAGE_LEN)), mask) if forced else None,
    )


def rows_of(state: State, images: list[int]) -> list[int]:
    """The rows of the forward that belong to some of the images, prompts first."""
    guided = state.guided.tolist()
    return images + [len(state.codes) + guided.index(image) for image in images if image in guided]


def some_images(state: State, settings: list[SamplingSettings], images: list[int]) -> State:
    """A state of some of the images, made anew from what is theirs; the cache is shared."""
    rows, chosen = rows_of(state, images), [settings[image] for image in images]
    return replace(
        state,
        logits=state.logits[rows],
        fed=state.fed[rows],
        codes=state.codes[images],
        log_probabilities=state.log_probabilities[rows],
        guided=torch.tensor([place for place, setting in enumerate(chosen) if setting.guided], dtype=torch.int64),
        draws=state.draws[images],
        weights=state.weights[images],
        filters=Filters.of(chosen, codebook_size=NUM_CODES, device=torch.device("cpu")),
        forced=None if state.forced is None else Forced(*(tensor[images] for tensor in state.forced)),
    )


@pytest.mark.parametrize("position", [0, 3])
@pytest.mark.parametrize("forced", [False, True])
def test_images_of_mixed_kind_draw_what_each_draws_alone(position: int, forced: bool) -> None:
    settings = KINDS * 3
    state = random_state(random_decoder(), settings, forced=forced)
    groups = [[image] for image in range(len(settings))]
    groups += [
        [image for image, setting in enumerate(settings) if setting.guided == guided] for guided in (True, False)
    ]
    apart = [some_images(state, settings, images) for images in groups]
    choose(state, position)
    assert len(set(state.codes[:, position].tolist())) > 3
    for images, one in zip(groups, apart, strict=True):
        choose(one, position)
        assert torch.equal(one.codes, state.codes[images])
        rows = rows_of(state, images)
        assert torch.equal(one.fed, state.fed[rows])
        assert torch.equal(one.log_probabilities, state.log_probabilities[rows])


@pytest.mark.parametrize("forced", [False, True])
def test_a_position_on_the_device_is_the_same_as_a_number(forced: bool) -> None:
    decoder = random_decoder()
    state = random_state(decoder, KINDS, forced=forced)
    images = list(range(len(KINDS)))
    other = some_images(state, KINDS, images)
    choose(state, 4)
    choose(other, torch.tensor([4], dtype=torch.int32))
    assert torch.equal(state.codes, other.codes) and state.codes[:, 4].any()
    assert not state.codes[:, [0, 1, 2, 3, 5]].any()
    assert torch.equal(state.log_probabilities, other.log_probabilities)
    assert torch.equal(state.fed, other.fed)


def test_both_rows_of_a_guided_image_are_fed_the_code_that_was_drawn() -> None:
    state = random_state(random_decoder(), KINDS)
    choose(state, 0)
    assert state.guided.tolist() == [1, 3, 4, 6]
    assert state.fed.tolist() == [*state.codes[:, 0].tolist(), *state.codes[[1, 3, 4, 6], 0].tolist()]


def test_likelihoods_are_those_of_each_row_without_guidance_and_filters() -> None:
    state = random_state(random_decoder(), KINDS, forced=True)
    logits = state.logits.clone()
    choose(state, 2)
    expected = logits.log_softmax(dim=1).gather(1, state.fed[:, None])[:, 0]
    torch.testing.assert_close(state.log_probabilities[:, 2], expected)
    assert torch.equal(state.logits, logits)


def test_given_codes_replace_drawn_ones_where_the_mask_says_so() -> None:
    settings = KINDS * 3
    state = random_state(random_decoder(), settings, forced=True)
    assert state.forced is not None
    images = list(range(len(settings)))
    free = replace(some_images(state, settings, images), forced=None)
    choose(state, 1)
    choose(free, 1)
    expected = torch.where(state.forced.mask[:, 1], state.forced.codes[:, 1], free.codes[:, 1])
    assert torch.equal(state.codes[:, 1], expected)
    assert 0 < int((expected != free.codes[:, 1]).sum()) < len(settings)


def test_advancing_feeds_the_codes_at_the_position() -> None:
    decoder = random_decoder()
    state = random_state(decoder, KINDS)
    copy = KVCache(state.cache.expand(torch.arange(len(state.logits))).layers)
    choose(state, 0)
    advance(decoder, state, 0)
    assert torch.equal(state.logits, decoder.decode(state.fed, 0, copy))
    for one, other in zip(state.cache.layers, copy.layers, strict=True):
        assert torch.equal(one.keys, other.keys)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("images", [[0], [1], [0, 2, 5], [1, 3], [1, 2, 4, 6], list(range(7))], ids=str)
def test_selected_images_go_on_as_they_would_have(images: list[int], forced: bool) -> None:
    decoder = random_decoder()
    state = random_state(decoder, KINDS, forced=forced)
    with torch.inference_mode():
        choose(state, 0)
        advance(decoder, state, 0)
        selected = state.select(torch.tensor(images))
        rows = rows_of(state, images)
        for one in (state, selected):
            for position in range(1, IMAGE_LEN):
                choose(one, position)
                if position + 1 < IMAGE_LEN:
                    advance(decoder, one, position)
    assert selected.guided.tolist() == [place for place, image in enumerate(images) if KINDS[image].guided]
    assert torch.equal(selected.codes, state.codes[images])
    assert torch.equal(selected.log_probabilities, state.log_probabilities[rows])


def filters_of(*settings: SamplingSettings) -> Filters:
    return Filters.of(settings, codebook_size=NUM_CODES, device=torch.device("cpu"))


def test_what_no_image_asks_for_is_left_out() -> None:
    plain = filters_of(SamplingSettings(), SamplingSettings(guidance=2.0))
    assert (plain.temperature, plain.top_k, plain.largest_k, plain.top_p, plain.min_p) == (None, None, 0, None, None)
    logits = torch.randn(2, NUM_CODES)
    assert plain(logits) is logits


@pytest.mark.parametrize(
    ("name", "value", "neutral"), [("temperature", 0.5, 1.0), ("top_k", 3, 0), ("top_p", 0.5, 1.0), ("min_p", 0.1, 0.0)]
)
def test_what_one_image_asks_for_leaves_the_others_alone(name: str, value: float, neutral: float) -> None:
    filters = filters_of(SamplingSettings(), SamplingSettings(**{name: value}))  # type: ignore[arg-type]
    column = getattr(filters, name)
    assert column.tolist() == pytest.approx([neutral, value])
    assert filters.largest_k == (3 if name == "top_k" else 0)
    logits = torch.randn(2, NUM_CODES)
    filtered = filters(logits)
    assert torch.equal(filtered[0], logits[0]) and not torch.equal(filtered[1], logits[1])


def test_a_top_k_that_keeps_every_code_filters_nothing() -> None:
    none = filters_of(SamplingSettings(top_k=NUM_CODES), SamplingSettings(top_k=NUM_CODES + 9))
    assert none.top_k is None and none.largest_k == 0
    some = filters_of(SamplingSettings(top_k=NUM_CODES + 9), SamplingSettings(top_k=2), SamplingSettings(top_k=5))
    assert some.largest_k == 5
    kept = some(torch.randn(3, NUM_CODES)).isfinite().sum(dim=1)
    assert kept.tolist() == [NUM_CODES, 2, 5]


def test_mapping_reaches_every_tensor_and_no_other() -> None:
    def first(values: Tensor) -> Tensor:
        return values[:1]

    filters = filters_of(SamplingSettings(top_k=3, top_p=0.5), SamplingSettings(top_k=2)).map(first)
    assert filters.temperature is None and filters.min_p is None and filters.largest_k == 3
    assert filters.top_k is not None and filters.top_k.tolist() == [3]
    assert filters.top_p is not None and len(filters.top_p) == 1
