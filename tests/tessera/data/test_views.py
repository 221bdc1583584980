"""Views: the first is the picture as it is, the others are mild crops near the middle, functions of their key."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tessera.data.images import fit_to
from tessera.data.views import Views, cut_views


def ramps(width: int, height: int) -> Image.Image:
    """A picture whose red and green say where a pixel lies, as shares of width and height of 255."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()[None, :]
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return Image.fromarray(pixels)


def noise(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def spans(view: NDArray[np.uint8], channel: int, length: int) -> tuple[float, float]:
    """From where to where a view of `ramps` reaches along an axis of `length` pixels of the picture."""
    values = view[..., channel].mean(axis=channel) / 255 * length  # [W] for red, [H] for green
    pixel = (values[-3] - values[2]) / (len(values) - 5)  # resizing bends the ramp at the edges
    return values[2] - 2.5 * pixel, values[-3] + 2.5 * pixel


def test_the_first_view_is_the_picture_as_it_is() -> None:
    picture = ramps(90, 60)
    for count in (1, 3):
        views = cut_views(picture, (16, 24), Views(count=count), index=7)
        assert views.shape == (count, 16, 24, 3) and views.dtype == np.uint8
        assert (views[0] == fit_to(picture, (16, 24))).all()


def test_a_view_is_a_function_of_seed_picture_and_number() -> None:
    picture = noise(64)
    few, many = (cut_views(picture, (16, 16), Views(count=count), index=3) for count in (2, 5))
    assert (few == many[:2]).all()
    assert len({view.tobytes() for view in many}) == 5
    assert (cut_views(picture, (16, 16), Views(count=2), index=4)[1] != few[1]).any()
    assert (cut_views(picture, (16, 16), Views(count=2, seed=1), index=3)[1] != few[1]).any()


@pytest.mark.parametrize(("width", "height"), [(200, 200), (400, 200), (200, 320)])
def test_crops_have_their_least_size_and_lie_near_the_middle(width: int, height: int) -> None:
    side = min(width, height)
    views = Views(count=100, crop_scale=0.7)
    crops = cut_views(ramps(width, height), (32, 32), views, index=0)[1:]
    for channel, length in ((0, width), (1, height)):
        starts, ends = np.array([spans(crop, channel, length) for crop in crops]).T
        shares = (ends - starts) / side
        assert 0.68 < shares.min() < 0.74 and 0.96 < shares.max() < 1.02
        room = length - side
        assert starts.min() > 3 / 8 * room - 3 and ends.max() < side + 5 / 8 * room + 3
        assert starts.max() - starts.min() > 0.2 * side, "they do not all lie at one place"


def test_crops_keep_the_aspect() -> None:
    crops = cut_views(ramps(400, 400), (16, 32), Views(count=20), index=0)[1:]
    for crop in crops:
        (left, right), (top, bottom) = spans(crop, 0, 400), spans(crop, 1, 400)
        assert (right - left) / (bottom - top) == pytest.approx(2, rel=0.05)


def test_flip_mirrors_half_of_the_crops_and_never_the_picture_itself() -> None:
    picture = noise(16)
    upright = np.asarray(picture)
    views = cut_views(picture, (16, 16), Views(count=101, crop_scale=1.0, flip=True), index=0)
    assert (views[0] == upright).all()
    mirrored = [(view == upright[:, ::-1]).all() for view in views[1:]]
    assert 30 < sum(mirrored) < 70
    assert all((view == upright).all() for view, flipped in zip(views[1:], mirrored, strict=True) if not flipped)
    plain = cut_views(picture, (16, 16), Views(count=20, crop_scale=1.0), index=0)
    assert (plain == upright).all()
