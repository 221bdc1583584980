"""Image editing as sampling with known codes: which codes are given, and how known pixels join the drawn ones.

The prior draws codes, so an edit is exact in cells of f x f pixels, the squares that one code stands for. Known codes
are forced, the others are drawn in raster order: a drawn code depends on all codes before it, known or drawn, and the
known ones after it have no say. Completion, inpainting and variations differ only in which codes are known.
Ramesh et al. 2021 (section 3.3, figure 2d) and Esser et al. 2021 (figure 4) complete images so.

Three ways to make pixels of the result, by what they keep of an image whose drawn cells are D:

    none      codes outside D. Every pixel comes from the dVAE, so the whole image is as sharp as the dVAE makes it.
    blend     pixels further from D than the feather, bit for bit. See `blend`.
    reencode  codes of cells without paint, if the dVAE's encoder reads no further than a cell; no pixels. See
              `harmonize`.
"""

import io
import os
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dvae.model import DiscreteVAE, DiscreteVAEConfig
from sampling.random_stream import uniforms
from sampling.step import Forced
from tessera.data.images import ImageError, open_image, read_file
from tessera.errors import UserError

# B batch, H W image pixels, h w code grid, I = h w image tokens, f pixels per cell side.

Seam = Literal["none", "blend", "reencode"]

VARIATION_STREAM = 1  # of an image's random streams; its codes are drawn from stream 0

_WHITE = 128  # gray values from here on are painted; the same bound tells transparent from opaque
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Known(NamedTuple):
    """The codes of one image that are given instead of drawn."""

    codes: Tensor
    """int64 [h, w]; read only where the mask is true."""
    mask: Tensor
    """bool [h, w]: true where the code is given."""


class Harmonized(NamedTuple):
    """A composite after one more pass through the dVAE."""

    codes: Tensor
    """int64 [B, h, w]."""
    pixels: Tensor
    """float32 [B, 3, H, W] in [0, 1]."""


def known_rows(codes: Tensor, rows: int) -> Known:
    """Complete an image from its first rows.

    Args:
        codes: int64 [h, w].
        rows: how many rows of codes are known, from 1 to h - 1.

    Returns:
        The known codes.

    Raises:
        UserError: `codes` is no grid, or `rows` leaves nothing known or nothing to draw.
    """
    _check_grid(codes)
    height = codes.shape[0]
    if not 1 <= rows <= height - 1:
        raise UserError(f"{rows} known rows of a grid of {height}, expected 1 to {height - 1}")
    return Known(codes, (torch.arange(height, device=codes.device) < rows)[:, None].expand(codes.shape))


def known_outside(codes: Tensor, to_draw: Tensor) -> Known:
    """Redraw a part of an image.

    Args:
        codes: int64 [h, w].
        to_draw: bool [h, w], see `cells_to_draw`.

    Returns:
        The known codes: all others.

    Raises:
        UserError: the shapes differ, or are no grid.
    """
    _check_grid(codes)
    if to_draw.shape != codes.shape or to_draw.dtype != torch.bool:
        raise UserError(
            f"cells to draw are {to_draw.dtype} {tuple(to_draw.shape)}, expected torch.bool {tuple(codes.shape)}"
        )
    return Known(codes, ~to_draw.to(codes.device))


def known_share(codes: Tensor, *, keep: float, seed: int, image_index: int) -> Known:
    """Vary an image: keep a random share of its codes.

    The cells are kept in an order that is the image's own random permutation. A larger share therefore keeps the same
    cells and some more, and what is kept does not depend on what else is drawn.

    Args:
        codes: int64 [h, w].
        keep: share of the codes to keep, in (0, 1); round(keep h w) codes are kept.
        seed: of the image, >= 0.
        image_index: which candidate of its prompt and seed the image is, >= 0.

    Returns:
        The known codes.

    Raises:
        UserError: `codes` is no grid, or an argument is out of range.
    """
    _check_grid(codes)
    if not 0 < keep < 1:
        raise UserError(
            f"keep is {keep:g}, expected a share between 0 (leave the init image out) and 1 (nothing would change)"
        )
    numbers = uniforms(
        torch.tensor([seed]), torch.tensor([image_index]), num_positions=codes.numel(), stream=VARIATION_STREAM
    )[0]  # [I]
    mask = torch.zeros(codes.numel(), dtype=torch.bool)
    mask[numbers.argsort(stable=True)[: round(keep * codes.numel())]] = True
    return Known(codes, mask.reshape(codes.shape).to(codes.device))


