"""The prior: cached decoding equals the full pass, shapes and errors, learning."""

import pytest
import torch

from tessera.errors import UserError
from tessera.training.optim import OptimizerConfig, build_optimizer
from transformer.lit import prior_loss
from transformer.masks import MaskKind
from transformer.model import Prior, PriorConfig, SequenceLayout, rotary_angles

LAYOUT = SequenceLayout(text_len=5, grid_height=3, grid_width=4, text_vocab_size=20, codebook_size=17)


DIGITS = SequenceLayout(
    text_len=5, grid_height=3, grid_width=4, text_vocab_size=20, codebook_size=18, codebook_levels=(3, 3, 2)
)


def random_prior(attention: tuple[MaskKind, ...], *, depth: int = 3, layout: SequenceLayout = LAYOUT) -> Prior:
    prior = Prior(PriorConfig(layout=layout, dim=32, depth=depth, heads=2, attention=attention, kernel_size=3))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return prior.eval()


def random_inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(0, LAYOUT.num_text_ids, (batch, LAYOUT.text_len), generator=generator)
    return text, torch.randint(0, LAYOUT.codebook_size, (batch, LAYOUT.image_len), generator=generator)


@pytest.mark.parametrize(
    "attention",
    [("full",), ("row",), ("column",), ("conv",), ("row", "column", "row", "row", "conv")],
    ids=lambda pattern: "-".join(pattern),
)
@pytest.mark.parametrize("layout", [LAYOUT, DIGITS], ids=["plain", "digits"])
def test_cached_decoding_equals_the_full_pass(attention: tuple[MaskKind, ...], layout: SequenceLayout) -> None:
    prior = random_prior(attention, layout=layout)
    text, codes = random_inputs(2)
    with torch.no_grad():
        expected = prior(text, codes).image_logits
    cache = prior.new_cache(2)
    logits = [prior.prefill(text, cache)]
    for position in range(LAYOUT.image_len - 1):
        logits.append(prior.decode(codes[:, position], position, cache))
    torch.testing.assert_close(torch.stack(logits, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_candidates_share_one_prefilled_prompt() -> None:
    prior = random_prior(("row", "full"))
    text, codes = random_inputs(2)
    shared = prior.new_cache(2)
    prior.prefill(text, shared)
    index = torch.tensor([1, 0, 1])
    expanded = shared.expand(index)
    alone = prior.new_cache(3)
    prior.prefill(text[index], alone)
    first = torch.tensor([3, 4, 5])
    torch.testing.assert_close(prior.decode(first, 0, expanded), prior.decode(first, 0, alone))
    assert not shared.keys[:, :, :, LAYOUT.text_len].any(), "decoding candidates must leave the prompt's cache alone"


def test_null_text_is_what_an_empty_caption_becomes() -> None:
    from tessera.text_tokenizer import TextTokenizer

    tokenizer = TextTokenizer.train(["a red star", "two blue rings"], vocab_size=300)
    layout = SequenceLayout(text_len=6, text_vocab_size=tokenizer.vocab_size)
    prior = Prior(PriorConfig(layout=layout, dim=16, depth=1, heads=2))
    assert torch.equal(prior.null_text_ids()[None], tokenizer.encode_batch([""], text_len=6))


def test_a_new_prior_predicts_uniformly() -> None:
    prior = Prior(PriorConfig(layout=LAYOUT, dim=32, depth=2, heads=2))
    text, codes = random_inputs(2)
    with torch.no_grad():
        output = prior(text, codes)
    assert output.text_logits.shape == (2, LAYOUT.text_len - 1, LAYOUT.num_text_ids)
    assert output.image_logits.shape == (2, LAYOUT.image_len, LAYOUT.codebook_size)
    loss = prior_loss(output, text, codes, text_vocab_size=LAYOUT.text_vocab_size)
    assert float(loss.image) == pytest.approx(torch.tensor(float(LAYOUT.codebook_size)).log().item(), abs=1e-5)


def test_certain_pads_are_left_out_of_the_text_loss() -> None:
    prior = random_prior(("full",))
    pads = prior.null_text_ids()
    text, codes = random_inputs(1)
    text[0] = pads
    text[0, :2] = torch.tensor([3, 4])
    with torch.no_grad():
        output = prior(text, codes)
    loss = prior_loss(output, text, codes, text_vocab_size=LAYOUT.text_vocab_size)
    log_probability = output.text_logits[0].log_softmax(dim=-1)
    expected = -(log_probability[0, 4] + log_probability[1, pads[2]]) / 2  # the second token, and the end
    assert float(loss.text) == pytest.approx(float(expected), rel=1e-5)
    assert float(loss.total) == pytest.approx(float(loss.text) / 8 + 7 * float(loss.image) / 8, rel=1e-6)


def test_rotary_angles_are_relative_within_text_and_within_the_image() -> None:
    angles = rotary_angles(LAYOUT, 16, 100.0)
    text_step = angles[1] - angles[0]
    torch.testing.assert_close(angles[4] - angles[3], text_step)
    start, width = LAYOUT.text_len, LAYOUT.grid_width
    down = angles[start + width] - angles[start]
    right = angles[start + 1] - angles[start]
    torch.testing.assert_close(angles[start + 2 * width + 3] - angles[start], 2 * down + 3 * right)
    torch.testing.assert_close(down + right, text_step)


def test_wrong_shapes_name_expected_and_got() -> None:
    prior = random_prior(("full",))
    text, codes = random_inputs(2)
    with pytest.raises(ValueError, match=r"image_codes must have shape \[batch, 12\]; got \(2, 11\)"):
        prior(text, codes[:, :-1])
    with pytest.raises(ValueError, match=r"position must lie in \[0, 11\); got 11"):
        prior.decode(codes[:, 0], 11, prior.new_cache(2))


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="dim=30, heads=4"):
        PriorConfig(dim=30, heads=4)
    with pytest.raises(UserError, match=r"product of layout.codebook_levels must be .* got \(8, 5\) and 1024"):
        SequenceLayout(codebook_size=1024, codebook_levels=(8, 5))


def test_the_prior_overfits_a_few_images() -> None:
    torch.manual_seed(0)
    prior = Prior(PriorConfig(layout=LAYOUT, dim=32, depth=2, heads=2, attention=("row", "column")))
    text, codes = random_inputs(4)
    optimizer = build_optimizer(prior, OptimizerConfig(learning_rate=1e-2))
    for _ in range(80):
        loss = prior_loss(prior(text, codes), text, codes, text_vocab_size=LAYOUT.text_vocab_size)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert float(loss.image.detach()) < 0.1
    cache = prior.new_cache(4)
    logits = prior.eval().prefill(text, cache)
    sampled = [logits.argmax(dim=1)]
    for position in range(LAYOUT.image_len - 1):
        sampled.append(prior.decode(sampled[-1], position, cache).argmax(dim=1))
    assert torch.equal(torch.stack(sampled, dim=1), codes)
