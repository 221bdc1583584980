"""The likelihood ratio is what a plain pass gives, row by row, and prefers the text that an image was drawn from."""

import pytest
import torch

from sampling.decode import sample_codes
from sampling.likelihood import likelihood_ratio
from sampling.settings import SamplingSettings
from tessera.errors import UserError
from transformer.decoder import Decoder
from transformer.model import Prior, PriorConfig, SequenceLayout

LAYOUT = SequenceLayout(text_len=4, grid_height=3, grid_width=3, text_vocab_size=12, codebook_size=11)


@pytest.fixture
def prior() -> Prior:
    prior = Prior(PriorConfig(layout=LAYOUT, dim=32, depth=2, heads=2, attention=("row", "full")))
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_(std=0.3)
    return prior.eval().requires_grad_(False)


def test_it_is_the_difference_of_two_log_likelihoods(prior: Prior) -> None:
    codes, texts = torch.randint(0, 11, (3, 9)), torch.randint(0, 16, (3, 4))
    expected = []
    for row in range(3):
        logs = []
        for text in (texts[row], torch.arange(12, 16)):  # the empty caption is the pad of each position
            log_softmax = prior(text[None], codes[row : row + 1]).image_logits[0].log_softmax(dim=1)
            logs.append(sum(float(log_softmax[place, code]) for place, code in enumerate(codes[row].tolist())))
        expected.append(logs[0] - logs[1])
    assert likelihood_ratio(prior, codes, texts).tolist() == pytest.approx(expected, abs=1e-4)


def test_a_score_does_not_depend_on_the_other_rows(prior: Prior) -> None:
    codes, texts = torch.randint(0, 11, (7, 9)), torch.randint(0, 16, (7, 4))
    together = likelihood_ratio(prior, codes, texts)
    order = torch.randperm(7)
    torch.testing.assert_close(likelihood_ratio(prior, codes[order], texts[order]), together[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(likelihood_ratio(prior, codes, texts, max_rows=2), together, atol=1e-5, rtol=0)


def test_the_empty_caption_explains_nothing(prior: Prior) -> None:
    codes = torch.randint(0, 11, (4, 9))
    null = prior.null_text_ids()[None].expand(4, -1)
    assert likelihood_ratio(prior, codes, null).abs().max() < 1e-5


def test_images_score_higher_with_the_text_that_they_were_drawn_from(prior: Prior) -> None:
    right, wrong = torch.randint(0, 16, (2, 64, 4))
    sampled = sample_codes(
        Decoder(prior),
        right,
        settings=SamplingSettings(),
        seeds=torch.zeros(64, dtype=torch.int64),
        image_index=torch.arange(64),
    )
    better = likelihood_ratio(prior, sampled.codes, right) > likelihood_ratio(prior, sampled.codes, wrong)
    assert float(better.float().mean()) > 0.65


def test_wrong_shapes_are_refused(prior: Prior) -> None:
    with pytest.raises(UserError, match=r"codes have shape \(2, 8\), expected \[B, 9\]"):
        likelihood_ratio(prior, torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(UserError, match=r"text_ids have shape \(1, 4\), expected \(2, 4\)"):
        likelihood_ratio(prior, torch.zeros(2, 9, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))


def test_no_images_are_legal(prior: Prior) -> None:
    empty = torch.zeros(0, 9, dtype=torch.int64)
    assert likelihood_ratio(prior, empty, torch.zeros(0, 4, dtype=torch.int64)).shape == (0,)
