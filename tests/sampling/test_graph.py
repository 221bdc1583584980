"""One captured step for each shape and kind of batch, a few at a time, in buffers that every later batch moves into."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from sampling import graph
from sampling.graph import MAX_GRAPHS, StepOnDevice, step_on_device
from sampling.settings import SamplingSettings
from sampling.step import Filters, Forced, State
from transformer.decoder import Decoder
from transformer.model import Prior, PriorConfig, SequenceLayout

# R images, I image tokens, K codebook size.

LAYOUT = SequenceLayout(text_len=3, grid_height=2, grid_width=3, text_vocab_size=9, codebook_size=13)
PLAIN = SamplingSettings()
GUIDED = SamplingSettings(guidance=2.0)
EVERY_FILTER = SamplingSettings(guidance=2.0, temperature=0.5, top_k=3, top_p=0.5, min_p=0.1)


def new_decoder() -> Decoder:
    return Decoder(Prior(PriorConfig(layout=LAYOUT, dim=16, depth=2, heads=2, attention=("row", "column"))))


def random_state(decoder: Decoder, *settings: SamplingSettings, forced: bool = False) -> State:
    """With other random numbers in every tensor each time."""
    count = len(settings)
    guided = torch.tensor([image for image, setting in enumerate(settings) if setting.guided], dtype=torch.int64)
    rows = count + len(guided)
    cache = decoder.new_cache(rows)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    codes = torch.randint(0, LAYOUT.codebook_size, (2, count, LAYOUT.image_len))
    return State(
        cache=cache,
        logits=torch.randn(rows, LAYOUT.codebook_size),
        fed=torch.zeros(rows, dtype=torch.int64),
        codes=codes[0],
        log_probabilities=torch.randn(rows, LAYOUT.image_len),
        guided=guided,
        draws=torch.rand(count, LAYOUT.image_len, dtype=torch.float64),
        weights=torch.rand(count, LAYOUT.image_len),
        filters=Filters.of(settings, codebook_size=LAYOUT.codebook_size, device=torch.device("cpu")),
        forced=Forced(codes[1], torch.rand(count, LAYOUT.image_len) < 0.5) if forced else None,
    )


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[StepOnDevice]]:
    """The steps that were captured, first one first."""
    steps: list[StepOnDevice] = []
    monkeypatch.setattr(StepOnDevice, "capture", lambda step: steps.append(step))
    yield steps
    steps.clear()


@pytest.mark.parametrize(
    ("settings", "forced"),
    [
        ([PLAIN], False),
        ([PLAIN, PLAIN, PLAIN], False),
        ([PLAIN, GUIDED], False),
        ([GUIDED, GUIDED], False),
        ([PLAIN, SamplingSettings(temperature=0.5)], False),
        ([PLAIN, SamplingSettings(top_k=3)], False),
        ([PLAIN, SamplingSettings(top_k=4)], False),
        ([PLAIN, SamplingSettings(top_p=0.5)], False),
        ([PLAIN, SamplingSettings(min_p=0.5)], False),
        ([PLAIN, PLAIN], True),
    ],
)
def test_batches_that_launch_other_kernels_are_of_another_kind(settings: list[SamplingSettings], forced: bool) -> None:
    decoder = new_decoder()
    kind = graph._kind(random_state(decoder, *settings, forced=forced))
    assert kind != graph._kind(random_state(decoder, PLAIN, PLAIN))
    assert kind == graph._kind(random_state(decoder, *settings, forced=forced))
    assert hash(kind) is not None


def test_values_and_order_make_no_other_kind() -> None:
    decoder = new_decoder()
    one = random_state(decoder, GUIDED, SamplingSettings(top_k=4, temperature=0.5, top_p=0.3))
    other = random_state(
        decoder, SamplingSettings(top_k=2, top_p=0.9), SamplingSettings(guidance=4.0, top_k=4, temperature=0.0)
    )
    assert graph._kind(one) == graph._kind(other)


def test_a_kind_is_captured_once(captured: list[StepOnDevice]) -> None:
    decoder, other = new_decoder(), new_decoder()
    step = step_on_device(decoder, random_state(decoder, PLAIN, GUIDED), 0)
    assert step_on_device(decoder, random_state(decoder, GUIDED, PLAIN), 3) is step
    assert step_on_device(decoder, random_state(decoder, GUIDED), 0) is not step
    assert step_on_device(other, random_state(other, PLAIN, GUIDED), 0) is not step
    assert len(captured) == 3


def test_a_later_batch_moves_into_the_buffers_of_the_first(captured: list[StepOnDevice]) -> None:
    decoder, kind = new_decoder(), (EVERY_FILTER, PLAIN)
    first = random_state(decoder, *kind, forced=True)
    step = step_on_device(decoder, first, 2)
    assert step.state is first and step.position.tolist() == [2]
    assert step.position.dtype == torch.int32
    second = random_state(decoder, *kind[::-1], forced=True)
    again = step_on_device(decoder, second, 4)
    assert again is step and len(captured) == 1
    assert step.state is first and step.position.tolist() == [4]
    assert first.guided.tolist() == [1] and first.forced is not None and second.forced is not None
    for name in ("temperature", "top_k", "top_p", "min_p"):
        assert torch.equal(getattr(first.filters, name), getattr(second.filters, name))
    for name in ("logits", "codes", "log_probabilities", "draws", "weights"):
        assert torch.equal(getattr(first, name), getattr(second, name))
        assert getattr(first, name).data_ptr() != getattr(second, name).data_ptr()
    for one, other in zip(first.forced, second.forced, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(first.cache.layers, second.cache.layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


def test_two_batches_at_a_time_have_two_steps(captured: list[StepOnDevice]) -> None:
    decoder = new_decoder()
    first = random_state(decoder, PLAIN, GUIDED)
    step = step_on_device(decoder, first, 3)
    step.in_use = True
    logits = first.logits.clone()
    second = random_state(decoder, PLAIN, GUIDED)
    other = step_on_device(decoder, second, 0)
    assert other is not step and other.state is second
    assert torch.equal(first.logits, logits) and step.position.tolist() == [3]
    assert step_on_device(decoder, random_state(decoder, PLAIN, GUIDED), 0) is other
    assert captured == [step, other]


def test_the_kind_not_used_for_longest_makes_room(captured: list[StepOnDevice]) -> None:
    decoder = new_decoder()

    def of_size(images: int) -> StepOnDevice:
        return step_on_device(decoder, random_state(decoder, *[PLAIN] * images), 0)

    steps = [of_size(images) for images in range(1, MAX_GRAPHS + 1)]
    assert of_size(1) is steps[0]  # used again: the second is now the oldest
    of_size(MAX_GRAPHS + 1)
    assert len(graph._graphs[decoder]) == MAX_GRAPHS
    assert [of_size(images) is steps[images - 1] for images in (1, *range(3, MAX_GRAPHS + 1))] == [True] * (
        MAX_GRAPHS - 1
    )
    assert len(captured) == MAX_GRAPHS + 1
    assert of_size(2) is not steps[1]
    assert len(captured) == MAX_GRAPHS + 2


def test_a_decoder_that_nobody_uses_takes_its_graphs_along(captured: list[StepOnDevice]) -> None:
    decoder = new_decoder()
    step_on_device(decoder, random_state(decoder, PLAIN), 0)
    captured.clear()
    gone = weakref.ref(decoder)
    del decoder
    gc.collect()
    assert gone() is None
