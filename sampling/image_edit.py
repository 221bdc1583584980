"""An edit as a value: a given image, what of it is kept, and how kept pixels join the drawn ones.

`sampling.editing` has the functions; here a user's arguments become one of three edits: completion, inpainting, or
variation.
"""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dvae.model import DiscreteVAE
from dvae.pixels import to_uint8
from sampling import editing
from sampling.editing import Known, Seam
from tessera.data.images import ImageError, fit_to, open_image
from tessera.errors import UserError

# B images, H W pixels, h w code grid, f pixels per cell side.

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray
"""A file, a PIL image, or uint8 [H, W, 3]."""
MaskSource = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor | tuple[int, int, int, int]
"""See `sampling.editing.read_mask`; or a rectangle (left, top, right, bottom) in pixels, right and bottom excluded,
also as text: "8,8,40,24"."""


class EditOptions(NamedTuple):
    """What a user says of an edit."""

    init: ImageSource | None = None
    """The given image; cropped to the model's aspect and resized."""
    mask: MaskSource | None = None
    """Inpaint: white, or transparent, is drawn anew; of the size of `init` as it was given."""
    keep_rows: int | None = None
    """Complete: so many rows of codes are kept, from the top."""
    keep: float | None = None
    """Vary: a random share of the codes is kept, in (0, 1)."""
    seam: Seam = "none"
    """Inpaint: how kept pixels join drawn ones; none, blend or reencode."""

    @property
    def is_asked(self) -> bool:
        """Whether the user said anything of an edit."""
        given = (self.init, self.mask, self.keep_rows, self.keep)
        return any(option is not None for option in given) or self.seam != "none"


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageEdit:
    """An image of which a part is drawn anew.

    Attributes:
        kind: complete, inpaint or vary.
        codes: int64 [h, w] of the image.
        pixels: uint8 [3, H, W] of the image.
        to_draw: bool [h, w], of complete and inpaint.
        painted: bool [H, W], of inpaint.
        keep: share of codes, of vary.
        seam: how kept pixels join drawn ones.
    """

    kind: Literal["complete", "inpaint", "vary"]
    codes: Tensor
    pixels: Tensor
    to_draw: Tensor | None = None
    painted: Tensor | None = None
    keep: float | None = None
    seam: Seam = "none"

    def known(self, *, seed: int, image_index: int) -> Known:
        """The codes that an image keeps."""
        if self.keep is not None:
            return editing.known_share(self.codes, keep=self.keep, seed=seed, image_index=image_index)
        assert self.to_draw is not None
        return editing.known_outside(self.codes, self.to_draw)

    def join(self, vae: DiscreteVAE, drawn: Tensor) -> Tensor:
        """Images uint8 [B, 3, H, W] with the kept pixels brought back as `seam` says."""
        if self.painted is None or self.seam == "none":
            return drawn
        if self.seam == "blend":
            assert self.to_draw is not None
            cells = editing.pixels_of(self.to_draw, cell=vae.downsampling)
            return editing.blend(self.pixels, drawn, cells, feather_pixels=vae.downsampling)
        device = next(vae.parameters()).device
        harmonized = editing.harmonize(
            vae, drawn.to(device).float() / 255, self.pixels.to(device).float() / 255, self.painted
        )
        return to_uint8(harmonized.pixels).permute(0, 3, 1, 2).contiguous().cpu()

    def recipe(self) -> dict[str, Any]:
        """What the edit adds to an image's recipe, as plain values; images and masks by their hashes."""
        known: dict[str, Any] = {"kind": self.kind, "init_sha256": _sha256(self.pixels)}
        if self.keep is not None:
            known["keep"] = self.keep
        if self.to_draw is not None:
            known["drawn_cells_sha256"] = _sha256(self.to_draw)
        if self.painted is not None:
            known["painted_sha256"], known["seam"] = _sha256(self.painted), self.seam
        return known


class GivenImage(NamedTuple):
    """An image as the model sees it."""

    codes: Tensor
    """int64 [h, w]."""
    pixels: Tensor
    """uint8 [3, H, W]."""
    size: tuple[int, int]
    """(height, width) in pixels as it was given."""

    @property
    def sha256(self) -> str:
        """Of the pixels."""
        return _sha256(self.pixels)


