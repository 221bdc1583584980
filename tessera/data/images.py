"""Image files of any kind in, 8-bit RGB arrays out, and PNG files that carry text.

Files come from strangers: an allow-list of formats, a limit on pixels that is checked before anything is decoded, and
one error class whose message is short enough to stand in a list of rejects.
"""

import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile, PngInfo

from tessera.atomic_write import atomic_write

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
IMAGE_SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
UNSUPPORTED_SUFFIXES = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".ico", ".tga", ".exr", ".dng")
MIN_SIDE_PIXELS = 8
MAX_PIXELS = 50_000_000
MAX_FILE_BYTES = 512 * 2**20

_ORIENTATION_TAG = 0x0112
# EXIF orientation -> what turns the stored picture upright; 1 needs nothing.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_quiet_lock = threading.Lock()


class ImageError(ValueError):
    """An image that cannot be used; the message is the reason, without the name of the file.

    Text before the first colon is the kind of reason, so that reasons can be counted.
    """


def open_image(
    source: str | os.PathLike[str] | bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    enough_for: tuple[int, int] | None = None,
) -> Image.Image:
    """Decodes an image file into an upright, opaque 8-bit RGB picture.

    16-bit pixels are scaled to 8 bits, transparent ones are laid over white, EXIF rotation is applied, and of an
    animation the first frame is taken.

    Args:
        source: path of the file, or its bytes.
        max_pixels: limit on width x height; a larger picture is refused before it is decoded.
        enough_for: (height, width) that the picture will be shrunk to. A JPEG may then be decoded at a half, a quarter
            or an eighth of its size, never below twice this one, which is several times faster for photographs.

    Returns:
        A PIL image of mode RGB, at least 8 pixels on each side.

    Raises:
        ImageError: with a short reason.
    """
    content = source if isinstance(source, bytes) else read_file(source)
    if not content:
        raise ImageError("empty file")
    try:
        with _warnings_silenced():
            image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
        _check_size(image, max_pixels)
        if enough_for is not None:
            enough = 2 * max(enough_for)  # the larger side for both: the picture may still turn by 90 degrees
            image.draft(None, (enough, enough))
        # A TIFF is read tag by tag while it is decoded, and its tags are what Pillow warns about most.
        with _warnings_silenced() if image.format == "TIFF" else nullcontext():
            image.load()
        # After load(): PNG may carry EXIF behind the pixels, and Pillow turns TIFF upright itself.
        orientation = _orientation(image)
        image = _to_rgb(image)
        return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\((\d+) pixels\)", str(error))
        size = f"{int(pixels[1]) / 1e6:.0f} megapixels" if pixels else "a decompression bomb"
        raise ImageError(f"too large: {size}, at most {max_pixels / 1e6:g}") from error
    except UnidentifiedImageError as error:
        raise ImageError("not an image: expected " + ", ".join(FORMATS[:-1]) + " or " + FORMATS[-1]) from error
    except MemoryError as error:
        raise ImageError("not enough memory to decode it") from error
    except Exception as error:  # decoders meet damaged bytes with nearly every exception there is
        message = " ".join(str(error).split())[:100]
        if "truncated" in message.lower():
            raise ImageError("truncated") from error
        raise ImageError(f"damaged: {message or type(error).__name__}") from error


def read_file(path: str | os.PathLike[str], *, first_bytes: int | None = None) -> bytes:
    """Reads a regular file of at most 512 MiB, or the first bytes of a longer one.

    Raises:
        ImageError: it is missing, unreadable, too large, or a pipe or device on which reading could wait for ever.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("not a regular file")
        if first_bytes is None and status.st_size > MAX_FILE_BYTES:
            raise ImageError(f"file too large: {status.st_size / 2**20:.0f} MiB, at most {MAX_FILE_BYTES // 2**20}")
        # Never more than the size: so much memory would be taken first, which threads do one after the other.
        with open(path, "rb", buffering=0) as file:
            return _read_all(file, status.st_size if first_bytes is None else min(first_bytes, status.st_size))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _read_all(file: io.FileIO, size: int) -> bytes:
    """Up to `size` bytes: one call for nearly every file, as one returns at most 2 GiB or what a network gave."""
    content = file.read(size)
    while len(content) < size and (more := file.read(size - len(content))):
        content += more
    return content


def fit_to(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Crops the middle of an RGB image to the wanted aspect and resizes it with anti-aliasing.

    Args:
        image: RGB picture of any size.
        size: (height, width) in pixels.

    Returns:
        uint8 array [height, width, 3], C-contiguous and writable.
    """
    height, width = size
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
    box = (left, top, min(left + width * scale, image.width), min(top + height * scale, image.height))
    fitted = image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    return np.array(fitted, dtype=np.uint8)  # [H, W, 3]


