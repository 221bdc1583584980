"""What the dVAE keeps of an image: `tessera reconstruct MODEL IMAGE ...`.

Writes for every image one sheet: original, reconstruction, absolute difference and the grid of codes in false colors;
or one sheet of all images, a row for each.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dvae.model import DiscreteVAE, DiscreteVAEConfig, load
from dvae.pixels import to_float, to_uint8
from dvae.sheets import most_rows, sheet, sheet_of_rows
from dvae.similarity import psnr, ssim
from tessera.data.images import IMAGE_SUFFIXES, ImageError, fit_to, open_image, save_png
from tessera.data.shards import batches
from tessera.errors import UserError
from tessera.model_folder import ModelFolder, short_sha256
from tessera.one_line_parser import OneLineParser
from tessera.precision import Precision, autocast, resolve_device, resolve_precision

# N images, H W image pixels, h w code grid.

_MOST_AT_ONCE = 128  # images per forward
# Numbers in one activation of the finest resolution, of which a few exist at a time: 256 MiB in fp32.
_ACTIVATION_NUMBERS = 2**26
_PANEL_PIXELS, _ROW_PANEL_PIXELS = 256, 192  # smaller images are enlarged towards it, alone and together


class Reconstructed(NamedTuple):
    """What is left of N images after encoding and decoding."""

    images: NDArray[np.uint8]
    """[N, H, W, 3]"""
    codes: NDArray[np.int64]
    """[N, h, w]"""


def images_per_forward(config: DiscreteVAEConfig, height: int, width: int) -> int:
    """How many images of height x width pixels a model takes at once, so that memory is bounded whatever their size."""
    finest = height * width * config.widths[0] // config.patch_size**2
    return min(_MOST_AT_ONCE, max(1, _ACTIVATION_NUMBERS // finest))


def reconstruct(vae: DiscreteVAE, images: NDArray[np.uint8], *, precision: Precision) -> Reconstructed:
    """Encodes images uint8 [N, H, W, 3] and decodes them again."""
    codes = encode_images(vae, images, precision=precision)
    return Reconstructed(decode_grids(vae, codes, precision=precision), codes)


def encode_images(vae: DiscreteVAE, images: NDArray[np.uint8], *, precision: Precision) -> NDArray[np.int64]:
    """The codes int64 [N, h, w] of images uint8 [N, H, W, 3]."""
    device = next(vae.parameters()).device
    parts = []
    for span in batches(len(images), images_per_forward(vae.config, *images.shape[1:3])):
        with torch.inference_mode(), autocast(precision, device):
            # copied: torch warns of arrays that it may not write, such as mapped ones
            original = to_float(torch.from_numpy(images[span.start : span.stop].copy())).to(device)
            parts.append(vae.encode(original).cpu().numpy())
    return np.concatenate(parts)


def decode_grids(vae: DiscreteVAE, codes: NDArray[np.integer], *, precision: Precision) -> NDArray[np.uint8]:
    """The images uint8 [N, H, W, 3] of codes [N, h, w] of any integer type."""
    device = next(vae.parameters()).device
    parts = []
    f = vae.downsampling
    for span in batches(len(codes), images_per_forward(vae.config, f * codes.shape[1], f * codes.shape[2])):
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


def image_files(paths: Sequence[str]) -> list[str]:
    """Files as they are, and in the place of each folder the image files in it, sorted by name.

    Hidden files and folders inside of the folder are passed over.

    Raises:
        UserError: a folder has no image file.
    """
    files: list[str] = []
    for path in paths:
        if not Path(path).is_dir():
            files.append(path)
            continue
        inside = sorted(
            str(file)
            for file in Path(path).iterdir()
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
        )
        if not inside:
            raise UserError(f"no images in {path}: expected {', '.join(suffix[1:] for suffix in IMAGE_SUFFIXES)} files")
        files += inside
    return files


class _Row(NamedTuple):
    place: int  # among the files
    name: str
    original: NDArray[np.uint8]
    reconstruction: NDArray[np.uint8]
    codes: NDArray[np.int64]
    figures: dict[str, Any]


def _rows(vae: DiscreteVAE, names: Sequence[str], *, precision: Precision, longest: int) -> Iterator[_Row]:
    """The images that can be read, one after the other; the others are named on stderr."""
    for place, name in enumerate(names):
        try:
            image = open_image(name)
        except (ImageError, OSError) as error:
            print(f"tessera: {name}: {error}; passed over", file=sys.stderr)
            continue
        original = fit_to(image, nearest_size(image, downsampling=vae.downsampling, longest=longest))
        (reconstruction,), (codes,) = reconstruct(vae, original[None], precision=precision)
        first, second = (to_float(torch.from_numpy(pixels[None])) for pixels in (original, reconstruction))
        figures = {
            "psnr": round(float(psnr(second, first)), 2),
            "ssim": round(float(ssim(second, first)), 4),
            "distinct_codes": len(np.unique(codes)),
        }
        yield _Row(place, Path(name).name, original, reconstruction, codes, figures)


def _write_each(rows: Iterator[_Row], names: Sequence[str], out: Path, *, model: str, as_json: bool) -> int:
    """A sheet per row in the folder `out`; returns their number."""
    file_names, written = sheet_names(names), 0
    for row in rows:
        path = out / file_names[row.place]
        height, width = row.original.shape[:2]
        made_with = {"model": model, "image": row.name, **row.figures}
        pixels = sheet(row.original, row.reconstruction, row.codes, scale=max(1, _PANEL_PIXELS // max(height, width)))
        save_png(path, pixels, {"tessera": json.dumps(made_with)})
        written += 1
        if as_json:
            print(json.dumps({"path": str(path), **made_with}))
        else:
            print(
                f"{path}: {height}x{width} px, {row.codes.size} codes "
                f"({row.figures['distinct_codes']} distinct), {row.figures['psnr']} dB"
            )
    return written


def _write_together(rows: Sequence[_Row], path: Path, *, model: str, scale: int, as_json: bool) -> None:
    """One sheet with all rows."""
    decibels = [row.figures["psnr"] for row in rows]
    count = "1 image" if len(rows) == 1 else f"{len(rows)} images, on average"
    summary = f"{count} {sum(decibels) / len(rows):.2f} dB"
    pixels = sheet_of_rows(
        [row.original for row in rows],
        [row.reconstruction for row in rows],
        [row.codes for row in rows],
        scale=scale,
        decibels=decibels,
        names=[row.name for row in rows],
        title=summary,
    )
    images = [{"image": row.name, **row.figures} for row in rows]
    save_png(path, pixels, {"tessera": json.dumps({"model": model, "images": images})})
    if as_json:
        for image in images:
            print(json.dumps({"path": str(path), "model": model, **image}))
    else:
        print(f"{path}: {summary}")


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="tessera reconstruct",
        description="Shows what the dVAE keeps of images: original, reconstruction, difference and codes on one sheet.",
    )
    parser.add_argument("model", help="model folder")
    parser.add_argument("images", nargs="+", help="image files, and folders for all the image files in them")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the sheets (default: out)")
    parser.add_argument(
        "--together",
        type=Path,
        metavar="FILE",
        help="write one PNG with a row per image, in place of a sheet each; its differences are 4 times as bright",
    )
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
    out, together = arguments.out, arguments.together
    if together is None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, expected a folder")
    if together is not None and (together.is_dir() or together.parent.is_file() or together.suffix.lower() != ".png"):
        raise UserError(f"--together must name a .png file in a folder; got {together}")
    if arguments.longest is not None and arguments.longest < 1:
        raise UserError(f"--longest must be at least 1 pixel; got {arguments.longest}")
    folder = ModelFolder.open(arguments.model, parts=["dvae"])
    names = image_files(arguments.images)
    device = resolve_device(arguments.device)
    vae, precision = load(folder, device=device), resolve_precision("auto", device)
    longest = arguments.longest or max(folder.metadata("dvae").get("image_size", [256]))
    model = short_sha256(folder.part_sha256("dvae"))
    rows = _rows(vae, names, precision=precision, longest=longest)
    if together is None:
        out.mkdir(parents=True, exist_ok=True)
        written = _write_each(rows, names, out, model=model, as_json=arguments.json)
    else:
        scale = max(1, _ROW_PANEL_PIXELS // longest)
        most = most_rows(scale * (longest + vae.downsampling))  # the nearest size may be the next larger one
        if len(names) > most:
            print(f"tessera: {together} shows the first {most} of {len(names)} images: no more fit", file=sys.stderr)
        shown = list(islice(rows, most))
        written = len(shown)
        if shown:
            _write_together(shown, together, model=model, scale=scale, as_json=arguments.json)
    if written == 0:
        raise UserError("none of the images could be read: expected PNG, JPEG, WebP, BMP, GIF or TIFF files")
    return 0


if __name__ == "__main__":
    from tessera.errors import run_command

    sys.exit(run_command(main, sys.argv[1:]))
