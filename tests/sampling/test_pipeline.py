"""Prompts in, ranked images out: an image does not depend on its neighbors, ranks are stable, settings count."""

import doctest
import itertools
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import sampling
from sampling.generated_image import GeneratedImage, PartialImage
from sampling.image_edit import EditOptions, make_edit
from sampling.outpainting import Margins
from sampling.pipeline import Pipeline
from sampling.request import Request
from sampling.settings import SamplingSettings
from tessera.errors import UserError
from tessera.model_folder import ModelFolder, write_sampling_defaults
from transformer.decoder import Decoder
from transformer.model import Prior


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
        ({"n": -3}, "n is -3, expected at least 1"),
        ({"best_of": 0}, "best_of is 0, expected at least n = 1"),
        ({"n": 4, "best_of": 2}, "best_of is 2, expected at least n = 4"),
        ({"n": 1, "best_of": 2, "scorer": None}, "needs a scorer"),
        ({"seed": -1}, "seed is -1, expected an integer"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"temperature": -1.0}, "temperature is -1.0, expected"),
        ({"temperature": math.nan}, "temperature is nan, expected"),
        ({"top_p": 1.5}, "top_p is 1.5, expected"),
        ({"top_p": 0.0}, "top_p is 0.0, expected"),
        ({"top_p": math.nan}, "top_p is nan, expected"),
        ({"guidance_schedule": "cubic"}, "guidance_schedule is 'cubic', expected one of constant, linear"),
        ({"guidence": 2.0}, "no option 'guidence'; did you mean guidance"),
        ({"scorer": "context"}, "it needs an init image"),
        ({"keep_rows": 2}, "about an init image: give one"),
        ({"prune_keep": 0.0}, "prune_keep is 0.0, prune_after 0.5, expected shares"),
        ({"prune_keep": 0.5, "prune_after": 1.0}, "prune_keep is 0.5, prune_after 1.0, expected shares"),
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


def test_temperature_0_is_greedy_whatever_the_seed(pipeline: Pipeline) -> None:
    images = [*pipeline("a red star", n=2, temperature=0.0, seed=1), *pipeline("a red star", temperature=0.0, seed=2)]
    assert len({image.codes.tobytes() for image in images}) == 1


def test_guidance_without_an_empty_caption_in_training_is_warned_of(model_without_dropout: Path) -> None:
    pipeline = Pipeline.load(model_without_dropout, device="cpu", precision="fp32")
    with pytest.warns(UserWarning, match="trained with condition_dropout 0. Expect worse images than with guidance 1"):
        pipeline("a red star", guidance=3.0)
    with pytest.warns(UserWarning, match="condition_dropout 0"):
        pipeline.outpaint("a red star", init=pipeline("x", guidance=1.0)[0].to_pil(), margins=Margins(right=1))
    told: list[str] = []
    pipeline("a red star", guidance=1.0, on_warning=told.append)
    assert not told


def test_the_package_offers_the_pipeline() -> None:
    assert sampling.Pipeline is Pipeline


