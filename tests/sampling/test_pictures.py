"""Sheets hold every image unharmed, in reading order, with text that fits below."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from sampling.pictures import GAP_PIXELS, MARGIN_PIXELS, Tile, contact_sheet, wrap
from tessera.errors import UserError


def random_image(height: int = 16, width: int = 24) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def colored(value: int) -> np.ndarray:
    return np.full((16, 24, 3), value, dtype=np.uint8)


def places(sheet: Image.Image, value: int) -> tuple[int, int]:
    """Top and left of the area of one gray value."""
    rows, columns = (np.asarray(sheet) == value).all(axis=2).nonzero()
    return int(rows.min()), int(columns.min())


def test_an_image_is_enlarged_by_a_whole_factor_and_kept_pixel_by_pixel() -> None:
    image = random_image()
    sheet = np.asarray(contact_sheet([Tile(image)], tile_pixels=80))  # 80 // 24 = 3
    area = sheet[MARGIN_PIXELS : MARGIN_PIXELS + 48, MARGIN_PIXELS : MARGIN_PIXELS + 72]
    assert np.array_equal(area, image.repeat(3, axis=0).repeat(3, axis=1))


def test_a_large_image_keeps_its_size() -> None:
    assert contact_sheet([Tile(random_image(30, 300))], tile_pixels=100).width == 300 + 2 * MARGIN_PIXELS


def test_images_stand_in_reading_order() -> None:
    sheet = contact_sheet([Tile(colored(value)) for value in (10, 60, 110)], columns=2, tile_pixels=24)
    first, second, third = (places(sheet, value) for value in (10, 60, 110))
    assert first == (MARGIN_PIXELS, MARGIN_PIXELS)
    assert second == (MARGIN_PIXELS, MARGIN_PIXELS + 24 + GAP_PIXELS)
    assert third[1] == MARGIN_PIXELS and third[0] > MARGIN_PIXELS + 16


def test_a_longer_caption_makes_room_and_title_moves_the_grid_down() -> None:
    plain = contact_sheet([Tile(colored(10))])
    captioned = contact_sheet([Tile(colored(10), "a red star left of a blue ring", "score 0.5")])
    titled = contact_sheet([Tile(colored(10))], title="one")
    assert captioned.height > plain.height and captioned.width == plain.width
    assert places(titled, 10)[0] > places(plain, 10)[0]


@pytest.mark.parametrize("text", ["a red star left of a blue ring", "w" * 90, "", "Привет, мир", "a\nb\tc"])
def test_wrapped_lines_fit_and_lose_nothing(text: str) -> None:
    font = ImageFont.load_default(15)
    lines = wrap(text, 100, font, max_lines=99)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == "".join(text.split())


def test_text_beyond_the_last_line_ends_in_an_ellipsis_that_fits() -> None:
    font = ImageFont.load_default(15)
    lines = wrap("many words " * 50, 100, font, max_lines=3)
    assert len(lines) == 3 and lines[-1].endswith("...") and font.getlength(lines[-1]) <= 100


def test_what_cannot_be_laid_out_is_refused() -> None:
    with pytest.raises(UserError, match="at least one image"):
        contact_sheet([])
    with pytest.raises(UserError, match=r"one size, got \[16, 24, 3\] and \[8, 8, 3\]"):
        contact_sheet([Tile(random_image()), Tile(random_image(8, 8))])
    with pytest.raises(UserError, match="expected uint8 images"):
        contact_sheet([Tile(np.zeros((4, 4, 3), dtype=np.float32))])
    with pytest.raises(UserError, match="take fewer images"):
        contact_sheet([Tile(colored(1))] * 200, columns=1)
