"""The decode loop as it runs on a GPU, under Triton's interpreter: it draws the codes of the loop on a CPU.

The position is a tensor, the step works in buffers that stay, and the cache is read by the decode kernel; only the CUDA
graph around it is left out.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sampling import decode
from sampling.decode import Pruning, Sampled
from sampling.graph import StepOnDevice
from sampling.settings import SamplingSettings
from sampling.step import Filters, Forced, State, advance, choose
from transformer.decoder import Decoder
from transformer.model import Prior, PriorConfig, SequenceLayout

pytestmark = pytest.mark.interpreter

# B images, R images of one micro-batch, G guided ones among them, S = R + G rows of a forward.

LAYOUT = SequenceLayout(text_len=4, grid_height=2, grid_width=3, text_vocab_size=20, codebook_size=11)


@pytest.fixture(autouse=True)
def _in_inference_mode() -> Iterator[None]:
    """As the loop is."""
    with torch.inference_mode():
        yield


def decoders(*, heads: int = 1) -> tuple[Decoder, Decoder]:
    """Of equal weights: on the decode kernel, and on plain products."""
    config = PriorConfig(
        layout=LAYOUT,
        dim=32 * heads,
        depth=3,
        heads=heads,
        key_value_heads=1,
        attention=("row", "column", "conv"),
        kernel_size=3,
    )
    kernel, plain = Prior(config, attention_backend="triton"), Prior(config, attention_backend="matmul")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one, other in zip(kernel.parameters(), plain.parameters(), strict=True):
            one.copy_(torch.randn(one.shape, generator=generator) * 0.2)
            other.copy_(one)
    return Decoder(kernel), Decoder(plain)


def prefilled(
    decoder: Decoder, settings: list[SamplingSettings], *, seed: int = 0, forced: Forced | None = None
) -> State:
    """What `sampling.decode` begins with, of one image for each of the settings."""
    generator = torch.Generator().manual_seed(seed)
    count = len(settings)
    guided = torch.tensor([image for image, setting in enumerate(settings) if setting.guided], dtype=torch.int64)
    texts = torch.randint(0, LAYOUT.num_text_ids, (count, LAYOUT.text_len), generator=generator)
    texts = torch.cat([texts, decoder.null_text_ids().expand(len(guided), -1)])
    cache = decoder.new_cache(len(texts))
    logits = decoder.prefill(texts, cache)[:, -1]
    return State(
        cache=cache,
        logits=logits.clone(),
        fed=torch.zeros(len(texts), dtype=torch.int64),
        codes=torch.zeros(count, LAYOUT.image_len, dtype=torch.int64),
        log_probabilities=torch.zeros(len(texts), LAYOUT.image_len),
        guided=guided,
        draws=torch.rand(count, LAYOUT.image_len, generator=generator, dtype=torch.float64),
        weights=torch.stack([setting.guidance_weights(LAYOUT.image_len) for setting in settings]),
        filters=Filters.of(settings, codebook_size=LAYOUT.codebook_size, device=torch.device("cpu")),
        forced=forced,
    )


def drawn_plainly(decoder: Decoder, state: State, *, until: int = LAYOUT.image_len) -> list[Tensor]:
    """Runs the loop with the position as a number; the logits [S, K] of each position."""
    logits = []
    for position in range(until):
        logits.append(state.logits.clone())
        choose(state, position)
        if position + 1 < LAYOUT.image_len:
            advance(decoder, state, position)
    return logits


def drawn_on_device(step: StepOnDevice, *, first: int = 0) -> list[Tensor]:
    """Runs the step from its position to the end; the logits [S, K] of each position."""
    logits = []
    for position in range(first, LAYOUT.image_len):
        assert step.position.tolist() == [position]
        logits.append(step.state.logits.clone())
        if position + 1 < LAYOUT.image_len:
            step()
        else:
            choose(step.state, position)
    return logits


def check_equal(got: State, got_logits: list[Tensor], expected: State, expected_logits: list[Tensor]) -> None:
    for position, (one, other) in enumerate(zip(got_logits, expected_logits, strict=True)):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4, msg=lambda text, at=position: f"{at}: {text}")
    assert torch.equal(got.codes, expected.codes)
    torch.testing.assert_close(got.log_probabilities, expected.log_probabilities, atol=1e-4, rtol=1e-4)


MIXED = [
    SamplingSettings(),
    SamplingSettings(guidance=3.0, guidance_schedule="linear", temperature=0.8),
    SamplingSettings(temperature=0.0),
    SamplingSettings(guidance=2.0, top_k=4, top_p=0.9, min_p=0.01),
]


@pytest.mark.parametrize("heads", [1, 2])
def test_the_step_on_the_device_draws_what_the_loop_draws(heads: int) -> None:
    on_kernel, plain = decoders(heads=heads)
    mask = torch.zeros(4, LAYOUT.image_len, dtype=torch.bool)
    mask[1, 2:4] = True
    forced = Forced(torch.full_like(mask, 7, dtype=torch.int64), mask)
    expected = prefilled(plain, MIXED, forced=forced)
    expected_logits = drawn_plainly(plain, expected)
    step = StepOnDevice(on_kernel, prefilled(on_kernel, MIXED, forced=forced))
    step.load(step.state, 0)
    check_equal(step.state, drawn_on_device(step), expected, expected_logits)
    assert expected.codes[1, 2:4].tolist() == [7, 7]
    assert len({tuple(row.tolist()) for row in expected.codes}) == 4


def test_the_tensors_of_a_step_stay_where_they_are() -> None:
    on_kernel, _ = decoders()
    step = StepOnDevice(on_kernel, prefilled(on_kernel, MIXED))
    buffers = step.state.logits, step.state.codes, step.state.log_probabilities, step.state.cache.layers[0].keys
    places = [buffer.data_ptr() for buffer in buffers]
    drawn_on_device(step)
    state = step.state
    assert [
        tensor.data_ptr() for tensor in (state.logits, state.codes, state.log_probabilities, state.cache.layers[0].keys)
    ] == places


def test_a_second_batch_runs_in_the_buffers_of_the_first() -> None:
    on_kernel, plain = decoders()
    step = StepOnDevice(on_kernel, prefilled(on_kernel, MIXED))
    first = step.state
    drawn_on_device(step)
    other = [MIXED[1], MIXED[0], MIXED[3], MIXED[2]]  # as many of each kind, in other places
    second = prefilled(on_kernel, other, seed=5)
    before = second.cache.layers[0].keys.clone(), second.codes.clone()
    step.load(second, 0)
    assert step.state is first
    expected = prefilled(plain, other, seed=5)
    expected_logits = drawn_plainly(plain, expected)
    check_equal(step.state, drawn_on_device(step), expected, expected_logits)
    assert torch.equal(second.cache.layers[0].keys, before[0]) and torch.equal(second.codes, before[1])


def test_a_batch_may_begin_in_the_middle() -> None:
    on_kernel, plain = decoders()
    expected = prefilled(plain, MIXED)
    expected_logits = drawn_plainly(plain, expected)
    state = prefilled(on_kernel, MIXED)
    drawn_plainly(on_kernel, state, until=3)
    step = StepOnDevice(on_kernel, prefilled(on_kernel, MIXED))
    step.load(state, 3)
    check_equal(step.state, drawn_on_device(step, first=3), expected, expected_logits[3:])


def test_selected_images_go_on_as_they_would_have() -> None:
    on_kernel, plain = decoders()
    expected = prefilled(plain, MIXED)
    expected_logits = drawn_plainly(plain, expected)
    whole = StepOnDevice(on_kernel, prefilled(on_kernel, MIXED))
    for _ in range(3):
        whole()
    kept = torch.tensor([1, 3])
    step = StepOnDevice(on_kernel, whole.state.select(kept))
    step.load(step.state, 3)
    logits = drawn_on_device(step, first=3)
    rows = torch.tensor([1, 3, 4, 5])  # both are guided
    for got, wanted in zip(logits, expected_logits[3:], strict=True):
        torch.testing.assert_close(got, wanted[rows], atol=1e-4, rtol=1e-4)
    assert torch.equal(step.state.codes, expected.codes[kept])
    torch.testing.assert_close(step.state.log_probabilities, expected.log_probabilities[rows], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pruned", [False, True])
def test_sampling_by_steps_on_the_device_gives_the_codes_of_sampling_without(
    pruned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_kernel, plain = decoders()
    steps = []

    def uncaptured(decoder: Decoder, state: State, position: int) -> StepOnDevice | None:
        if decoder is plain:
            return None
        step = StepOnDevice(decoder, state)
        step.load(state, position)
        steps.append(step)
        return step

    monkeypatch.setattr(decode, "_captured", uncaptured)
    texts = torch.randint(0, LAYOUT.num_text_ids, (4, LAYOUT.text_len))
    mask = torch.zeros(4, LAYOUT.image_len, dtype=torch.bool)
    mask[:2, :2] = True  # another beginning for two of them

    def sample(decoder: Decoder) -> Sampled:
        return decode.sample_codes(
            decoder,
            texts,
            settings=MIXED,
            seeds=torch.tensor([1, 2, 3, 4]),
            image_index=torch.tensor([0, 0, 1, 1]),
            forced=Forced(torch.full((4, LAYOUT.image_len), 2), mask),
            pruning=Pruning(torch.tensor([0, 0, 1, 1])) if pruned else None,
        )

    got, expected = sample(on_kernel), sample(plain)
    assert len(steps) == (4 if pruned else 2)
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.is_finished, expected.is_finished) and bool(got.is_finished.all()) != pruned
    for one, other in zip(got[1:4], expected[1:4], strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4, equal_nan=True)
