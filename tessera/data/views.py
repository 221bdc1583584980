"""Views of a picture: as the corpus shows it, then random crops of it, so that the prior sees more than one encoding.

In the manner of the DALL-E paper's transformer stage (Ramesh et al. 2021, appendix B, listing 2) the crops are mild and
near the middle, because a caption speaks of the whole picture.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tessera.data.images import fit_to
from tessera.data.order import mix

# V views, H W pixels.

# The largest box of the wanted aspect lies within this part of the room that it has along the picture's longer side.
_MIDDLE = (3 / 8, 5 / 8)


@dataclass(frozen=True, kw_only=True)
class Views:
    """How many views are taken of every picture, and how the further ones are cut."""

    count: int = 1
    """V, at least 1; the first view is the picture as it is"""
    crop_scale: float = 0.8
    """smallest side of a crop, as a share of the largest box of the same aspect; 0.5 to 1"""
    flip: bool = False
    """whether half of the further views are mirrored left to right"""
    seed: int = 0
    """keys the crops together with the numbers of picture and view"""


def cut_views(picture: Image.Image, size: tuple[int, int], views: Views, *, index: int) -> NDArray[np.uint8]:
    """Takes the views of one picture: a function of its pixels, its number and `views` alone.

    Args:
        picture: RGB, of any size.
        size: (height, width) in pixels of the views.
        views: how many, and how they are cut.
        index: the picture's number in its corpus, from 0.

    Returns:
        uint8 [V, height, width, 3]; view 0 is `fit_to` of the picture.
    """
    height, width = size
    pixels = np.empty((views.count, height, width, 3), np.uint8)
    pixels[0] = fit_to(picture, size)
    for view in range(1, views.count):
        draws = _uniform(views.seed, index, view)
        box = _crop_box(picture.size, size, share=views.crop_scale + (1 - views.crop_scale) * draws[0], at=draws[1:5])
        crop = picture.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
        if views.flip and draws[5] < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels[view] = np.asarray(crop)
    return pixels


def _uniform(*key: int) -> list[float]:
    """Six numbers in [0, 1) of a key."""
    return ((mix(*key, np.arange(6)) >> np.uint64(11)) / 2.0**53).tolist()


def _crop_box(
    picture_size: tuple[int, int], size: tuple[int, int], *, share: float, at: list[float]
) -> tuple[float, float, float, float]:
    """A box (left, top, right, bottom) of the aspect of `size` in a picture (width, height).

    It lies in the largest such box, which lies near the middle; `at` holds four places in [0, 1]: of the largest box
    along both axes, then of the crop in it.
    """
    width, height = picture_size
    scale = min(width / size[1], height / size[0])
    largest_width, largest_height = size[1] * scale, size[0] * scale
    near_middle = [_MIDDLE[0] + (_MIDDLE[1] - _MIDDLE[0]) * place for place in at[:2]]
    left = (width - largest_width) * near_middle[0] + (1 - share) * largest_width * at[2]
    top = (height - largest_height) * near_middle[1] + (1 - share) * largest_height * at[3]
    # Rounding must not lead out of the picture.
    return left, top, min(left + share * largest_width, width), min(top + share * largest_height, height)
