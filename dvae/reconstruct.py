"""What the dVAE keeps of an image: `tessera reconstruct MODEL IMAGE ...`.

Writes for every image one sheet: original, reconstruction, absolute difference and the grid of codes in false colors.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dvae.losses import psnr, ssim
from dvae.model import DiscreteVAE, load
from dvae.pixels import to_float, to_uint8
from tessera.data.images import ImageError, fit_to, open_image, save_png
from tessera.data.order import mix
from tessera.data.shards import batches
from tessera.errors import UserError
from tessera.model_folder import ModelFolder, short_sha256
from tessera.one_line_parser import OneLineParser
from tessera.precision import Precision, autocast, resolve_device, resolve_precision

# N images, H W image pixels, h w code grid.

_GAP = 4  # pixels between the panels
_AT_ONCE = 64  # images per forward


def code_map(codes: NDArray[np.int64], height: int, width: int) -> NDArray[np.uint8]:
    """Codes int64 [h, w] as a picture uint8 [H, W, 3]: every code a color of its own, equal codes equal colors."""
    hashed = mix(codes, 0)
    colors = np.stack([(hashed >> np.uint64(shift)) & np.uint64(0xFF) for shift in (0, 8, 16)], axis=-1).astype(
        np.uint8
    )
    return np.asarray(Image.fromarray(colors).resize((width, height), Image.Resampling.NEAREST))


def sheet(
    original: NDArray[np.uint8], reconstruction: NDArray[np.uint8], codes: NDArray[np.int64], *, scale: int = 1
) -> NDArray[np.uint8]:
    """Four panels side by side, uint8 [scale * H, ..., 3]: original, reconstruction, difference, codes."""
    height, width = original.shape[:2]
    difference = np.abs(original.astype(np.int16) - reconstruction.astype(np.int16)).astype(np.uint8)
    panels = [original, reconstruction, difference, code_map(codes, height, width)]
    gap = np.full((height * scale, _GAP, 3), 255, np.uint8)
    row: list[NDArray[np.uint8]] = []
    for panel in panels:
        row += [panel.repeat(scale, axis=0).repeat(scale, axis=1), gap]
    return np.concatenate(row[:-1], axis=1)


class Reconstructed(NamedTuple):
    """What is left of N images after encoding and decoding."""

    images: NDArray[np.uint8]
    """[N, H, W, 3]"""
    codes: NDArray[np.int64]
    """[N, h, w]"""


def reconstruct(vae: DiscreteVAE, images: NDArray[np.uint8], *, precision: Precision) -> Reconstructed:
    """Encodes images uint8 [N, H, W, 3] and decodes them again."""
    codes = encode_images(vae, images, precision=precision)
    return Reconstructed(decode_grids(vae, codes, precision=precision), codes)


def encode_images(vae: DiscreteVAE, images: NDArray[np.uint8], *, precision: Precision) -> NDArray[np.int64]:
    """The codes int64 [N, h, w] of images uint8 [N, H, W, 3]."""
    device = next(vae.parameters()).device
    parts = []
    for span in batches(len(images), _AT_ONCE):
        with torch.inference_mode(), autocast(precision, device):
            # copied: torch warns of arrays that it may not write, such as mapped ones
            original = to_float(torch.from_numpy(images[span.start : span.stop].copy())).to(device)
            parts.append(vae.encode(original).cpu().numpy())
    return np.concatenate(parts)


def decode_grids(vae: DiscreteVAE, codes: NDArray[np.integer], *, precision: Precision) -> NDArray[np.uint8]:
    """The images uint8 [N, H, W, 3] of codes [N, h, w] of any integer type."""
    device = next(vae.parameters()).device
    parts = []
    for span in batches(len(codes), _AT_ONCE):
        with torch.inference_mode(), autocast(precision, device):
            pixels = vae.decode(torch.from_numpy(codes[span.start : span.stop].astype(np.int64)).to(device))
        parts.append(to_uint8(pixels).cpu().numpy())
    return np.concatenate(parts)


def nearest_size(image: Image.Image, *, downsampling: int, longest: int | None) -> tuple[int, int]:
    """(height, width) closest to the image's own that the dVAE can take, with sides of at most `longest` pixels."""
    scale = min(1.0, longest / max(image.size)) if longest else 1.0
    width, height = (max(downsampling, downsampling * round(side * scale / downsampling)) for side in image.size)
    return height, width


def sheet_names(images: Sequence[str]) -> list[str]:
    """File names for the sheets of image files: of equal stems in several folders, later ones are numbered from 2."""
    seen: Counter[str] = Counter()
    names = []
    for image in images:
        stem = Path(image).stem
        seen[stem.casefold()] += 1  # some file systems take X.png and x.png for one
        number = seen[stem.casefold()]
        # The number comes last, where no stem can bring one: x-2.png of its own keeps its name.
        names.append(f"{stem}-reconstruction.png" if number == 1 else f"{stem}-reconstruction-{number}.png")
    return names


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="tessera reconstruct",
        description="Shows what the dVAE keeps of images: original, reconstruction, difference and codes on one sheet.",
    )
    parser.add_argument("model", help="model folder")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the sheets (default: out)")
    parser.add_argument(
        "--longest",
        type=int,
        help="shrink images to at most this many pixels on the longer side (default: as the model was trained)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--json", action="store_true", help="one line of JSON per image on stdout")
    return parser


def main(argv: Sequence[str]) -> int:
    """The command."""
    arguments = _parser().parse_args(argv)
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out {arguments.out} is a file, expected a folder")
    folder = ModelFolder.open(arguments.model, parts=["dvae"])
    device = resolve_device(arguments.device)
    vae, precision = load(folder, device=device), resolve_precision("auto", device)
    longest = arguments.longest or max(folder.metadata("dvae").get("image_size", [256]))
    arguments.out.mkdir(parents=True, exist_ok=True)
    written = 0
    for name, sheet_name in zip(arguments.images, sheet_names(arguments.images), strict=True):
        try:
            image = open_image(name)
        except (ImageError, OSError) as error:
            print(f"tessera: {name}: {error}; passed over", file=sys.stderr)
            continue
        size = nearest_size(image, downsampling=vae.downsampling, longest=longest)
        original = fit_to(image, size)
        (reconstruction,), (codes,) = reconstruct(vae, original[None], precision=precision)
        first, second = (to_float(torch.from_numpy(pixels[None])) for pixels in (original, reconstruction))
        figures = {
            "psnr": round(float(psnr(second, first)), 2),
            "ssim": round(float(ssim(second, first)), 4),
            "distinct_codes": len(np.unique(codes)),
        }
        path = arguments.out / sheet_name
        made_with = {"model": short_sha256(folder.part_sha256("dvae")), "image": Path(name).name, **figures}
        save_png(
            path,
            sheet(original, reconstruction, codes, scale=max(1, 256 // max(size))),
            {"tessera": json.dumps(made_with)},
        )
        written += 1
        if arguments.json:
            print(json.dumps({"path": str(path), **made_with}))
        else:
            print(
                f"{path}: {size[0]}x{size[1]} px, {codes.size} codes "
                f"({figures['distinct_codes']} distinct), {figures['psnr']} dB"
            )
    if written == 0:
        raise UserError("none of the images could be read: expected PNG, JPEG, WebP, BMP, GIF or TIFF files")
    return 0


if __name__ == "__main__":
    from tessera.errors import run_command

    sys.exit(run_command(main, sys.argv[1:]))
