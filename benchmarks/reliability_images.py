"""A folder of damaged and unusual image files: none stops the ingest, each is kept or rejected with a reason.

Then one byte of every file that was kept is changed, and `tessera ingest --check` has to name all of them. It is the
hash that catches it: most damaged JPEG files still decode to something.
"""

import io
import random
import struct
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.record import Row
from tessera.data.images import ImageError, open_image
from tessera.data.ingest import ingest
from tessera.data.ingest_command import compare
from tessera.data.manifest import Manifest

_SIZE = (48, 64)  # width and height in pixels
_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = 6  # stored lying on its side


class File(NamedTuple):
    """An image file that is to be written."""

    suffix: str
    content: bytes


def _picture(chance: random.Random, *, mode: str = "RGB") -> Image.Image:
    """A smooth picture that no other one equals."""
    width, height = _SIZE
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [np.sin(rows * chance.uniform(0.05, 0.3) + columns * chance.uniform(0.05, 0.3)) for _ in range(3)]
    pixels = (127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8)  # [H, W, 3]
    return Image.fromarray(pixels).convert(mode)


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, format=kind, **options)
    return content.getvalue()


def _sound(chance: random.Random) -> File:
    kind = chance.choice(("JPEG", "JPEG", "PNG", "WEBP"))
    return File({"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}[kind], _encoded(_picture(chance), kind))


def truncated(chance: random.Random) -> File:
    """Cut off anywhere; every fifth one has no byte left."""
    file = _sound(chance)
    return file._replace(content=file.content[: chance.randrange(len(file.content)) if chance.random() < 0.8 else 0])


def bits_flipped(chance: random.Random) -> File:
    """Eight bits anywhere."""
    file = _sound(chance)
    content = bytearray(file.content)
    for _ in range(8):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return file._replace(content=bytes(content))


def zero_runs(chance: random.Random) -> File:
    """64 bytes of zeros anywhere."""
    file = _sound(chance)
    start = chance.randrange(len(file.content) - 64)
    return file._replace(content=file.content[:start] + bytes(64) + file.content[start + 64 :])


def wrong_extension(chance: random.Random) -> File:
    """An image of another kind, or no image at all."""
    if chance.random() < 0.5:
        return File(".jpg", _encoded(_picture(chance), "PNG"))
    return File(chance.choice((".png", ".jpg", ".gif")), chance.randbytes(chance.randint(1, 5000)))


def cmyk(chance: random.Random) -> File:
    """Colors for printing."""
    return File(".jpg", _encoded(_picture(chance, mode="CMYK"), "JPEG"))


def sixteen_bit(chance: random.Random) -> File:
    """Gray values of two bytes."""
    gray = Image.fromarray(np.asarray(_picture(chance, mode="L")).astype(np.uint16) * 257)
    kind = chance.choice(("PNG", "TIFF"))
    return File({"PNG": ".png", "TIFF": ".tif"}[kind], _encoded(gray, kind))


def palette_with_alpha(chance: random.Random) -> File:
    """Few colors, of which some are transparent."""
    return File(".png", _encoded(_picture(chance).quantize(16), "PNG", transparency=bytes(range(0, 256, 16))))


def turned_by_exif(chance: random.Random) -> File:
    """A photograph whose camera was held upright."""
    exif = Image.Exif()
    exif[_ORIENTATION] = _TURNED
    return File(".jpg", _encoded(_picture(chance), "JPEG", exif=exif))


def animated(chance: random.Random) -> File:
    """Several pictures in one file."""
    kind = chance.choice(("GIF", "WEBP", "PNG"))
    frames = [_picture(chance) for _ in range(3)]
    content = _encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    return File(f".{kind.lower()}", content)


def huge_header(chance: random.Random) -> File:
    """A few bytes that announce gigabytes of pixels."""
    side = chance.randint(20_000, 65_500)
    if chance.random() < 0.5:
        header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        end = b"\0\0\0\0IEND\xaeB`\x82"
        return File(".png", b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header)) + end)
    content = bytearray(_encoded(_picture(chance), "JPEG"))
    place = content.index(b"\xff\xc0") + 5  # behind the marker, its length and the bits of a sample
    content[place : place + 4] = struct.pack(">HH", side, side)
    return File(".jpg", bytes(content))


KINDS: tuple[Callable[[random.Random], File], ...] = (
    truncated,
    bits_flipped,
    zero_runs,
    wrong_extension,
    cmyk,
    sixteen_bit,
    palette_with_alpha,
    turned_by_exif,
    animated,
    huge_header,
)


def measure(*, quick: bool) -> tuple[list[Row], dict[str, Any]]:
    """Ingests 1,000 files of 10 kinds, 200 if it has to be quick, and looks for those that are changed afterwards."""
    of_each = 20 if quick else 100
    with tempfile.TemporaryDirectory() as scratch:
        folder, chance = Path(scratch) / "images", random.Random(0)
        folder.mkdir()
        names = {}
        for kind in KINDS:
            for number in range(of_each):
                file = kind(chance)
                name = f"{kind.__name__}-{number:03d}{file.suffix}"
                (folder / name).write_bytes(file.content)
                (folder / name).with_suffix(".txt").write_text(f"{kind.__name__} {number}")
                names[name] = kind.__name__
        manifest = ingest(folder, directory=Path(scratch) / "manifest")
        fates = _fates(manifest)
        accounted = sum(len(fates[name]) == 1 and fates[name][0] != "" for name in names)
        upright = sum((record.width, record.height) == _SIZE[::-1] for record in _records(manifest, turned_by_exif))
        decoded = sum(_decodes(folder / record.location.file) for record in manifest.records)
        kept = [record.location.file for record in manifest.records]
        untouched = len(list(compare(manifest)))
        for name in kept:
            _change_one_byte(folder / name, chance)
        caught = {difference.name for difference in compare(manifest) if difference.problem == "changed"}
        undetected = sum(_decodes(folder / name) for name in kept)
    count, left = len(names), len(kept)
    rows = [
        Row("damaged image files kept, or rejected with a reason", accounted, f"of {count}", "", None, count),
        Row("kept images that decode when they are needed", decoded, f"of {left}", "", None, left),
        Row("photographs turned as their EXIF says", upright, f"of {of_each}", "", None, of_each),
        Row(
            "kept images with a byte changed later, found by hash", len(caught), f"of {len(kept)}", "", None, len(kept)
        ),
        Row("of which would have decoded all the same", undetected, f"of {left}", "", None, None),
    ]
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for name, kind in names.items():
        by_kind[kind].update(fate.partition(":")[0] for fate in fates[name])
    raw = {"summary": manifest.summary(), "by kind": by_kind, "found changed before any change": untouched}
    return rows, raw


def _fates(manifest: Manifest) -> dict[str, list[str]]:
    """What became of each file: "kept", or the reason why not; one that was seen twice has two fates."""
    fates: dict[str, list[str]] = defaultdict(list)
    for record in manifest.records:
        fates[record.location.file].append("kept")
    for refusal in (*manifest.rejects, *manifest.duplicates):
        fates[refusal.source].append(refusal.reason)
    return fates


def _records(manifest: Manifest, kind: Callable[..., File]) -> list[Any]:
    return [record for record in manifest.records if record.location.file.startswith(kind.__name__)]


def _decodes(path: Path) -> bool:
    try:
        open_image(path)
    except ImageError:
        return False
    return True


def _change_one_byte(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= chance.randint(1, 255)
    path.write_bytes(content)
