"""Prompts in, ranked images out: an image does not depend on its neighbors, ranks are stable, settings count."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sampling.generated_image import GeneratedImage
from sampling.pipeline import Pipeline
from sampling.settings import SamplingSettings
from tessera.errors import UserError
from tessera.model_folder import ModelFolder, write_sampling_defaults


class FixedScorer:
    """Gives each candidate of a prompt a score that the test chooses."""

    name = "fixed"

    def __init__(self, scores: Sequence[float]) -> None:
        self.scores = scores

    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        assert images.dtype == torch.uint8 and len(texts) == len(images)
        return torch.tensor(self.scores[: len(images)])


def with_scores(pipeline: Pipeline, scores: Sequence[float]) -> Pipeline:
    return Pipeline(
        prior=pipeline.prior, vae=pipeline.vae, tokenizer=pipeline.tokenizer, scorer=FixedScorer(scores), settings=None
    )


def key(image: GeneratedImage) -> tuple[str, int, int]:
    return image.prompt, image.seed, image.image_index


def test_an_image_is_the_same_whatever_is_asked_for_beside_it(pipeline: Pipeline) -> None:
    many = pipeline(["a red star", "a blue ring"], n=5, seed=[7, 8])
    by_key = {key(image): image for image in many}
    assert len(by_key) == 10
    again = [
        *pipeline("a blue ring", n=2, best_of=3, seed=8, scorer="likelihood"),
        *pipeline(["two", "a red star", ""], n=1, seed=7, scorer=None),
    ]
    common = [image for image in again if key(image) in by_key]
    assert len(common) == 3
    for image in common:
        assert np.array_equal(image.codes, by_key[key(image)].codes)
        assert np.array_equal(image.image, by_key[key(image)].image)


def test_other_seeds_and_indices_and_prompts_give_other_images(pipeline: Pipeline) -> None:
    images = [*pipeline(["a red star", "a blue ring"], n=2, seed=1), *pipeline("a red star", n=2, seed=2)]
    assert len({image.codes.tobytes() for image in images}) == len(images)


def test_results_carry_what_made_them(pipeline: Pipeline, model_folder: Path) -> None:
    (image,) = pipeline("  A red\tstar ", seed=3, temperature=0.5, top_k=4)
    assert image.prompt == "A red star"
    assert (image.image.shape, image.image.dtype) == ((16, 24, 3), np.uint8)
    assert image.codes.shape == (4, 6) and image.codes.max() < 15
    assert image.settings == SamplingSettings(temperature=0.5, top_k=4, guidance=2.0)  # the folder's, where not given
    assert image.model_sha256 == ModelFolder.open(model_folder).sha256
    assert (image.rank, image.candidates, image.scorer, set(image.scores)) == (0, 1, "clip", {"clip", "likelihood"})


def test_pixels_are_the_decoded_codes(pipeline: Pipeline) -> None:
    (image,) = pipeline("a red star", seed=3)
    decoded = pipeline.vae.decode(torch.from_numpy(image.codes)[None])[0]  # [3, H, W] in [0, 1]
    expected = (decoded * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(image.image, expected)
    assert image.image.std() > 1, "a blank picture would make this test blind"


def test_each_image_is_scored_against_its_own_prompt(pipeline: Pipeline) -> None:
    class LengthScorer:
        name = "length"

        def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
            return torch.tensor([float(len(text)) for text in texts])

    scored = Pipeline(prior=pipeline.prior, vae=pipeline.vae, tokenizer=pipeline.tokenizer, scorer=LengthScorer())
    for image in scored(["a", "a red", "a red star"], n=3):
        assert image.scores["clip"] == len(image.prompt)


def test_best_of_returns_the_highest_scores_in_order(pipeline: Pipeline) -> None:
    best = with_scores(pipeline, [0.1, 0.9, 0.5, 0.7])("a red star", n=3, best_of=4)
    assert [image.image_index for image in best] == [1, 3, 2]
    assert [image.rank for image in best] == [0, 1, 2]
    assert [image.scores["clip"] for image in best] == pytest.approx([0.9, 0.7, 0.5])
    assert all(image.candidates == 4 for image in best)


def test_equal_scores_keep_the_order_of_the_index_and_nan_comes_last(pipeline: Pipeline) -> None:
    best = with_scores(pipeline, [0.5, math.nan, 0.9, 0.5, math.inf, 0.5])("a red star", n=6)
    assert [image.image_index for image in best] == [4, 2, 0, 3, 5, 1]
    assert best[-1].description()["scores"]["clip"] is None  # JSON knows no NaN


def test_without_a_scorer_images_come_by_index(pipeline: Pipeline) -> None:
    images = pipeline("a red star", n=3, scorer=None, guidance=1.0)
    assert [(image.image_index, image.rank, image.scorer, dict(image.scores)) for image in images] == [
        (index, index, None, {}) for index in range(3)
    ]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_likelihood_ranks_the_same_whether_kept_while_drawing_or_computed_afterwards(
    pipeline: Pipeline, guidance: float
) -> None:
    images = pipeline("a red star", n=6, scorer="likelihood", guidance=guidance)
    scores = [image.scores["likelihood"] for image in images]
    assert scores == sorted(scores, reverse=True)
    from sampling.likelihood import likelihood_ratio

    codes = torch.stack([torch.from_numpy(image.codes).flatten() for image in images])
    text_ids = pipeline.text_ids(["a red star"]).expand(6, -1)
    assert likelihood_ratio(pipeline.prior, codes, text_ids).tolist() == pytest.approx(scores, abs=1e-3)


def test_combined_ranks_by_both(pipeline: Pipeline) -> None:
    images = pipeline("a red star", n=8, scorer="combined")
    assert set(images[0].scores) == {"clip", "likelihood", "combined"}
    combined = [image.scores["combined"] for image in images]
    assert combined == sorted(combined, reverse=True) and len(set(combined)) > 1


def test_prompts_are_streamed_in_order_and_progress_reaches_the_end(pipeline: Pipeline) -> None:
    small = Pipeline(prior=pipeline.prior, vae=pipeline.vae, tokenizer=pipeline.tokenizer)
    small.max_rows = 4
    progress: list[tuple[int, int]] = []
    stream = small.stream(["a", "b", "c"], n=3, on_progress=lambda done, total: progress.append((done, total)))
    first = next(stream)
    assert {image.prompt for image in first} == {"a"}
    assert progress[-1] == (3 * 24, 9 * 24), "the second prompt must not be drawn before the first is handed out"
    assert [images[0].prompt for images in stream] == ["b", "c"]
    assert progress[-1] == (9 * 24, 9 * 24) and progress == sorted(progress)


def test_a_prompt_longer_than_the_context_is_told_with_the_count(pipeline: Pipeline) -> None:
    long = "a red star " * 20
    num_tokens = len(pipeline.tokenizer.encode(long))
    with pytest.warns(UserWarning, match=f"has {num_tokens} tokens, the model reads 8: the last {num_tokens - 8} "):
        pipeline(long)


@pytest.mark.parametrize("prompt", ["", "красная звезда", "赤い星", "\0\ud800 star", "🌟"])
def test_any_text_is_a_prompt(pipeline: Pipeline, prompt: str) -> None:
    warnings: list[str] = []
    (image,) = pipeline(prompt, on_warning=warnings.append)
    assert image.image.shape == (16, 24, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0, expected at least 1"),
        ({"n": 4, "best_of": 2}, "best_of is 2, expected at least n = 4"),
        ({"n": 1, "best_of": 2, "scorer": None}, "needs a scorer"),
        ({"seed": -1}, "seed is -1, expected an integer"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"temperature": -1.0}, "temperature is -1.0, expected"),
        ({"top_p": 1.5}, "top_p is 1.5, expected"),
        ({"scorer": "beauty"}, "scorer is 'beauty', expected auto, clip"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_drawn(pipeline: Pipeline, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipeline.stream("a red star", **options)  # not even iterated


def test_without_a_scorer_part_the_likelihood_ranks_and_clip_is_refused(model_without_scorer: Path) -> None:
    pipeline = Pipeline.load(model_without_scorer, device="cpu", precision="fp32")
    assert pipeline("a red star", n=2)[0].scorer == "likelihood"
    for scorer in ("clip", "combined"):
        with pytest.raises(UserError, match="train-scorer"):
            pipeline("a red star", scorer=scorer)


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"scorer": "beauty"}, "scorer='beauty', expected clip"),
        ({"temprature": 1.0}, "temprature"),
        ({"top_p": 7.0}, "top_p"),
    ],
)
def test_damaged_sampling_defaults_are_refused(
    model_without_scorer: Path, tmp_path: Path, defaults: dict, message: str
) -> None:
    folder = Path(shutil.copytree(model_without_scorer, tmp_path / "model"))
    write_sampling_defaults(folder, defaults)
    with pytest.raises(UserError, match=message):
        Pipeline.load(folder, device="cpu")


def test_a_folder_without_a_prior_names_what_to_train(tmp_path: Path) -> None:
    write_sampling_defaults(tmp_path, {})
    with pytest.raises(UserError, match="has no prior"):
        Pipeline.load(tmp_path, device="cpu")


def test_a_scorer_for_images_of_another_size_is_refused_before_anything_is_drawn(
    model_with_another_scorer: Path,
) -> None:
    with pytest.raises(UserError, match=r"must read images of 16x24 pixels, .* was trained on 32x32: train it again"):
        Pipeline.load(model_with_another_scorer, device="cpu", precision="fp32")


def test_bf16_gives_images_too(model_folder: Path) -> None:
    images = Pipeline.load(model_folder, device="cpu", precision="bf16")("a red star", n=2)
    assert [image.precision for image in images] == ["bf16", "bf16"]