def forced_codes(known: Sequence[Known]) -> Forced:
    """The known codes of B images as the decode loop takes them, [B, I]."""
    return Forced(
        codes=torch.stack([image.codes for image in known]).flatten(1),
        mask=torch.stack([image.mask for image in known]).flatten(1),
    )


def cells_to_draw(painted: Tensor, *, cell: int, grow: int = 0) -> Tensor:
    """The cells to draw anew: those with at least one painted pixel, and their neighbors if asked for.

    Args:
        painted: bool [H, W].
        cell: f, pixels per cell side.
        grow: widen the drawn area by so many cells in all eight directions, >= 0. The default, 0, is right for an
            encoder that reads the f x f pixels of a code and nothing else, as the default dVAE's does: no code outside
            knows anything of what was painted over. For others see `grow_for`.

    Returns:
        bool [h, w].

    Raises:
        UserError: nothing is painted, nothing would be kept, or the sides are not multiples of the cell.
    """
    _check_painted(painted)
    height, width = painted.shape
    if not height or not width or height % cell or width % cell:
        raise UserError(f"the mask has {height}x{width} pixels, expected multiples of {cell}, the side of a cell")
    if grow < 0:
        raise UserError(f"grow is {grow} cells, expected at least 0")
    if not bool(painted.any()):
        raise UserError("the mask paints nothing: make white or transparent what is to be drawn anew")
    touched = F.max_pool2d(painted[None].float(), cell)  # [1, h, w]
    grow = min(grow, max(touched.shape))  # more reaches no further
    to_draw = F.max_pool2d(touched, 2 * grow + 1, stride=1, padding=grow)[0] > 0  # [h, w]
    if bool(to_draw.all()):
        raise UserError(
            f"the mask touches every cell of {cell}x{cell} pixels, so nothing is kept: leave the init image out"
        )
    return to_draw


def grow_for(config: DiscreteVAEConfig) -> int:
    """How many cells to widen the drawn area by, so that the codes around it do not give away what was painted over.

    Returns:
        0 if a code reads its own f x f pixels only. Otherwise 1: the field that such an encoder can see is many cells
        wide, but its weight falls off quickly, and redrawing all of it would leave little of the image.
    """
    return 0 if config.network == "patches" and config.encoder_kernel_size == 1 else 1


def pixels_of(cells: Tensor, *, cell: int) -> Tensor:
    """The pixels bool [H, W] that cells bool [h, w] of `cell` x `cell` pixels cover."""
    return cells.repeat_interleave(cell, dim=0).repeat_interleave(cell, dim=1)


def read_mask(source: str | os.PathLike[str] | Image.Image | np.ndarray | Tensor, size: tuple[int, int]) -> Tensor:
    """What a mask says is to be drawn anew.

    White is drawn anew, black is kept, gray counts as the nearer of the two. If the mask has an alpha channel that is
    not opaque everywhere, its colors do not count: transparent is drawn anew, opaque is kept, as with an eraser.

    Args:
        source: an image file (alpha channels are read from PNG files, in other formats transparent counts as white), a
            PIL image, or an array or tensor: bool [H, W], or uint8 [H, W], [H, W, 3] or [H, W, 4].
        size: (height, width) in pixels of the image that the mask belongs to.

    Returns:
        bool [H, W] on the CPU, true where the image is to be drawn anew.

    Raises:
        UserError: the file cannot be used, the array is of another kind, or the mask has another size than the image.
    """
    if isinstance(source, Image.Image):
        painted = _painted(source)
    elif isinstance(source, Tensor | np.ndarray):
        painted = _painted_in_array(source.cpu().numpy() if isinstance(source, Tensor) else source)
    else:
        try:
            painted = _painted(_open_with_alpha(read_file(source)))
        except ImageError as error:
            raise UserError(f"mask {os.fspath(source)}: {error}") from error
    if tuple(painted.shape) != tuple(size):
        raise UserError(
            f"the mask has {painted.shape[0]}x{painted.shape[1]} pixels (height x width), the image {size[0]}x{size[1]}"
            ": expected the same size"
        )
    return painted


