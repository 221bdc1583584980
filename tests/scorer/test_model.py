"""A pair's score is its own: whatever else is scored, however captions are padded, before and after export."""

from pathlib import Path

import pytest
import torch

from scorer.model import IGNORED, ClipScorer, ClipScorerConfig, TextStates, TrainedScorer, load, without_common_pads
from tessera.config import to_plain
from tessera.errors import UserError
from tessera.model_folder import ModelFolder, write_part, write_tokenizer
from tessera.text_tokenizer import END_ID, TextTokenizer

CAPTIONS = ["a red star", "a blue ring left of a green cross", "two small circles", "", "an orange square, 猫"]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS, vocab_size=320)


def make_scorer(tokenizer: TextTokenizer, **changes: object) -> TrainedScorer:
    sizes: dict = {
        "image_size": (24, 32),
        "text_len": 24,
        "text_vocab_size": tokenizer.vocab_size,
        "stem_width": 8,
        "dim": 32,
        "heads": 2,
        "image_layers": 1,
        "text_layers": 1,
        "matcher_layers": 1,
        "embedding_dim": 16,
        **changes,
    }
    model = ClipScorer(ClipScorerConfig(**sizes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # blocks start as identity, which would hide what they do
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return TrainedScorer(model, tokenizer)


@pytest.fixture(scope="module")
def scorer(tokenizer: TextTokenizer) -> TrainedScorer:
    return make_scorer(tokenizer)


def pairs(count: int) -> tuple[torch.Tensor, list[str]]:
    images = torch.randint(256, (count, 3, 24, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return images, [CAPTIONS[place % len(CAPTIONS)] for place in range(count)]


@pytest.mark.parametrize("matcher_layers", [0, 1])
def test_a_batch_of_one_scores_as_in_a_batch_of_many(tokenizer: TextTokenizer, matcher_layers: int) -> None:
    scorer = make_scorer(tokenizer, matcher_layers=matcher_layers)
    images, texts = pairs(70)  # more than are scored at once
    together = scorer.score(images, texts)
    alone = torch.cat([scorer.score(images[i : i + 1], texts[i : i + 1]) for i in range(70)])
    assert together.shape == (70,)
    assert together.dtype == torch.float32
    assert together.std() > 0.01
    assert torch.allclose(together, alone, atol=1e-5)


def test_permuting_pairs_permutes_scores(scorer: TrainedScorer) -> None:
    images, texts = pairs(10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(2))
    permuted = scorer.score(images[order], [texts[i] for i in order])
    assert torch.allclose(permuted, scorer.score(images, texts)[order], atol=1e-5)


def test_score_depends_on_image_words_and_word_order(scorer: TrainedScorer) -> None:
    images, _ = pairs(2)
    texts = ["a red star left of a blue ring", "a blue star left of a red ring"]
    scores = scorer.score(images[[0, 0, 1]], [texts[0], texts[1], texts[0]])
    assert (scores[0] - scores[1]).abs() > 1e-4
    assert (scores[0] - scores[2]).abs() > 1e-4


def test_pads_do_not_change_a_score(scorer: TrainedScorer) -> None:
    images, texts = pairs(5)
    ids = scorer.tokenizer.encode_batch(texts, text_len=24)
    short = without_common_pads(ids, scorer.tokenizer.vocab_size)
    assert short.shape[1] < 24
    pixels = images.float() / 255
    with torch.no_grad():
        assert torch.allclose(scorer.model(pixels, ids), scorer.model(pixels, short), atol=1e-5)


def test_several_captions_of_an_image_do_not_see_each_other(scorer: TrainedScorer) -> None:
    images, texts = pairs(2)
    with torch.no_grad():
        patches = scorer.model.encode_images(images.float() / 255)
        states, targets = scorer.model.encode_texts(scorer.tokenizer.encode_batch(texts, text_len=24))
        both = TextStates(states.expand(2, -1, -1, -1), targets.expand(2, -1, -1))
        blind = scorer.model.word_losses(scorer.model.no_image.expand(2, 1, -1), both).sum(dim=2)
        scores = blind - scorer.model.word_losses(patches, both).sum(dim=2)
    expected = scorer.score(images[[0, 0, 1, 1]], [*texts, *texts]).view(2, 2)
    assert torch.allclose(scores, expected, atol=1e-4)


def test_no_word_is_predicted_from_itself_or_from_later_ones(scorer: TrainedScorer) -> None:
    images, _ = pairs(1)
    ids = scorer.tokenizer.encode_batch([CAPTIONS[1]], text_len=24)
    length = len(scorer.tokenizer.encode(CAPTIONS[1]))
    with torch.no_grad():
        patches = scorer.model.encode_images(images.float() / 255)
        before = word_losses(scorer, patches, ids)
        for place in range(length):
            changed = ids.clone()
            changed[0, place] = 200
            after = word_losses(scorer, patches, changed)
            assert torch.allclose(before[:place], after[:place], atol=1e-5)
            assert not torch.allclose(before[place:], after[place:], atol=1e-3)


def word_losses(scorer: TrainedScorer, patches: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    states, targets = scorer.model.encode_texts(ids)
    return scorer.model.word_losses(patches, TextStates(states[:, None], targets[:, None]))[0, 0]


def test_states_predict_the_words_then_the_end_then_nothing(scorer: TrainedScorer) -> None:
    words = scorer.tokenizer.encode("a red star")
    ids = scorer.tokenizer.encode_batch(["a red star", ""], text_len=len(words) + 2)
    targets = scorer.model.encode_texts(ids).targets
    assert targets[0].tolist() == [*words, END_ID, IGNORED, IGNORED]
    assert targets[1].tolist() == [END_ID] + [IGNORED] * (len(words) + 2)
    full = scorer.model.encode_texts(ids[:1, : len(words)]).targets
    assert full[0].tolist() == [*words, END_ID]


def test_embeddings_are_unit_vectors_and_independent_of_the_batch(scorer: TrainedScorer) -> None:
    images, texts = pairs(67)
    vectors, words = scorer.embed_images(images), scorer.embed_texts(texts)
    assert vectors.shape == words.shape == (67, 16)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(67), atol=1e-5)
    assert torch.allclose(words.norm(dim=1), torch.ones(67), atol=1e-5)
    assert torch.allclose(vectors[66:], scorer.embed_images(images[66:]), atol=1e-5)
    assert torch.allclose(words[5:6], scorer.embed_texts(texts[5:6]), atol=1e-5)


def test_blank_and_overlong_captions_and_nothing_at_all_are_legal(scorer: TrainedScorer) -> None:
    images, _ = pairs(3)
    scores = scorer.score(images, ["", "   ", "a red star " * 100])
    assert scores.isfinite().all()
    assert scorer.score(images[:1], [""]) == pytest.approx(scores[:1], abs=1e-5)
    assert scorer.score(images[:0], []).shape == (0,)
    assert scorer.embed_texts([]).shape == scorer.embed_images(images[:0]).shape == (0, 16)


def test_image_sides_need_not_be_multiples_of_the_patch(tokenizer: TextTokenizer) -> None:
    scorer = make_scorer(tokenizer, image_size=(20, 29))
    assert scorer.model.config.num_patches == 12
    images = torch.zeros(1, 3, 20, 29, dtype=torch.uint8)
    corner = images.clone()
    corner[:, :, -1, -1] = 255
    assert scorer.score(images, ["a star"]) != scorer.score(corner, ["a star"])


def test_exported_scorer_loads_with_equal_scores(scorer: TrainedScorer, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, scorer.tokenizer.proto)
    model = scorer.model
    requires = {"tokenizer": scorer.tokenizer.sha256}
    write_part(tmp_path, "scorer", config=to_plain(model.config), tensors=model.state_dict(), requires=requires)
    loaded = load(ModelFolder.open(tmp_path))
    images, texts = pairs(5)
    assert torch.equal(loaded.score(images, texts), scorer.score(images, texts))
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_folder_with_a_scorer_for_images_of_another_size_is_refused(scorer: TrainedScorer, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, scorer.tokenizer.proto)
    model = scorer.model
    write_part(tmp_path, "scorer", config=to_plain(model.config), tensors=model.state_dict())
    folder = ModelFolder.open(tmp_path)
    assert load(folder, image_size=(24, 32)).model.config == model.config
    with pytest.raises(UserError, match="must read images of 32x32 pixels, .* was trained on 24x32"):
        load(folder, image_size=(32, 32))


def test_folder_without_scorer_is_refused(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, tokenizer.proto)
    with pytest.raises(UserError, match="train-scorer"):
        load(ModelFolder.open(tmp_path))


def test_wrong_inputs_are_refused(scorer: TrainedScorer, tokenizer: TextTokenizer) -> None:
    images, texts = pairs(2)
    with pytest.raises(ValueError, match="uint8"):
        scorer.score(images.float(), texts)
    with pytest.raises(ValueError, match="2 images and 1 texts"):
        scorer.score(images, texts[:1])
    with pytest.raises(ValueError, match="24, 32"):
        scorer.score(images[:, :, :8], texts)
    with pytest.raises(ValueError, match="at most 24"):
        scorer.model.embed_texts(torch.zeros(1, 25, dtype=torch.int64))
    with pytest.raises(ValueError, match="pieces"):
        make_scorer(tokenizer, text_vocab_size=100)


@pytest.mark.parametrize(
    "sizes", [{"dim": 30, "heads": 4}, {"patch_size": 6}, {"patch_size": 0}, {"text_len": 0}, {"image_size": (0, 8)}]
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict) -> None:
    with pytest.raises(UserError, match="scorer"):
        ClipScorerConfig(**sizes)