def save_png(path: str | os.PathLike[str], pixels: np.ndarray, text: Mapping[str, str]) -> None:
    """Writes a PNG with text chunks; the file appears whole or not at all.

    Args:
        path: the file; its folder is made if it is missing.
        pixels: uint8 [H, W, 3].
        text: keyword (1 to 79 Latin-1 characters) -> any text, stored as iTXt (UTF-8). What PNG cannot hold is left
            out: NUL and lone surrogates.

    Raises:
        ValueError: for pixels of another type or shape, or a keyword that PNG does not allow.
        OSError: the file cannot be written; nothing of it is left.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"expected uint8 pixels [H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
    chunks = PngInfo()
    for keyword, value in text.items():
        if not 1 <= len(keyword) <= 79 or not keyword.isprintable():
            raise ValueError(f"a PNG keyword has 1 to 79 printable characters, got {keyword!r}")
        chunks.add_itxt(keyword, value.replace("\0", "").encode("utf-8", "ignore").decode("utf-8"))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as temporary:
        Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, format="PNG", pnginfo=chunks)


def read_png_text(path: str | os.PathLike[str]) -> dict[str, str]:
    """Reads the text chunks of a PNG file, as `save_png` writes them.

    Raises:
        ImageError: the file is missing, damaged, or no PNG.
    """
    content = read_file(path)
    try:
        with _warnings_silenced():
            image = Image.open(io.BytesIO(content), formats=("PNG",))
        if not isinstance(image, PngImageFile):
            raise ImageError("not a PNG")
        _check_size(image, MAX_PIXELS, min_side=1)
        return {str(keyword): str(value) for keyword, value in image.text.items()}
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not a PNG") from error
    except Exception as error:
        raise ImageError(f"damaged: {' '.join(str(error).split())[:100]}") from error


@contextmanager
def _warnings_silenced() -> Iterator[None]:
    """Pillow warns about pixels, EXIF and TIFF tags; limits of our own decide here.

    Python's warning filters belong to the whole process: the lock keeps two threads from restoring them in the wrong
    order. Little more than headers is read inside, so that threads still decode side by side.
    """
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_size(image: Image.Image, max_pixels: int, *, min_side: int = MIN_SIDE_PIXELS) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"too large: {width * height / 1e6:.0f} megapixels, at most {max_pixels / 1e6:g}")
    if min(width, height) < min_side:
        raise ImageError(f"too small: {width}x{height}, at least {min_side}x{min_side}")


def _orientation(image: Image.Image) -> int:
    if image.format == "JPEG" and not {"exif", "xmp"} & image.info.keys():  # most of them in prepared corpora
        return 1
    try:
        with _warnings_silenced():
            return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF beside sound pixels: take the picture as it lies
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bit(np.asarray(image)))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    if image.format == "JPEG" and image.mode == "RGB":
        return image  # loaded, it holds no reference to the file's bytes; images of other formats may
    return image.convert("RGB")


def _to_8_bit(gray: np.ndarray) -> np.ndarray:
    """Scales gray values [H, W] of more than 8 bits by their type's range; PIL's own conversion would clip them."""
    if gray.dtype.kind == "f":
        if not np.isfinite(gray).all():
            raise ImageError("damaged: pixels that are not numbers")
        lowest, highest = float(gray.min()), float(gray.max())
    else:
        lowest, highest = int(gray.min()), int(gray.max())
    if lowest < 0:
        raise ImageError("unsupported pixels: negative values")
    # Types wider than 16 bits say nothing about what white is: take the narrowest range that holds the values.
    whites = (65535,) if gray.dtype.itemsize == 2 else (1, 255, 65535, 2**32 - 1)
    if gray.dtype.kind != "f":
        whites = tuple(white for white in whites if white > 1)
    for white in whites:
        if highest <= white:
            return np.round(gray.astype(np.float64) * (255 / white)).astype(np.uint8)
    raise ImageError(f"unsupported pixels: values up to {highest:g}")
