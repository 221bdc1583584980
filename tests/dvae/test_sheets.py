"""Sheets hold every pixel of what they show where the header says, and mark what is dead."""

import numpy as np
import pytest

from dvae.sheets import MAX_SIDE_PIXELS, code_map, codebook_sheet, difference, most_rows, sheet, sheet_of_rows
from tessera.errors import UserError


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def flat(value: int, height: int = 8, width: int = 12) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def area(picture: np.ndarray, value: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of what has one gray value."""
    rows, columns = (picture == value).all(axis=2).nonzero()
    assert len(rows), f"nothing is {value}"
    return int(rows.min()), int(columns.min()), int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def test_equal_codes_have_equal_colors() -> None:
    picture = code_map(np.array([[5, 7], [7, 5]]), 8, 8)
    assert (picture.shape, picture.dtype) == ((8, 8, 3), np.uint8)
    assert (picture[:4, :4] == picture[4:, 4:]).all()
    assert (picture[:4, :4] != picture[:4, 4:]).any()


def test_a_difference_is_as_bright_as_its_gain_says_and_ends_at_white() -> None:
    assert (difference(flat(10), flat(30)) == 20).all()
    assert (difference(flat(30), flat(10), gain=4) == 80).all()
    assert (difference(flat(0), flat(200), gain=4) == 255).all()


def test_a_bare_sheet_holds_four_panels_enlarged_pixel_by_pixel() -> None:
    original, remade, codes = noise(8, 12, 3), noise(12, 8, 3).reshape(8, 12, 3), np.arange(6).reshape(2, 3)
    picture = sheet(original, remade, codes, scale=3)
    assert picture.shape == (24, 4 * 36 + 3 * 4, 3)
    expected = [original, remade, difference(original, remade), code_map(codes, 8, 12)]
    for place, panel in enumerate(expected):
        assert np.array_equal(picture[::3, 40 * place : 40 * place + 36 : 3], panel)


def test_every_image_is_a_row_of_original_reconstruction_difference_and_codes() -> None:
    originals, remade = [flat(101), flat(151)], [flat(111), flat(171)]
    picture = sheet_of_rows(originals, remade, [np.zeros((1, 1), int)] * 2, scale=2, gain=3)
    places = [area(picture, value) for value in (101, 111, 30, 151, 171, 60)]
    assert {place[2:] for place in places} == {(16, 24)}, "enlarged by two"
    first, second = places[:3], places[3:]
    assert len({top for top, *_ in first}) == len({top for top, *_ in second}) == 1
    assert second[0][0] >= first[0][0] + 16, "the second row is below"
    assert [left for _, left, *_ in first] == sorted({left for _, left, *_ in first})
    assert [left for _, left, *_ in first] == [left for _, left, *_ in second]
    top, left = first[2][0], first[2][1] + first[2][1] - first[1][1]  # the fourth column is as far as the third
    codes_panel = picture[top : top + 16, left : left + 24]
    assert np.array_equal(codes_panel, code_map(np.zeros((1, 1), int), 16, 24))


def test_images_of_several_sizes_share_a_sheet() -> None:
    originals = [flat(101, 8, 40), flat(151, 24, 8)]
    picture = sheet_of_rows(originals, originals, [np.zeros((1, 5), int), np.zeros((3, 1), int)])
    assert (picture == 101).all(axis=2).sum() == 2 * 8 * 40
    assert (picture == 151).all(axis=2).sum() == 2 * 24 * 8


def test_the_header_names_the_gain_of_the_difference() -> None:
    rows = [flat(101)], [flat(101)], [np.zeros((1, 1), int)]
    plain, bright = (sheet_of_rows(*rows, gain=gain) for gain in (1, 4))
    assert plain.shape == bright.shape
    assert (plain != bright).any(), "no pixel differs between the images: only the header can tell the gains apart"
    assert (plain == bright)[area(plain, 101)[0] :].all()


def test_figures_names_and_a_title_make_room_for_themselves() -> None:
    rows = np.stack([flat(101)] * 2), np.stack([flat(101)] * 2), np.zeros((2, 1, 1), int)
    plain = sheet_of_rows(*rows)
    measured = sheet_of_rows(*rows, decibels=[20.0, 30.0])
    named = sheet_of_rows(*rows, names=["a.png", "b.png"])
    assert measured.shape == named.shape and len(measured) > len(plain)
    assert (measured != named).any()
    assert area(sheet_of_rows(*rows, title="two images"), 101)[0] > area(plain, 101)[0]
    assert sheet_of_rows(*rows, names=["long/" * 99 + "a.png", "b"]).shape == named.shape, "long names are cut"


def test_rows_that_do_not_belong_together_are_refused() -> None:
    image, codes = flat(1), np.zeros((1, 1), int)
    with pytest.raises(ValueError, match=r"at least one row"):
        sheet_of_rows([], [], [])
    with pytest.raises(ValueError, match=r"'originals': 2, 'reconstructions': 1"):
        sheet_of_rows([image, image], [image], [codes])
    with pytest.raises(ValueError, match=r"'names': 2"):
        sheet_of_rows([image], [image], [codes], names=["a", "b"])
    with pytest.raises(ValueError, match=r"one size; got \[8, 12, 3\] and \[12, 8, 3\]"):
        sheet_of_rows([image], [flat(1, 12, 8)], [codes])
    with pytest.raises(ValueError, match=r"uint8 images \[H, W, 3\]; got float64"):
        sheet_of_rows([image.astype(float)], [image], [codes])
    with pytest.raises(ValueError, match=r"integer codes \[h, w\] for each image; got float64"):
        sheet_of_rows([image], [image], [codes.astype(float)])


def test_as_many_rows_fit_one_sheet_as_are_promised() -> None:
    most = most_rows(8)
    image, codes = flat(0), np.zeros((1, 1), int)

    def rows(count: int) -> np.ndarray:
        return sheet_of_rows(
            [image] * count, [image] * count, [codes] * count, names=["x"] * count, title=" ".join(["title"] * 12)
        )

    assert MAX_SIDE_PIXELS - 50 < len(rows(most)) <= MAX_SIDE_PIXELS
    with pytest.raises(UserError, match="expected at most 16,000 on a side: show fewer"):
        rows(most + 1)


def grays(*values: int) -> np.ndarray:
    """Tiles of 8 x 8 pixels, each of one gray value."""
    return np.stack([flat(value, 8, 8) for value in values])


def bar_length(picture: np.ndarray, value: int) -> int:
    """Filled pixels of the bar below the tile of one gray value."""
    top, left, height, width = area(picture, value)
    band = picture[top + height : top + height + 8, left : left + width]
    return int((band[..., 2].astype(int) - band[..., 0] > 50).sum(axis=1).max())  # blue


def test_codes_stand_in_reading_order_enlarged_by_a_whole_factor() -> None:
    picture = codebook_sheet(grays(10, 60, 110), np.arange(3), None, order="index", columns=2)
    (top, left, height, width), second, third = (area(picture, value) for value in (10, 60, 110))
    assert height == width == 48
    assert second[0] == top and second[1] >= left + 48
    assert third[1] == left and third[0] >= top + 48


def test_bars_grow_with_the_logarithm_of_use() -> None:
    counts = np.array([10**6 - 1, 10**3 - 1, 1, 0])
    picture = codebook_sheet(grays(10, 60, 110, 160), np.arange(4), counts)
    assert [bar_length(picture, value) for value in (10, 60, 110)] == [48, 24, 3]


def test_without_counts_there_are_no_bars_and_no_dead_codes() -> None:
    counted = codebook_sheet(grays(10, 60), np.arange(2), np.array([5, 0]), order="index")
    plain = codebook_sheet(grays(10, 60), np.arange(2), None, order="index")
    assert bar_length(counted, 10) == 48 and bar_length(plain, 10) == 0
    assert area(plain, 60)[2:] == (48, 48)


def test_dead_codes_are_dimmed_and_crossed_out() -> None:
    picture = codebook_sheet(grays(10, 60), np.arange(2), np.array([5, 0]), order="index")
    assert (picture == 10).all(axis=2).any() and not (picture == 60).all(axis=2).any()
    red = (picture[..., 0] > 150) & (picture[..., 1] < 100)
    assert red.sum() == 2 * 48, "two diagonals"


def test_by_use_dead_codes_stand_apart_and_by_index_in_their_places() -> None:
    counts = np.array([7, 0, 9])
    by_use = codebook_sheet(grays(110, 10, 60), np.array([2, 0, 1]), counts, columns=3)
    by_index = codebook_sheet(grays(10, 60, 110), np.arange(3), counts, order="index", columns=3)

    def crossed(picture: np.ndarray) -> tuple[int, int]:
        rows, columns = ((picture[..., 0] > 150) & (picture[..., 1] < 100)).nonzero()
        return int(rows.max()), int(columns.max())

    used = area(by_use, 110)
    assert area(by_use, 10)[0] == used[0]
    assert crossed(by_use)[0] > used[0] + 2 * used[2], "below the used ones, with a line between"
    first, last = area(by_index, 10), area(by_index, 110)
    assert crossed(by_index)[0] == first[0] + 47 and first[1] + 48 <= crossed(by_index)[1] < last[1]


@pytest.mark.parametrize("side", [8, 16])
def test_a_codebook_of_8192_stays_a_picture_that_can_be_opened(side: int) -> None:
    tiles = np.zeros((8192, side, side, 3), np.uint8)
    picture = codebook_sheet(tiles, np.arange(8192), np.arange(8192)[::-1], title="codes", lines=["a line"] * 3)
    assert max(picture.shape) < MAX_SIDE_PIXELS / 3


def test_a_sheet_too_large_to_open_is_refused() -> None:
    with pytest.raises(UserError, match="expected at most 16,000 on a side: show fewer"):
        codebook_sheet(np.zeros((600, 8, 8, 3), np.uint8), np.arange(600), None, order="index", columns=1)


def test_tiles_that_do_not_belong_to_the_counts_are_refused() -> None:
    tiles, codes = grays(10, 60), np.arange(2)
    with pytest.raises(ValueError, match=r"uint8 tiles \[n, f, f, 3\]; got uint8 \[2, 4, 8, 3\]"):
        codebook_sheet(tiles[:, :4], codes, None, order="index")
    with pytest.raises(ValueError, match=r"a code for each of at least one tile; got \[1\] for 2"):
        codebook_sheet(tiles, codes[:1], None, order="index")
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 2\)"):
        codebook_sheet(tiles, codes + 1, np.array([1, 1]), order="index")
    with pytest.raises(ValueError, match="sorted by use"):
        codebook_sheet(tiles, codes, np.array([1, 2]))
    with pytest.raises(ValueError, match="sorted by use"):
        codebook_sheet(tiles, codes, None)
