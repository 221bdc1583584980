"""Pictures of masks show every pair of the matrix and all that one query sees."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tessera.errors import UserError
from transformer import mask_pictures
from transformer.mask_pictures import draw, main
from transformer.masks import AttentionMask

MASKS = [
    AttentionMask(kind="row", text_len=3, grid_height=7, grid_width=5),
    AttentionMask(kind="conv", text_len=0, grid_height=6, grid_width=4, kernel_size=3, conv_mode="torus"),
]


def pixels_of(picture: Image.Image, color: tuple[int, int, int]) -> int:
    return int((np.asarray(picture) == color).all(axis=2).sum())


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.kind)
def test_every_pair_and_every_key_of_the_query_is_a_square_of_whole_pixels(mask: AttentionMask) -> None:
    dense, query = mask.dense(), mask.text_len + 2 * mask.grid_width
    picture = draw(mask, query=query, cell_pixels=6, margin_pixels=0)
    pair, cell = 6 * 6, 22 * 22
    text, image = dense[:, : mask.text_len], dense[:, mask.text_len :]
    # the query itself has a color of its own
    assert pixels_of(picture, mask_pictures._SEES_TEXT) == pair * text.sum() + cell * text[query].sum()
    seen = pair * (image.sum() - 1) + cell * (image[query].sum() - 1)
    assert pixels_of(picture, mask_pictures._SEES_IMAGE) == seen


def test_without_a_query_the_picture_shows_one_of_the_image() -> None:
    (mask, _) = MASKS
    shown = draw(mask)
    assert shown.tobytes() == draw(mask, query=3 + 5 * 5).tobytes()
    assert shown.tobytes() != draw(mask, query=0).tobytes()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"query": 38}, "positions 0 to 37; got query 38"),
        ({"query": -1}, "got query -1"),
        ({"cell_pixels": 0}, "38 positions at 0 pixels .* cell_pixels can be at most 210"),
        ({"cell_pixels": 211}, "cell_pixels can be at most 210"),
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        draw(MASKS[0], **wrong)


def test_the_command_writes_one_sheet(tmp_path: Path) -> None:
    assert main([str(tmp_path / "masks.png")]) == 0
    with Image.open(tmp_path / "masks.png") as sheet:
        assert sheet.width > 1_000
        colors = {color for _, color in sheet.convert("RGB").getcolors(maxcolors=2**16) or []}
    assert {color for color, _ in mask_pictures._LEGEND} <= colors


def test_the_command_needs_a_folder_to_write_into(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        main([str(tmp_path / "missing" / "masks.png")])
