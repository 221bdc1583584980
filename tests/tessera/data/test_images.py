import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from tessera.data.images import FORMATS, ImageError, fit_to, open_image, read_png_text, save_png

ORIENTATION = 0x0112


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int = 40, width: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def quarters() -> Image.Image:
    """Red, green / blue, white: every rotation and reflection of it is another picture."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :24, 0] = 255
    pixels[:16, 24:, 1] = 255
    pixels[16:, :24, 2] = 255
    pixels[16:, 24:] = 255
    return Image.fromarray(pixels)


def png_with_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and has no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 1000) + b"IDAT"


def pixels_of(content: bytes) -> np.ndarray:
    image = open_image(content)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_allowed_format_opens(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = pixels_of(encoded(quarters(), kind, **options))
    assert np.abs(pixels.astype(int) - np.asarray(quarters())).mean() < (10 if kind == "JPEG" else 0.01)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "RGB"])
def test_every_png_mode_becomes_rgb_with_its_colors(mode: str) -> None:
    gray = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 16, axis=0).repeat(8, axis=1))
    pixels = pixels_of(encoded(gray.convert(mode), "PNG"))
    assert (pixels[:, :8] == 0).all() and (pixels[:, 8:] == 255).all()


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF"), ("LAB", "TIFF")])
def test_other_color_spaces_become_rgb(mode: str, kind: str) -> None:
    if mode == "LAB":  # lightness and two color axes, stored as bytes
        image = Image.merge("LAB", [Image.new("L", (16, 16), level) for level in (136, 208, 195)])
    else:
        image = Image.new("RGB", (16, 16), (255, 0, 0)).convert(mode)
    red, green, blue = pixels_of(encoded(image, kind)).reshape(-1, 3).mean(axis=0)
    assert red > 225 and green < 60 and blue < 60


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_pixels_are_scaled_and_not_clipped(kind: str) -> None:
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16)
    pixels = pixels_of(encoded(Image.fromarray(np.tile(ramp, (16, 1))), kind))
    assert (pixels[0, :, 0] == np.round(ramp / 257)).all()


def test_32_bit_tiff_is_scaled_by_the_range_that_holds_it() -> None:
    for white, dtype in ((1.0, np.float32), (255, np.int32), (65535, np.int32), (65535.0, np.float32)):
        ramp = np.tile(np.linspace(0, white, 16), (16, 1)).astype(dtype)
        pixels = pixels_of(encoded(Image.fromarray(ramp), "TIFF"))
        assert pixels.min() == 0 and pixels.max() == 255
        assert np.abs(pixels[0, :, 0].astype(float) - np.linspace(0, 255, 16)).max() <= 1


@pytest.mark.parametrize("value", [float("nan"), -1.0, 1e12])
def test_float_pixels_without_a_meaning_are_refused(value: float) -> None:
    with pytest.raises(ImageError, match="damaged: pixels that are not numbers|unsupported pixels"):
        open_image(encoded(Image.fromarray(np.full((16, 16), value, np.float32)), "TIFF"))


def test_alpha_is_laid_over_white() -> None:
    image = Image.new("RGBA", (16, 16), (200, 0, 0, 0))
    image.paste((200, 0, 0, 255), (0, 0, 8, 16))
    image.paste((200, 0, 0, 128), (8, 8, 16, 16))
    pixels = pixels_of(encoded(image, "PNG"))
    assert tuple(pixels[0, 0]) == (200, 0, 0)
    assert tuple(pixels[0, 15]) == (255, 255, 255)
    assert np.abs(pixels[15, 15].astype(int) - (227, 127, 127)).max() <= 1


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])])
def test_transparent_palette_entries_become_white(transparency: int | bytes) -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([255, 0, 0, 0, 0, 255, 0, 255, 0])
    image.paste(1, (8, 0, 16, 16))
    pixels = pixels_of(encoded(image, "PNG", transparency=transparency))
    assert tuple(pixels[0, 0]) == (255, 0, 0) and tuple(pixels[0, 15]) == (255, 255, 255)


def test_a_transparent_color_of_an_rgb_png_becomes_white() -> None:
    pixels = pixels_of(encoded(quarters(), "PNG", transparency=(255, 0, 0)))
    assert tuple(pixels[0, 0]) == (255, 255, 255) and tuple(pixels[0, 47]) == (0, 255, 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_once(kind: str, orientation: int) -> None:
    undo: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    upright = np.asarray(quarters())
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = pixels_of(encoded(stored, kind, exif=exif, **options))
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).mean() < 10  # JPEG blurs colors; a wrong turn would be above 80


def test_damaged_exif_does_not_cost_the_picture() -> None:
    content = encoded(quarters(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7fgarbage")
    assert pixels_of(content).shape == (32, 48, 3)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(content))))) == 3
    assert (pixels_of(content) == (255, 0, 0)).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_is_refused(kind: str) -> None:
    content = encoded(noise(), kind)
    for share in (0.5, 0.9):
        with pytest.raises(ImageError, match=r"^(truncated|damaged)"):
            open_image(content[: int(len(content) * share)])


@pytest.mark.parametrize("side", [7_072, 10_000, 20_000, 65_535, 2**31 - 1])
def test_too_many_pixels_are_refused_before_they_are_decoded(side: int) -> None:
    # The file has no pixels: whoever tried to decode them would call it truncated.
    with pytest.raises(ImageError, match=r"^too large: \d+ megapixels, at most 50$"):
        open_image(png_with_header(side, side))


def test_a_real_picture_of_20_000_by_20_000_pixels_is_refused() -> None:
    rows = zlib.compressobj(1)
    line = bytes(1 + 20_000 // 8)
    data = b"".join(rows.compress(line) for _ in range(20_000)) + rows.flush()

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match="too large: 400 megapixels, at most 50"):
        open_image(content)


def test_the_limit_on_pixels_can_be_chosen() -> None:
    content = encoded(noise(40, 48), "PNG")
    assert open_image(content, max_pixels=40 * 48).size == (48, 40)
    with pytest.raises(ImageError, match="too large"):
        open_image(content, max_pixels=40 * 48 - 1)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 100), (100, 7)])
def test_tiny_pictures_are_refused_with_their_size(width: int, height: int) -> None:
    with pytest.raises(ImageError, match=f"^too small: {width}x{height}, at least 8x8$"):
        open_image(encoded(Image.new("RGB", (width, height)), "PNG"))


@pytest.mark.parametrize("kind", ["EPS", "PDF", "PPM", "TGA", "ICO", "JPEG2000"])
def test_formats_that_are_not_on_the_list_are_refused(kind: str) -> None:
    with pytest.raises(ImageError, match="^not an image: expected PNG, JPEG, WEBP, BMP, GIF or TIFF$"):
        open_image(encoded(noise(), kind))


def test_what_cannot_be_read_is_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in {
        "missing.png": "cannot be read: No such file or directory",
        "empty.png": "empty file",
        "folder.png": "not a regular file",
        "pipe.png": "not a regular file",
        "nul\0.png": "cannot be read: .*null",
    }.items():
        with pytest.raises(ImageError, match=f"^{reason}"):
            open_image(tmp_path / name)


def test_damaged_files_are_opened_or_refused_and_nothing_else() -> None:
    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    originals = [
        encoded(noise(), kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {})) for kind in FORMATS
    ]
    originals += [
        encoded(noise().convert("RGBA"), "TIFF", compression="tiff_lzw"),
        encoded(noise().convert("P"), "PNG"),
    ]
    refused = 0
    for number in range(160):
        content = bytearray(originals[number % len(originals)])
        match number // len(originals) % 4:
            case 0:  # single bits, as from a failing disk
                for place in generator.integers(0, len(content), 8):
                    content[place] ^= 1 << int(generator.integers(8))
            case 1:  # a sector of zeros
                start = int(generator.integers(len(content)))
                content[start : start + 64] = bytes(len(content[start : start + 64]))
            case 2:  # headers, where the sizes are
                for place in generator.integers(0, 64, 4):
                    content[place] = int(generator.integers(256))
            case 3:
                del content[int(generator.integers(len(content))) :]
        try:
            image = open_image(bytes(content))
        except ImageError as error:
            refused += 1
            assert 0 < len(str(error)) <= 120 and "\n" not in str(error)
        else:
            assert image.mode == "RGB" and min(image.size) >= 8
    assert 60 < refused < 160


def test_reading_in_threads_leaves_the_warning_filters_alone() -> None:
    before = list(warnings.filters)
    contents = [png_with_header(10_000, 10_000), encoded(quarters(), "PNG")] * 20
    caught: list[Exception] = []

    def read() -> None:
        for content in contents:
            try:
                open_image(content)
            except ImageError:
                pass
            except Exception as error:
                caught.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not caught
    assert warnings.filters == before


def test_a_jpeg_is_decoded_small_when_a_small_picture_is_wanted() -> None:
    x, y = np.meshgrid(np.linspace(0, 255, 800), np.linspace(0, 255, 600))
    content = encoded(Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8)), "JPEG", quality=95)
    small = open_image(content, enough_for=(64, 64))
    assert 128 <= min(small.size) < 300
    whole = fit_to(open_image(content), (64, 64))
    assert np.abs(fit_to(small, (64, 64)).astype(int) - whole).max() <= 4


def test_fit_to_crops_the_middle_and_keeps_the_aspect() -> None:
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, 64:128] = 255
    fitted = fit_to(Image.fromarray(pixels), (32, 32))
    assert fitted.shape == (32, 32, 3) and fitted.flags.c_contiguous and fitted.flags.writeable
    assert fitted[:, 2:-2].min() > 250


def test_fit_to_leaves_a_picture_of_the_right_size_as_it_is() -> None:
    assert (fit_to(noise(40, 48), (40, 48)) == np.asarray(noise(40, 48))).all()


@pytest.mark.parametrize("source", [(8, 5000), (5000, 8), (8, 8), (1000, 1001)])
@pytest.mark.parametrize("size", [(64, 64), (32, 96), (1, 1)])
def test_fit_to_takes_any_shape(source: tuple[int, int], size: tuple[int, int]) -> None:
    fitted = fit_to(Image.new("RGB", source[::-1], (10, 200, 30)), size)
    assert fitted.shape == (*size, 3) and (fitted == (10, 200, 30)).all()


def test_fit_to_averages_when_it_shrinks() -> None:
    checkers = np.indices((256, 256)).sum(axis=0) % 2 * np.uint8(255)
    fitted = fit_to(Image.fromarray(checkers.astype(np.uint8)).convert("RGB"), (16, 16))
    assert np.abs(fitted.astype(int) - 127).max() <= 3


def test_png_text_survives_as_it_was(tmp_path: Path) -> None:
    text = {
        "prompt": "eine grüne Katze 🐈 \n zweite Zeile",
        "seed": "7",
        "settings": '{"temperature": 0.5}',
        "empty": "",
    }
    pixels = np.asarray(noise())
    save_png(tmp_path / "new" / "a.png", pixels, text)
    assert read_png_text(tmp_path / "new" / "a.png") == text
    assert (np.asarray(open_image(tmp_path / "new" / "a.png")) == pixels).all()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.png"]


def test_png_text_leaves_out_what_png_cannot_hold(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8), {"prompt": "a\0b\ud800c"})
    assert read_png_text(tmp_path / "a.png") == {"prompt": "abc"}


def test_saving_the_same_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_png(tmp_path / name, np.asarray(noise()), {"prompt": "cat", "seed": "7"})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_refused_png_leaves_the_old_one(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", np.asarray(noise()), {})
    old = (tmp_path / "a.png").read_bytes()
    with pytest.raises(ValueError, match=r"expected uint8 pixels \[H, W, 3\], got float64 \[8, 8\]"):
        save_png(tmp_path / "a.png", np.zeros((8, 8)), {})
    with pytest.raises(ValueError, match="PNG keyword"):
        save_png(tmp_path / "a.png", np.asarray(noise()), {"k" * 80: "too long"})
    assert (tmp_path / "a.png").read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_reading_text_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(noise(), "JPEG"))
    (tmp_path / "b.png").write_bytes(encoded(noise(), "PNG")[:300])
    with pytest.raises(ImageError, match="^not a PNG$"):
        read_png_text(tmp_path / "a.png")
    with pytest.raises(ImageError, match="^damaged"):
        read_png_text(tmp_path / "b.png")