def fit_mask(painted: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop and resize a mask as `tessera.data.images.fit_to` does its image, and lose no stroke, however thin.

    Args:
        painted: bool [H, W].
        size: (height, width) in pixels that the image was fit to.

    Returns:
        bool [height, width]; a pixel is painted if it covers anything of a painted one.
    """
    _check_painted(painted)
    height, width = size
    scale = min(painted.shape[0] / height, painted.shape[1] / width)
    rows = _overlaps(painted.shape[0], height, scale)  # [height, H]
    columns = _overlaps(painted.shape[1], width, scale)  # [width, W]
    return rows @ painted.float() @ columns.T > 0


def blend(original: Tensor, generated: Tensor, painted: Tensor, *, feather_pixels: int) -> Tensor:
    """Keep the original's pixels, take the generated ones where painted, and fade from one to the other around that.

    The fade lies outside of the paint. Inside, it would bring back a shadow of what was painted over; outside, the two
    pictures show the same thing, provided that `painted` covers whole drawn cells (`pixels_of`): there the generated
    picture is the dVAE's reconstruction of the original, so that only its error is faded out.

    Args:
        original: uint8 [..., 3, H, W].
        generated: uint8 [..., 3, H, W]; the two broadcast.
        painted: bool [H, W].
        feather_pixels: width of the fade, >= 0; 0 is a hard edge. A fair start is the side of a cell, the length over
            which the dVAE's errors change.

    Returns:
        uint8 [..., 3, H, W]: where painted exactly the generated pixels; exactly the original's where the nearest
        painted pixel is more than `feather_pixels` rows or columns away.

    Raises:
        UserError: types or shapes are others, or the feather is negative.
    """
    _check_painted(painted)
    for name, image in (("original", original), ("generated", generated)):
        if image.dtype != torch.uint8 or tuple(image.shape[-3:]) != (3, *painted.shape):
            raise UserError(
                f"the {name} image is {image.dtype} {tuple(image.shape)}, "
                f"expected torch.uint8 [..., 3, {painted.shape[0]}, {painted.shape[1]}] as the mask"
            )
    if feather_pixels < 0:
        raise UserError(f"feather_pixels is {feather_pixels}, expected at least 0")
    # The mean of the paint and of the paint widened by 1, 2, ... pixels falls in equal steps with the distance.
    reach = painted[None].float()  # [1, H, W]
    total = reach
    for _ in range(feather_pixels):
        reach = F.max_pool2d(reach, 3, stride=1, padding=1)
        total = total + reach
    weight = total / (feather_pixels + 1)
    mixed = torch.lerp(original.float(), generated.float(), weight)
    return mixed.round().to(torch.uint8)


@torch.no_grad()
def harmonize(vae: DiscreteVAE, generated: Tensor, original: Tensor, painted: Tensor) -> Harmonized:
    """Lay the known pixels over the generated image and let the dVAE code and decode the composite once more.

    Where the paint ends inside a cell, the prior drew a code that knew nothing of the cell's unpainted pixels. Coding
    the composite gives the cell a code for what is really in it, and the decoder, which looks around, joins the two.
    `painted` is therefore the paint itself, pixel by pixel, not the drawn cells.

    Args:
        vae: in evaluation mode.
        generated: float [B, 3, H, W] in [0, 1], what the drawn codes decode to.
        original: float [3, H, W] or [B, 3, H, W] in [0, 1].
        painted: bool [H, W].

    Returns:
        The composite's codes, and the pixels that they decode to. With an encoder that reads no further than a cell,
        cells without paint have exactly the codes of the original; cells that are all paint are coded a second time
        and may lose a little detail. No pixel is kept exactly.

    Raises:
        UserError: the mask is of another type or size.
        ValueError: see `DiscreteVAE.encode`.
    """
    _check_painted(painted)
    for name, image in (("original", original), ("generated", generated)):
        if tuple(image.shape[-3:]) != (3, *painted.shape):
            raise UserError(
                f"the {name} image has shape {tuple(image.shape)}, "
                f"expected [..., 3, {painted.shape[0]}, {painted.shape[1]}] as the mask"
            )
    codes = vae.encode(torch.where(painted.to(generated.device), generated, original.to(generated)))  # [B, h, w]
    return Harmonized(codes, vae.decode(codes))


def _overlaps(length: int, num_parts: int, scale: float) -> Tensor:
    """Which pixels of a line of `length` each of `num_parts` parts of its middle overlaps, float32 [num_parts, length].

    Args:
        scale: length of a part in pixels.
    """
    starts = (length - num_parts * scale) / 2 + torch.arange(num_parts, dtype=torch.float64)[:, None] * scale
    pixels = torch.arange(length, dtype=torch.float64)
    tolerance = 1e-6  # parts that meet at the edge of a pixel must not reach over it by rounding
    return ((pixels + 1 > starts + tolerance) & (pixels < starts + scale - tolerance)).float()


def _check_grid(codes: Tensor) -> None:
    if codes.ndim != 2 or codes.is_floating_point():
        raise UserError(f"codes are {codes.dtype} {tuple(codes.shape)}, expected integers [h, w]")


def _check_painted(painted: Tensor) -> None:
    if painted.ndim != 2 or painted.dtype != torch.bool:
        raise UserError(f"the mask is {painted.dtype} {tuple(painted.shape)}, expected torch.bool [H, W]")


def _painted(image: Image.Image) -> Tensor:
    """What an upright picture of 8 bits per channel paints, bool [H, W]."""
    if image.mode.startswith("I") or image.mode == "F":
        raise UserError(f"the mask has pixels of mode {image.mode}, expected 8 bits per channel")
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        if int(alpha.min()) < 255:
            return torch.from_numpy(alpha < _WHITE)
    return torch.from_numpy(np.asarray(image.convert("L")) >= _WHITE)


def _painted_in_array(array: np.ndarray) -> Tensor:
    if array.ndim == 2 and array.dtype == np.bool_:
        return torch.from_numpy(array.copy())
    if array.dtype == np.uint8 and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        return _painted(Image.fromarray(np.ascontiguousarray(array)))
    raise UserError(
        f"the mask is an array of {array.dtype} {list(array.shape)}, "
        "expected bool [H, W], or uint8 [H, W], [H, W, 3] or [H, W, 4]"
    )


def _open_with_alpha(content: bytes) -> Image.Image:
    """`open_image`, with the alpha channel put back if the file is a PNG that has one."""
    image = open_image(content)  # first: what it accepts can be decoded again without harm
    if not content.startswith(_PNG_SIGNATURE):
        return image
    stored = Image.open(io.BytesIO(content), formats=("PNG",))
    if stored.mode.startswith("I") or not stored.has_transparency_data:
        return image
    # As a picture of its own the channel is turned upright by the same rules as the colors.
    alpha = io.BytesIO()
    stored.load()
    stored.convert("RGBA").getchannel("A").save(alpha, "PNG", compress_level=1, exif=stored.info.get("exif", b""))
    image.putalpha(open_image(alpha.getvalue()).getchannel("R"))
    return image