def read_init(
    vae: DiscreteVAE, size: tuple[int, int], source: ImageSource | None, on_note: Callable[[str], None]
) -> GivenImage:
    """An image and its codes.

    Args:
        vae: gives the codes; on its device.
        size: (height, width) in pixels that the model draws.
        source: the image; cropped to the aspect of `size` and resized.
        on_note: called with one line where the image is changed to fit.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    picture, name = _open(source)
    given_size = (picture.height, picture.width)
    if given_size != size:
        height, width = given_size
        cropped = "" if height * size[1] == width * size[0] else "cropped around its middle and "
        on_note(
            f"{name} has {height}x{width} pixels (height x width), the model draws {size[0]}x{size[1]}: "
            f"it is {cropped}resized"
        )
    pixels = torch.from_numpy(fit_to(picture, size)).permute(2, 0, 1).contiguous()  # uint8 [3, H, W]
    device = next(vae.parameters()).device
    codes = vae.encode(pixels[None].to(device).float() / 255)[0].cpu()  # [h, w]
    return GivenImage(codes, pixels, given_size)


def make_edit(
    vae: DiscreteVAE, size: tuple[int, int], options: EditOptions, on_note: Callable[[str], None]
) -> ImageEdit:
    """The edit that a user's arguments ask for.

    Args:
        vae: see `read_init`.
        size: see `read_init`.
        options: what the user said.
        on_note: see `read_init`.

    Raises:
        UserError: an image or mask cannot be used, or it is not said, or said twice, what to keep.
    """
    if options.init is None:
        raise UserError("mask, keep_rows, keep and seam are about an init image: give one")
    asked = [name for name in ("mask", "keep_rows", "keep") if getattr(options, name) is not None]
    if len(asked) != 1:
        got = "none of them" if not asked else " and ".join(asked)
        raise UserError(
            f"an init image needs exactly one of mask (inpaint), keep_rows (complete) and keep (vary), got {got}"
        )
    if options.seam not in get_args(Seam):
        raise UserError(f"seam is {options.seam!r}, expected one of {', '.join(get_args(Seam))}")
    if options.seam != "none" and options.mask is None:
        raise UserError(f"seam {options.seam} joins pixels at a mask: give a mask, or leave seam out")
    if options.keep is not None and not isinstance(options.keep, Real):
        raise UserError(f"keep is {options.keep!r}, expected a share in (0, 1)")
    if isinstance(options.keep_rows, bool) or not isinstance(options.keep_rows, Integral | None):
        raise UserError(f"keep_rows is {options.keep_rows!r}, expected an integer")
    given = read_init(vae, size, options.init, on_note)
    codes, pixels = given.codes, given.pixels
    if options.keep is not None:
        editing.known_share(codes, keep=options.keep, seed=0, image_index=0)  # refuses a share that cannot be
        return ImageEdit(kind="vary", codes=codes, pixels=pixels, keep=options.keep)
    if options.keep_rows is not None:
        to_draw = ~editing.known_rows(codes, options.keep_rows).mask
        return ImageEdit(kind="complete", codes=codes, pixels=pixels, to_draw=to_draw)
    assert options.mask is not None
    painted = editing.fit_mask(_read_mask(options.mask, given.size), size)
    to_draw = editing.cells_to_draw(painted, cell=vae.downsampling, grow=editing.grow_for(vae.config))
    return ImageEdit(kind="inpaint", codes=codes, pixels=pixels, to_draw=to_draw, painted=painted, seam=options.seam)


def parse_rectangle(text: str) -> tuple[int, int, int, int] | None:
    """The rectangle that a text such as "8,8,40,24" says; None if it says another thing."""
    if not re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6}){3}", text):
        return None
    left, top, right, bottom = (int(number) for number in text.split(","))
    return left, top, right, bottom


def _read_mask(source: MaskSource, size: tuple[int, int]) -> Tensor:
    """What is to be drawn anew, bool [H, W]."""
    if isinstance(source, str):
        source = parse_rectangle(source) or source
    if not isinstance(source, tuple):
        if not isinstance(source, str | os.PathLike | Image.Image | np.ndarray | Tensor):
            raise UserError(
                f"the mask is a {type(source).__name__}, expected a file, an image, an array or a rectangle"
            )
        return editing.read_mask(source, size)
    height, width = size
    whole = all(isinstance(number, Integral) for number in source) and len(source) == 4
    if not whole or not (0 <= source[0] < source[2] <= width and 0 <= source[1] < source[3] <= height):
        raise UserError(
            f"the rectangle is {source}, expected (left, top, right, bottom) within {width}x{height} pixels "
            "(width x height)"
        )
    painted = torch.zeros(size, dtype=torch.bool)
    painted[source[1] : source[3], source[0] : source[2]] = True
    return painted


def _open(source: ImageSource | None) -> tuple[Image.Image, str]:
    """An RGB picture, and what to call it."""
    if source is None:
        raise UserError("no init image given: expected a file, a PIL image, or an array uint8 [H, W, 3]")
    if isinstance(source, Image.Image):
        return source.convert("RGB"), "the init image"
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise UserError(f"the init image is {source.dtype} {list(source.shape)}, expected uint8 [H, W, 3]")
        return Image.fromarray(source), "the init image"
    if not isinstance(source, str | os.PathLike):
        raise UserError(f"the init image is a {type(source).__name__}, expected a file, a PIL image or an array")
    try:
        return open_image(source), os.fspath(source)
    except ImageError as error:
        raise UserError(f"init image {os.fspath(source)}: {error}") from error


def _sha256(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().cpu().numpy().tobytes()).hexdigest()
