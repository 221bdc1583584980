"""Edits through the pipeline: what is kept is kept exactly, what is drawn is new, and canvases grow around an image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sampling import outpainting
from sampling.editing import cells_to_draw, known_share
from sampling.generated_image import GeneratedImage
from sampling.outpainting import Margins
from sampling.pipeline import Pipeline
from tessera.errors import UserError

PAINTED = np.zeros((16, 24), dtype=np.bool_)
PAINTED[5:9, 9:18] = True  # touches rows 1 and 2, columns 2 to 4 of the 4x6 cells


def kept_cells(kind: str, image: GeneratedImage) -> np.ndarray:
    """bool [h, w], what an image of `options_of(kind)` must have kept."""
    if kind == "complete":
        return np.arange(4)[:, None] < np.array([2] * 6)
    if kind == "inpaint":
        return ~cells_to_draw(torch.from_numpy(PAINTED), cell=4).numpy()
    grid = torch.zeros(4, 6, dtype=torch.int64)
    return known_share(grid, keep=0.5, seed=image.seed, image_index=image.image_index).mask.numpy()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("complete", {"keep_rows": 2}), ("inpaint", {"mask": PAINTED}), ("vary", {"keep": 0.5})],
)
def test_an_edit_keeps_exactly_the_known_codes_and_draws_the_others(
    pipeline: Pipeline, photo: Image.Image, kind: str, options: dict[str, Any]
) -> None:
    given = pipeline.encode(np.asarray(photo).copy())
    images = pipeline("a red star", n=4, seed=2, init=photo, **options)
    for image in images:
        kept = kept_cells(kind, image)
        assert np.array_equal(image.codes[kept], given[kept])
        assert (image.codes[~kept] != given[~kept]).mean() > 0.4
        assert image.edit is not None and image.edit["kind"] == kind
        assert set(image.scores) == {"clip", "likelihood", "context", "combined"}, "edits rank by all there is"
    assert len({image.codes.tobytes() for image in images}) == 4


@pytest.mark.parametrize("kind", ["picture", "array", "file"])
def test_the_given_image_may_be_a_picture_an_array_or_a_file(
    pipeline: Pipeline, photo: Image.Image, tmp_path: Path, kind: str
) -> None:
    photo.save(tmp_path / "photo.png")
    init: Any = {"picture": photo, "array": np.asarray(photo), "file": tmp_path / "photo.png"}[kind]
    (image,) = pipeline("a red star", init=init, keep_rows=2)
    assert np.array_equal(image.codes[:2], pipeline.encode(np.asarray(photo).copy())[:2])


def test_a_seam_brings_kept_pixels_back(pipeline: Pipeline, photo: Image.Image) -> None:
    plain, blended, recoded = (
        pipeline("a red star", seed=2, init=photo, mask=PAINTED, seam=seam)[0] for seam in ("none", "blend", "reencode")
    )
    assert np.array_equal(plain.codes, blended.codes) and np.array_equal(plain.codes, recoded.codes)
    assert np.array_equal(blended.image[:, :4], np.asarray(photo)[:, :4])
    assert not np.array_equal(plain.image[:, :4], np.asarray(photo)[:, :4])
    assert len({image.image.tobytes() for image in (plain, blended, recoded)}) == 3


def test_the_context_ranks_by_how_likely_the_kept_codes_are(pipeline: Pipeline, photo: Image.Image) -> None:
    images = pipeline("a red star", n=5, init=photo, mask=PAINTED, scorer="context", guidance=1.0, temperature=0.3)
    scores = [image.scores["context"] for image in images]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 5
    kept = torch.from_numpy(kept_cells("inpaint", images[0])).flatten()
    for image in images:
        codes = torch.from_numpy(image.codes).flatten()[None]
        with torch.no_grad():
            logits = pipeline.prior(pipeline.text_ids(["a red star"]), codes).image_logits
        chosen = logits.log_softmax(dim=2).gather(2, codes[:, :, None])[0, :, 0]
        assert float(chosen[kept].sum()) == pytest.approx(image.scores["context"], abs=1e-3)


def test_an_image_of_another_size_is_resized_and_that_is_said(pipeline: Pipeline, photo: Image.Image) -> None:
    with pytest.warns(UserWarning, match="32x48 pixels .* the model draws 16x24: it is resized"):
        pipeline("a red star", init=photo.resize((48, 32)), keep_rows=2)


def test_a_mask_of_another_size_is_refused(pipeline: Pipeline, photo: Image.Image) -> None:
    with pytest.raises(UserError, match="the mask has 16x12 pixels .* the image 16x24: expected the same size"):
        pipeline.stream("a red star", init=photo, mask=PAINTED[:, :12])


# outpainting


def test_outpainting_keeps_the_image_in_its_place(pipeline: Pipeline, photo: Image.Image) -> None:
    told: list[tuple[int, int]] = []
    images = pipeline.outpaint(
        "a red star",
        init=photo,
        margins=Margins(left=2, top=1, right=5, bottom=3),
        n=2,
        seed=3,
        on_progress=lambda done, total: told.append((done, total)),
    )
    given = pipeline.encode(np.asarray(photo).copy())
    for index, image in enumerate(images):
        assert image.codes.shape == (4 + 4, 6 + 7) and image.image.shape == (4 * 8, 4 * 13, 3)
        assert np.array_equal(image.codes[1:5, 2:8], given)
        assert (image.image_index, image.rank, image.scorer) == (index, index, None)
        assert image.edit is not None and image.edit["margins"] == {"left": 2, "top": 1, "right": 5, "bottom": 3}
        decoded = pipeline.decode(torch.from_numpy(image.codes)[None])[0].permute(1, 2, 0).numpy()
        assert np.array_equal(image.image, decoded)
    assert not np.array_equal(images[0].codes, images[1].codes)
    done = [each for each, _ in told]
    assert done == sorted(done) and told[-1][0] == told[-1][1]


def test_outpainting_depends_on_seed_and_index_alone(pipeline: Pipeline, photo: Image.Image) -> None:
    def draw(**options: Any) -> list[GeneratedImage]:
        return pipeline.outpaint("a red star", init=photo, margins=Margins(right=4), **options)

    several = draw(n=3, seed=7)
    assert np.array_equal(draw(seed=7)[0].image, several[0].image)
    assert not np.array_equal(draw(seed=8)[0].codes, several[0].codes)
    assert not np.array_equal(draw(seed=7, step=1)[0].codes, several[0].codes)
    assert not np.array_equal(draw(seed=7, temperature=0.1)[0].codes, several[0].codes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0, expected at least 1"),
        ({"step": 4}, "step is 4 cells, expected 1 to 3"),
        ({"margins": Margins(right=-1)}, "margin right is -1 cells"),
        ({"init": "nowhere.png"}, "nowhere.png: cannot be read"),
        ({"top_p": 0.0}, "top_p is 0.0, expected"),
        ({"keep": 0.5}, "no option 'keep'"),
    ],
)
def test_wrong_arguments_of_outpainting_are_refused(
    pipeline: Pipeline, photo: Image.Image, options: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"init": photo, "margins": Margins(right=1), **options}
    with pytest.raises(UserError, match=message):
        pipeline.outpaint("a red star", **arguments)


def test_outpainting_goes_on_with_the_candidate_that_fits_what_is_known(pipeline: Pipeline) -> None:
    init = pipeline("a red star", seed=1)[0].image
    drawn = []
    steps = outpainting.sample_codes

    def remember(*arguments, **options):
        sampled = steps(*arguments, **options)
        drawn.append(sampled)
        return sampled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outpainting, "sample_codes", remember)
        images = pipeline.outpaint("a red star", init=init, margins="left=2", n=2, best_of=6)
    assert [image.candidates for image in images] == [3, 3]
    (window,) = drawn
    best = window.context_log_likelihood.reshape(2, 3).argmax(dim=1)
    expected = window.codes.reshape(2, 3, 4, 6)[torch.arange(2), best]
    for image, codes in zip(images, expected, strict=True):
        assert np.array_equal(image.codes[:, :2], codes[:, :2].numpy())
    fits = window.context_log_likelihood.reshape(2, 3).amax(dim=1).tolist()
    assert [image.scores["context"] for image in images] == pytest.approx(fits)
    with pytest.raises(UserError, match="best_of is 5, expected a multiple of n = 2"):
        pipeline.outpaint("a red star", init=init, margins="left=2", n=2, best_of=5)
