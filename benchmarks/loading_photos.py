"""The pictures of benchmarks/loading.py: JPEG files with the statistics of photographs, in a folder and in tars."""

import io
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

# H W image pixels.

WIDTH, HEIGHT = 512, 384
_QUALITY = 90
_NUM_TARS = 2
_SHAPES = 12
_GRAIN = 6.0  # standard deviation of the sensor's noise, in gray levels of 255


def write_photos(directory: Path, count: int) -> None:
    """Writes `folder/` with x.jpg and x.txt, and the same files as members of `tars/*.tar`.

    Args:
        directory: receives both; what is there already is kept.
        count: how many pictures.
    """
    done = directory / f"{count}-photos"
    if done.exists():
        return
    folder, tars = directory / "folder", directory / "tars"
    for path in (folder, tars):
        path.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        archives = [stack.enter_context(tarfile.open(tars / f"{number:05}.tar", "w")) for number in range(_NUM_TARS)]
        for index, content in enumerate(_photos(count)):
            name, caption = f"{index:06}", f"a photograph, number {index}"
            (folder / f"{name}.jpg").write_bytes(content)
            (folder / f"{name}.txt").write_text(caption)
            for suffix, part in (("jpg", content), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(part)
                archives[index * _NUM_TARS // count].addfile(member, io.BytesIO(part))
    done.touch()


def _photos(count: int) -> Iterator[bytes]:
    generator = np.random.default_rng(0)
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(photo(generator)).save(buffer, "JPEG", quality=_QUALITY)
        yield buffer.getvalue()


def photo(generator: np.random.Generator) -> NDArray[np.uint8]:
    """One picture uint8 [H, W, 3]: noise whose amplitude falls with frequency, as in photographs, edges, and grain."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for side in (2, 4, 8, 16, 32, 64, 128, 256):
        coarse = generator.normal(size=(3 * side // 4 + 1, side, 3)).astype(np.float32)
        gray = coarse.mean(axis=-1, keepdims=True)
        # the channels of photographs go together
        for channel, values in enumerate(np.moveaxis(0.8 * 3**0.5 * gray + 0.35 * coarse, -1, 0)):
            enlarged = Image.fromarray(values).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            pixels[..., channel] += 50 / side**0.6 * np.asarray(enlarged)
    picture = Image.fromarray(np.clip(118 + pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(_SHAPES):
        corners = generator.integers((-60, -60), (WIDTH, HEIGHT))
        sides = generator.integers(10, 140, size=2)
        color = tuple(int(value) for value in generator.integers(20, 236, size=3))
        kind = draw.ellipse if generator.random() < 0.5 else draw.rectangle
        kind((*corners.tolist(), *(corners + sides).tolist()), outline=color, width=int(generator.integers(1, 12)))
    grain = generator.normal(scale=_GRAIN, size=pixels.shape)
    return np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
