"""Batches that fit: no forward is larger than allowed, whatever is asked for, and what is told of it adds up."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sampling.generated_image import GeneratedImage
from sampling.image_edit import EditOptions, make_edit
from sampling.pipeline import Pipeline
from sampling.request import Request
from sampling.runner import drawn_size
from sampling.settings import SamplingSettings
from tessera.errors import UserError
from tessera.precision import Precision

PLAIN = SamplingSettings()
GUIDED = SamplingSettings(guidance=2.0)
TOKENS = 24  # of an image


def requests_of(*counts: tuple[int, SamplingSettings]) -> list[Request]:
    return [
        Request(prompt=f"number {place}", seed=place, n=count, num_candidates=count, settings=settings)
        for place, (count, settings) in enumerate(counts)
    ]


@pytest.mark.parametrize("max_rows", [1, 2, 3, 4, 7])
def test_every_image_is_drawn_once_and_no_forward_has_too_many_rows(
    small: Pipeline, count_decode_calls: Callable[..., list[int]], max_rows: int
) -> None:
    small.max_rows = max_rows
    calls = count_decode_calls(small)
    requests = requests_of((3, PLAIN), (1, GUIDED), (2, GUIDED), (5, PLAIN))
    images = [image for part in small.run(requests, scorer=None) for image in part]
    assert [(image.prompt, image.image_index) for image in images] == [
        (request.prompt, index) for request in requests for index in range(request.n)
    ]
    assert max(calls) <= max(2, max_rows)  # the two rows of a guided image stay together
    rows = 3 + 2 + 4 + 5
    assert sum(calls) == rows * (TOKENS - 1), "nothing is drawn twice"


def test_small_requests_share_a_forward(small: Pipeline, count_decode_calls: Callable[..., list[int]]) -> None:
    small.max_rows = 6
    calls = count_decode_calls(small)
    list(small.run(requests_of((1, PLAIN), (1, GUIDED), (3, PLAIN), (1, PLAIN)), scorer=None))
    assert calls == [6] * (TOKENS - 1) + [1] * (TOKENS - 1)


@pytest.mark.parametrize("kind", ["new", "guided", "completed", "varied"])
def test_progress_only_rises_and_ends_at_the_total(small: Pipeline, photo: Image.Image, kind: str) -> None:
    options: dict[str, Any] = {
        "new": {"guidance": 1.0},
        "guided": {"guidance": 2.0},
        "completed": {"init": photo, "keep_rows": 2},
        "varied": {"init": photo, "keep": 0.75},  # each image knows another number of codes at its start
    }[kind]
    told: list[tuple[int, int]] = []
    small.max_rows = 16
    small(["a", "b"], n=5, on_progress=lambda done, total: told.append((done, total)), **options)
    done = [each for each, _ in told]
    assert {total for _, total in told} == {10 * TOKENS}
    assert done == sorted(done) and done[-1] == 10 * TOKENS
    assert len(set(done)) > 10


def test_scores_do_not_depend_on_what_is_drawn_beside_a_request(small: Pipeline, photo: Image.Image) -> None:
    edit = make_edit(small.vae, (16, 24), EditOptions(init=photo, keep=0.5), lambda note: None)
    requests = [*requests_of((6, PLAIN), (1, GUIDED)), Request(prompt="edit", settings=PLAIN, edit=edit)]
    for scorer in (None, "clip", "likelihood", "combined"):
        together = list(small.run(requests, scorer))
        for request, images in zip(requests, together, strict=True):
            (alone,) = small.run([request], scorer)
            assert [(image.image_index, dict(image.scores)) for image in images] == [
                (image.image_index, pytest.approx(dict(image.scores), rel=1e-4)) for image in alone
            ]


def test_the_drawn_size_is_that_of_the_images(pipeline: Pipeline) -> None:
    height, width = drawn_size(pipeline.prior, pipeline.vae)
    assert pipeline("a red star")[0].image.shape == (height, width, 3) == (16, 24, 3)


def test_codes_of_any_grid_are_decoded_and_each_alone(pipeline: Pipeline) -> None:
    codes = torch.randint(0, 15, (3, 2, 9))
    together = pipeline.decode(codes)
    assert together.shape == (3, 3, 8, 36) and together.dtype == torch.uint8
    for image, own in zip(together, codes, strict=True):
        assert torch.equal(pipeline.decode(own[None])[0], image)


def test_no_learned_scorer_is_told_with_the_command_that_trains_one(pipeline: Pipeline) -> None:
    without = Pipeline(prior=pipeline.prior, vae=pipeline.vae, tokenizer=pipeline.tokenizer)
    with pytest.raises(UserError, match="no scorer part: train one with `tessera train-scorer`"):
        without.score(torch.zeros(1, 3, 16, 24, dtype=torch.uint8), ["x"])


def test_partial_images_are_of_the_first_n_candidates(pipeline: Pipeline) -> None:
    seen = [
        (event.num_tokens, event.image_index)
        for event in pipeline.watch("a red star", every=12, n=2, best_of=5)
        if not isinstance(event, GeneratedImage)
    ]
    assert seen == [(12, 0), (12, 1)]


def test_bf16_decodes_pixels_near_those_of_fp32(pipeline: Pipeline) -> None:
    coarse = Pipeline(
        prior=pipeline.prior,
        vae=pipeline.vae,
        tokenizer=pipeline.tokenizer,
        precision=Precision("bf16", "asked for"),
    )
    codes = torch.randint(0, 15, (2, 4, 6))
    difference = np.abs(coarse.decode(codes).numpy().astype(int) - pipeline.decode(codes).numpy().astype(int))
    assert 0 < difference.max() < 16