@pytest.mark.parametrize("documented", [Pipeline, Decoder, Prior])
def test_the_examples_in_docstrings_run(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documented: type
) -> None:
    (tmp_path / "my-model").symlink_to(model_folder, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in doctest.DocTestFinder(recurse=False).find(documented):
        runner.run(example)
    assert runner.tries > 0 and runner.failures == 0


# best of many


def same(one: GeneratedImage, other: GeneratedImage) -> bool:
    return key(one) == key(other) and np.array_equal(one.codes, other.codes) and np.array_equal(one.image, other.image)


@pytest.mark.parametrize("scorer", ["clip", "likelihood", "combined"])
def test_candidates_of_many_batches_are_ranked_as_those_of_one(
    pipeline: Pipeline, small: Pipeline, count_decode_calls: Callable[..., list[int]], scorer: Any
) -> None:
    expected = pipeline("a red star", n=3, best_of=11, seed=5, scorer=scorer)
    calls = count_decode_calls(small)
    images = small("a red star", n=3, best_of=11, seed=5, scorer=scorer)
    assert calls == [4] * (5 * 23) + [2] * 23, "eleven images with guidance, two at a time"
    for image, wanted in zip(images, expected, strict=True):
        assert same(image, wanted) and image.candidates == 11
        assert dict(image.scores) == pytest.approx(dict(wanted.scores), rel=1e-4)  # up to the scorer's rounding


def test_only_the_best_are_decoded_to_pixels_where_no_scorer_looks_at_them(
    small: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    decode = small.decode

    def counted(codes: Tensor) -> Tensor:
        decoded.append(len(codes))
        return decode(codes)

    monkeypatch.setattr(small, "decode", counted)
    small("a red star", n=2, best_of=9, scorer="likelihood")
    assert decoded == [2]
    small("a red star", n=2, best_of=9, scorer="clip")
    assert max(decoded) == 2 and sum(decoded) == 2 + 9 + 2, "at most one batch of pixels at a time"


def interrupt_at(call: int) -> Callable[[int], None]:
    def on_call(number: int) -> None:
        if number == call:
            raise KeyboardInterrupt

    return on_call


def test_ctrl_c_gives_the_best_of_what_was_finished(
    small: Pipeline, count_decode_calls: Callable[..., list[int]]
) -> None:
    expected = small("a red star", n=2, best_of=4, seed=5, scorer="likelihood")
    count_decode_calls(small, interrupt_at(2 * 23 + 5))  # in the third batch of two
    stream = small.stream("a red star", n=2, best_of=10_000, seed=5, scorer="likelihood")
    images = next(stream)
    assert all(same(image, wanted) for image, wanted in zip(images, expected, strict=True))
    assert [image.candidates for image in images] == [4, 4]
    with pytest.raises(KeyboardInterrupt):
        next(stream)


def test_ctrl_c_before_anything_is_finished_gives_nothing(
    small: Pipeline, count_decode_calls: Callable[..., list[int]]
) -> None:
    count_decode_calls(small, interrupt_at(5))
    with pytest.raises(KeyboardInterrupt):
        next(small.stream("a red star", n=2))


def test_ctrl_c_keeps_finished_prompts_and_the_one_that_was_begun(
    small: Pipeline, count_decode_calls: Callable[..., list[int]]
) -> None:
    count_decode_calls(small, interrupt_at(3 * 23 + 5))  # in the second batch of the second prompt
    seen: list[tuple[str, int]] = []
    with pytest.raises(KeyboardInterrupt):
        for images in small.stream(["a", "b", "c"], n=3):
            seen.append((images[0].prompt, len(images)))
    assert seen == [("a", 3), ("b", 2)]


def test_pruning_gives_up_the_least_likely_and_leaves_the_others_as_they_were(
    pipeline: Pipeline, count_decode_calls: Callable[..., list[int]]
) -> None:
    everything = {key(image): image for image in pipeline("a red star", n=8, seed=3, scorer="likelihood")}
    calls = count_decode_calls(pipeline)
    images = pipeline("a red star", n=2, best_of=8, seed=3, scorer="likelihood", prune_keep=0.25, prune_after=0.5)
    assert calls == [16] * 12 + [4] * 11, "eight images with guidance, two from the middle on"
    assert [image.candidates for image in images] == [2, 2]
    for image in images:
        assert same(image, everything[key(image)])
        assert image.scores["likelihood"] == pytest.approx(everything[key(image)].scores["likelihood"])


# requests of mixed kind


def test_mixed_requests_give_what_each_gives_alone(pipeline: Pipeline, small: Pipeline, photo: Image.Image) -> None:
    painted = np.zeros((16, 24), dtype=np.bool_)
    painted[4:12, 8:16] = True
    edits = [
        make_edit(pipeline.vae, (16, 24), options, lambda note: None)
        for options in (
            EditOptions(init=photo, mask=painted, seam="blend"),
            EditOptions(init=photo, keep=0.5),
            EditOptions(init=photo, keep_rows=2),
        )
    ]
    requests = [
        Request(prompt="a red star", seed=1),
        Request(prompt="", seed=2, n=2, num_candidates=2, settings=SamplingSettings(temperature=0.5, top_k=3)),
        Request(prompt="a blue ring", seed=1, settings=SamplingSettings(guidance=3.0, guidance_schedule="linear")),
        Request(prompt="a red star", seed=1, settings=SamplingSettings(top_p=0.5, min_p=0.1), edit=edits[0]),
        Request(prompt="x", seed=4, n=3, num_candidates=3, settings=SamplingSettings(guidance=2.0), edit=edits[1]),
        Request(prompt="x", seed=4, settings=SamplingSettings(temperature=0.0), edit=edits[2]),
    ]
    together = list(pipeline.run(requests, scorer=None))
    in_batches = list(small.run(requests, scorer=None))
    assert len({image.codes.tobytes() for images in together for image in images}) == 9
    for request, images, others in zip(requests, together, in_batches, strict=True):
        (alone,) = pipeline.run([request], scorer=None)
        for image, other, own in zip(images, others, alone, strict=True):
            assert same(image, own) and same(other, own)
            assert image.settings == request.settings


# streaming


def test_partial_images_come_every_few_tokens_with_the_rows_decoded_so_far(pipeline: Pipeline) -> None:
    events = list(pipeline.watch("a red star", every=7, n=2, seed=3))
    partial = [event for event in events if isinstance(event, PartialImage)]
    finished = {event.image_index: event for event in events if isinstance(event, GeneratedImage)}
    assert [(event.num_tokens, event.image_index) for event in partial] == [
        (tokens, index) for tokens in (7, 14, 21) for index in (0, 1)
    ]
    assert events[: len(partial)] == partial and set(finished) == {0, 1}
    for event in partial:
        rows = event.num_tokens // 6
        assert event.num_rows == 4 * rows and event.image.shape == (16, 24, 3)
        codes = torch.from_numpy(finished[event.image_index].codes)[None, :rows]
        expected = pipeline.decode(codes)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(event.image[: event.num_rows], expected)
        assert np.unique(event.image[event.num_rows :]).size == 1, "nothing is there yet"
    wanted = pipeline("a red star", n=2, seed=3)
    assert all(same(finished[image.image_index], image) for image in wanted), "watching changes nothing"


@pytest.mark.parametrize("every", [1, 24, 25])
def test_partial_images_stop_before_the_last_token(pipeline: Pipeline, every: int) -> None:
    events = list(pipeline.watch("a red star", every=every))
    partial = [event for event in events if isinstance(event, PartialImage)]
    assert len(partial) == (23 if every == 1 else 0) and isinstance(events[-1], GeneratedImage)


def test_closing_the_iterator_cancels_within_one_step(
    pipeline: Pipeline, count_decode_calls: Callable[..., list[int]]
) -> None:
    calls = count_decode_calls(pipeline)
    events = pipeline.watch(["a red star", "a blue ring"], every=6, n=2)
    next(events)
    assert len(calls) == 6
    assert isinstance(events, Iterator)
    events.close()  # type: ignore[attr-defined]
    assert len(calls) == 6 and list(events) == []


def test_partial_images_every_0_tokens_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(UserError, match="every is 0, expected a whole number of tokens, at least 1"):
        pipeline.watch("a red star", every=0)


# a grid over settings


def test_a_grid_has_an_image_for_each_combination_drawn_as_if_alone(
    pipeline: Pipeline, count_decode_calls: Callable[..., list[int]]
) -> None:
    axes: dict[str, Sequence[Any]] = {"guidance": [1.0, 3.0], "top_k": [0, 2, 4]}
    calls = count_decode_calls(pipeline)
    images = pipeline.grid("a red star", axes=axes, seed=4, temperature=0.7)
    assert calls == [9] * 23, "all in one batch"
    for image, (guidance, top_k) in zip(images, itertools.product(*axes.values()), strict=True):
        assert image.settings == SamplingSettings(guidance=guidance, top_k=top_k, temperature=0.7)
        (alone,) = pipeline("a red star", seed=4, guidance=guidance, top_k=top_k, temperature=0.7)
        assert same(image, alone)
    assert len({image.codes.tobytes() for image in images}) > 1


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({}, "at least one setting"),
        ({"guidance": []}, "at least one value of each"),
        ({"guidence": [1.0]}, "no option 'guidence'; did you mean guidance"),
        ({"top_p": [0.5, 2.0]}, "top_p is 2.0, expected"),
    ],
)
def test_a_grid_of_something_else_is_refused(pipeline: Pipeline, axes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipeline.grid("a red star", axes=axes)


# number formats


@pytest.mark.parametrize(("precision", "name"), [("bf16", "bf16"), ("int8", "int8"), ("fp32", "fp32")])
def test_every_number_format_gives_images_and_says_which_it_was(model_folder: Path, precision: str, name: str) -> None:
    images = Pipeline.load(model_folder, device="cpu", precision=precision)("a red star", n=2)
    assert [image.precision for image in images] == [name, name]
    assert images[0].image.std() > 1 and images[0].recipe()["precision"] == name


def test_deterministic_changes_nothing_on_a_cpu(model_folder: Path, pipeline: Pipeline) -> None:
    deterministic = Pipeline.load(model_folder, device="cpu", precision="fp32", deterministic=True)
    for image, expected in zip(deterministic("a red star", n=3), pipeline("a red star", n=3), strict=True):
        assert same(image, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": "hot"}, "temperature is 'hot', expected a number"),
        ({"temperature": 1e-40}, "temperature is 1e-40, expected a number"),
        ({"guidance": 1e39}, "guidance is 1e\\+39, expected a number"),
        ({"guidance": [1, 2]}, r"guidance is \[1, 2\], expected a number"),
        ({"top_p": "a"}, "top_p is 'a', expected a number"),
        ({"prune_keep": "a"}, "prune_keep is 'a'"),
        ({"seed": 1.5}, "seed is 1.5, expected an integer"),
        ({"n": "2"}, "n is '2', expected an integer"),
        ({"init": 5, "keep": 0.5}, "the init image is a int, expected a file"),
        ({"init": np.zeros((16, 24, 3), dtype=np.uint8), "keep": "a"}, "keep is 'a', expected a share"),
        ({"init": np.zeros((16, 24, 3), dtype=np.uint8), "keep_rows": 1.5}, "keep_rows is 1.5, expected an integer"),
        ({"init": np.zeros((16, 24, 3), dtype=np.uint8), "mask": 5}, "the mask is a int, expected a file"),
        ({"init": np.zeros((16, 24, 3), dtype=np.uint8), "mask": (0, 0, 40, 4)}, r"the rectangle is \(0, 0, 40, 4\)"),
    ],
)
def test_values_of_another_type_are_told_in_one_line(pipeline: Pipeline, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipeline("a red star", **options)


@pytest.mark.parametrize("prompt", [5, None, [1]])
def test_a_prompt_that_is_no_text_is_told(pipeline: Pipeline, prompt: object) -> None:
    with pytest.raises(UserError, match="expected text"):
        pipeline(prompt)  # type: ignore[arg-type]


@pytest.mark.parametrize("rectangle", [(4, 4, 16, 12), "4,4,16,12"])
def test_a_rectangle_is_a_mask(pipeline: Pipeline, rectangle: tuple[int, int, int, int] | str) -> None:
    init = pipeline("a red star")[0]
    mask = np.zeros((16, 24), dtype=np.bool_)
    mask[4:12, 4:16] = True
    (by_mask,) = pipeline("x", init=init.image, mask=mask)
    (by_rectangle,) = pipeline("x", init=init.image, mask=rectangle)
    assert np.array_equal(by_mask.image, by_rectangle.image)
    assert by_mask.recipe() == by_rectangle.recipe()


def test_whole_numbers_are_settings_like_others(pipeline: Pipeline) -> None:
    assert np.array_equal(
        pipeline("x", temperature=1, min_p=0)[0].codes, pipeline("x", temperature=1.0, min_p=0.0)[0].codes
    )
    assert pipeline("x", top_k=np.int64(4), seed=np.int64(3))[0].seed == 3  # type: ignore[arg-type]
