"""What a user says of an edit becomes a value: which codes stay, how pixels join, and what files say of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dvae.model import DiscreteVAE
from sampling.editing import cells_to_draw, pixels_of
from sampling.image_edit import EditOptions, ImageEdit, make_edit, read_init
from sampling.pipeline import Pipeline
from tessera.errors import UserError

SIZE = (16, 24)
PAINTED = np.zeros(SIZE, dtype=np.bool_)
PAINTED[5:9, 9:18] = True  # touches rows 1 and 2, columns 2 to 4 of the 4x6 cells


@pytest.fixture
def vae(pipeline: Pipeline) -> DiscreteVAE:
    return pipeline.vae


def edit_of(vae: DiscreteVAE, **options: Any) -> ImageEdit:
    notes: list[str] = []
    edit = make_edit(vae, SIZE, EditOptions(**options), notes.append)
    assert not notes
    return edit


def drawn_cells(edit: ImageEdit, image_index: int = 0) -> set[tuple[int, int]]:
    mask = edit.known(seed=3, image_index=image_index).mask
    return {(int(row), int(column)) for row, column in (~mask).nonzero()}


def test_rows_are_kept_from_the_top(vae: DiscreteVAE, photo: Image.Image) -> None:
    edit = edit_of(vae, init=photo, keep_rows=3)
    assert edit.kind == "complete"
    assert drawn_cells(edit) == {(3, column) for column in range(6)}


def test_every_cell_with_paint_is_drawn_anew(vae: DiscreteVAE, photo: Image.Image) -> None:
    edit = edit_of(vae, init=photo, mask=PAINTED)
    assert edit.kind == "inpaint"
    assert drawn_cells(edit) == {(row, column) for row in (1, 2) for column in (2, 3, 4)}


def test_a_variation_keeps_its_share_and_every_image_another_one(vae: DiscreteVAE, photo: Image.Image) -> None:
    edit = edit_of(vae, init=photo, keep=0.25)
    cells = [drawn_cells(edit, image_index) for image_index in range(3)]
    assert edit.kind == "vary" and [len(each) for each in cells] == [18, 18, 18]
    assert cells[0] != cells[1] != cells[2]


def test_kept_codes_are_those_of_the_given_image(vae: DiscreteVAE, photo: Image.Image) -> None:
    expected = vae.encode(torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)[None].float() / 255)[0]
    assert expected.unique().numel() > 3, "an image of one code would make this test blind"
    for options in ({"keep_rows": 2}, {"keep": 0.5}, {"mask": PAINTED}):
        assert torch.equal(edit_of(vae, init=photo, **options).known(seed=1, image_index=1).codes, expected)


@pytest.mark.parametrize("kind", ["picture", "array", "file"])
def test_an_image_may_be_a_picture_an_array_or_a_file(
    vae: DiscreteVAE, photo: Image.Image, tmp_path: Path, kind: str
) -> None:
    photo.save(tmp_path / "photo.png")
    sources = {"picture": photo, "array": np.asarray(photo), "file": tmp_path / "photo.png"}
    notes: list[str] = []
    given = read_init(vae, SIZE, sources[kind], notes.append)
    assert given.size == SIZE and not notes
    assert np.array_equal(given.pixels.permute(1, 2, 0).numpy(), np.asarray(photo))


def test_an_image_of_another_size_is_resized_and_that_is_said(vae: DiscreteVAE, photo: Image.Image) -> None:
    notes: list[str] = []
    given = read_init(vae, SIZE, photo.resize((48, 32)), notes.append)
    assert notes == [
        "the init image has 32x48 pixels (height x width), the model draws 16x24: it is resized",
    ]
    assert given.size == (32, 48) and given.pixels.shape == (3, 16, 24) and given.codes.shape == (4, 6)
    read_init(vae, SIZE, photo.resize((40, 40)), notes.append)
    assert notes[1].endswith("it is cropped around its middle and resized")


def test_a_mask_is_of_the_size_of_the_image_as_it_was_given(vae: DiscreteVAE, photo: Image.Image) -> None:
    large = np.zeros((32, 48), dtype=np.bool_)
    large[10:18, 18:36] = True
    edit = make_edit(vae, SIZE, EditOptions(init=photo.resize((48, 32)), mask=large), lambda note: None)
    assert drawn_cells(edit) == {(row, column) for row in (1, 2) for column in (2, 3, 4)}


def test_without_a_seam_pixels_are_as_decoded(vae: DiscreteVAE, photo: Image.Image) -> None:
    drawn = torch.randint(0, 256, (2, 3, *SIZE)).to(torch.uint8)
    for options in ({"mask": PAINTED}, {"keep_rows": 1}, {"keep": 0.5}):
        assert torch.equal(edit_of(vae, init=photo, **options).join(vae, drawn), drawn)


def test_blend_keeps_pixels_far_from_the_paint_and_the_drawn_ones_below_it(
    vae: DiscreteVAE, photo: Image.Image
) -> None:
    drawn = torch.full((2, 3, *SIZE), 77, dtype=torch.uint8)
    joined = edit_of(vae, init=photo, mask=PAINTED, seam="blend").join(vae, drawn)
    original = torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)
    cells = pixels_of(cells_to_draw(torch.from_numpy(PAINTED), cell=4), cell=4)
    assert joined.shape == drawn.shape and bool((joined[:, :, cells] == 77).all())
    assert torch.equal(joined[0, :, :, :4], original[:, :, :4]), "column 4 is the last that the fade reaches"
    assert not torch.equal(joined[0, :, :4], original[:, :4])


def test_reencode_gives_the_codes_of_the_composite(vae: DiscreteVAE, photo: Image.Image) -> None:
    drawn = torch.full((1, 3, *SIZE), 77, dtype=torch.uint8)
    joined = edit_of(vae, init=photo, mask=PAINTED, seam="reencode").join(vae, drawn)
    composite = np.where(PAINTED[:, :, None], np.uint8(77), np.asarray(photo))
    codes = vae.encode(torch.from_numpy(composite).permute(2, 0, 1)[None].float() / 255)
    expected = (vae.decode(codes) * 255).round().to(torch.uint8)
    assert torch.equal(joined, expected)


def test_the_recipe_tells_images_masks_and_seams_apart(vae: DiscreteVAE, photo: Image.Image) -> None:
    other = Image.fromarray(255 - np.asarray(photo))
    recipes = [
        edit_of(vae, **options).recipe()
        for options in (
            {"init": photo, "keep_rows": 1},
            {"init": photo, "keep_rows": 2},
            {"init": other, "keep_rows": 2},
            {"init": photo, "keep": 0.5},
            {"init": photo, "keep": 0.25},
            {"init": photo, "mask": PAINTED},
            {"init": photo, "mask": PAINTED, "seam": "blend"},
            {"init": photo, "mask": np.roll(PAINTED, 8, axis=1)},
        )
    ]
    written = [json.dumps(recipe) for recipe in recipes]
    assert len(set(written)) == len(recipes)
    assert json.loads(written[6])["seam"] == "blend"
    assert edit_of(vae, init=photo, keep_rows=1).recipe() == recipes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_rows": 2}, "are about an init image: give one"),
        ({"init": "photo"}, "exactly one of mask .* got none of them"),
        ({"init": "photo", "keep_rows": 2, "keep": 0.5}, "got keep_rows and keep"),
        ({"init": "photo", "keep_rows": 4}, "4 known rows of a grid of 4, expected 1 to 3"),
        ({"init": "photo", "keep": 1.0}, "keep is 1, expected a share between 0"),
        ({"init": "photo", "keep": 0.5, "seam": "blend"}, "seam blend joins pixels at a mask"),
        ({"init": "photo", "mask": PAINTED, "seam": "glue"}, "seam is 'glue', expected one of none, blend, reencode"),
        (
            {"init": "photo", "mask": PAINTED[:8]},
            r"the mask has 8x24 pixels .* the image 16x24: expected the same size",
        ),
        ({"init": "photo", "mask": PAINTED & ~PAINTED}, "the mask paints nothing"),
        ({"init": "photo", "mask": PAINTED | ~PAINTED}, "so nothing is kept"),
        ({"init": "nowhere.png", "keep": 0.5}, "init image nowhere.png: cannot be read: No such file"),
        ({"init": np.zeros((16, 24), dtype=np.uint8), "keep": 0.5}, r"uint8 \[16, 24\], expected uint8 \[H, W, 3\]"),
        ({"init": np.zeros((16, 24, 3)), "keep": 0.5}, r"float64 \[16, 24, 3\], expected uint8 \[H, W, 3\]"),
    ],
)
def test_what_cannot_be_is_refused(vae: DiscreteVAE, photo: Image.Image, options: dict[str, Any], message: str) -> None:
    if isinstance(options.get("init"), str) and options["init"] == "photo":
        options = {**options, "init": photo}
    with pytest.raises(UserError, match=message):
        make_edit(vae, SIZE, EditOptions(**options), lambda note: None)
