"""A batch is a function of its keys, and knows which captions fit which images."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scorer.batches import CaptionedBatches
from scorer.losses import fitting_pairs
from tessera.data.order import SampleKey, sample_keys
from tessera.text_tokenizer import TextTokenizer

CAPTIONS = [
    ("a red star", "one red star", "there is a red star"),
    ("one blue ring", "a ring"),
    ("a ring", "a green ring on black"),
    ("",),
    ("two circles", "two circles next to each other and nothing else"),
]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train([text for texts in CAPTIONS for text in texts], vocab_size=320)


def make(tokenizer: TextTokenizer, **changes: object) -> CaptionedBatches:
    images = np.broadcast_to(np.arange(5, dtype=np.uint8)[:, None, None, None], (5, 2, 4, 3)).copy()
    arguments: dict = {"text_len": 24, "num_captions": 2, **changes}
    return CaptionedBatches(images, CAPTIONS, tokenizer, **arguments)


def texts_of(source: CaptionedBatches, batch: dict[str, torch.Tensor]) -> list[list[str]]:
    return [[source.tokenizer.decode(ids.tolist()) for ids in captions] for captions in batch["text_ids"]]


def test_a_batch_is_a_function_of_its_keys(tokenizer: TextTokenizer) -> None:
    source = make(tokenizer)
    keys = sample_keys(3, 12, size=5, seed=7)
    batch = source.batch(keys)
    source.batch(sample_keys(0, 12, size=5, seed=8))
    again = make(tokenizer).batch(keys)
    for name, values in batch.items():
        assert torch.equal(values, again[name]), name
    alone = source.batch(keys[4:5])
    assert torch.equal(alone["images"], batch["images"][4:5])
    assert texts_of(source, alone)[0] == texts_of(source, batch)[4]
    assert torch.equal(alone["draws"], batch["draws"][4:5])


def test_captions_belong_to_their_image_and_differ_where_there_are_several(tokenizer: TextTokenizer) -> None:
    source = make(tokenizer)
    keys = sample_keys(0, 50, size=5, seed=0)
    batch = source.batch(keys)
    assert batch["images"].shape == (50, 2, 4, 3)
    assert batch["images"].dtype == torch.uint8
    firsts = set()
    for key, image, texts in zip(keys, batch["images"], texts_of(source, batch), strict=True):
        assert (image == key.index).all()
        assert set(texts) <= set(CAPTIONS[key.index])
        assert len(set(texts)) == min(2, len(CAPTIONS[key.index]))
        firsts.add(texts[0])
    assert firsts == {text for texts in CAPTIONS for text in texts}


def test_common_pads_are_left_out(tokenizer: TextTokenizer) -> None:
    ids = make(tokenizer).batch(sample_keys(0, 20, size=5, seed=0))["text_ids"]
    assert ids.shape[2] < 24
    assert ((ids < tokenizer.vocab_size).sum(dim=2) == ids.shape[2]).any()
    blank = make(tokenizer).batch([SampleKey(3, 0)])["text_ids"]
    assert blank.shape == (1, 2, 0)


def test_an_image_that_has_the_caption_too_is_no_negative(tokenizer: TextTokenizer) -> None:
    source = make(tokenizer, num_captions=1)
    batches = [source.batch([SampleKey(1, seed), SampleKey(2, 7 * seed), SampleKey(0, 0)]) for seed in range(20)]
    for batch in batches:
        fits = fitting_pairs(batch["first"], batch["known"])
        texts = [captions[0] for captions in texts_of(source, batch)]
        shared = texts[0] in CAPTIONS[2] or texts[1] in CAPTIONS[1]
        assert torch.equal(fits, fits.T)
        assert fits.diagonal().all()
        assert bool(fits[0, 1]) == shared
        assert not fits[2, :2].any()
    assert {bool(fitting_pairs(batch["first"], batch["known"])[0, 1]) for batch in batches} == {True, False}


def test_a_share_of_images_is_replaced_by_reconstructions(tokenizer: TextTokenizer) -> None:
    white = np.full((5, 2, 4, 3), 255, np.uint8)
    asked: list[int] = []

    def reconstruct(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        asked.extend(rows.tolist())
        return white[rows]

    source = make(tokenizer, reconstruct=reconstruct, reconstruction_share=0.5)
    pixels = source.batch(sample_keys(0, 400, size=5, seed=0))["images"]
    assert 0.4 < float((pixels == 255).float().mean()) < 0.6
    assert int(np.asarray(source.images).max()) == 4  # the originals are left alone
    assert len(asked) == int((pixels == 255).all(dim=(1, 2, 3)).sum())  # none is made that no one sees
    never = make(tokenizer, reconstruct=reconstruct, reconstruction_share=0.0)
    assert int(never.batch(sample_keys(0, 50, size=5, seed=0))["images"].max()) == 4


def test_draws_are_spread_evenly(tokenizer: TextTokenizer) -> None:
    draws = make(tokenizer).batch(sample_keys(0, 1000, size=5, seed=0))["draws"]
    assert draws.dtype == torch.float32
    assert 0.05 < float((draws < 0.1).float().mean()) < 0.15


def test_arrays_that_do_not_belong_together_are_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="reconstructions"):
        wrong = make(
            tokenizer, reconstruct=lambda rows: np.zeros((len(rows), 2, 3, 3), np.uint8), reconstruction_share=1.0
        )
        wrong.batch([SampleKey(0, 0)])
    with pytest.raises(ValueError, match="5 images and 4 tuples"):
        CaptionedBatches(np.zeros((5, 2, 2, 3), np.uint8), CAPTIONS[:4], tokenizer, text_len=8, num_captions=1)
