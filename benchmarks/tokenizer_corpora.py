"""The pictures of benchmarks/tokenizer.py: the same for every contestant, and emoji designs that none has seen."""

import hashlib
import json
import re
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tessera.atomic_write import atomic_write
from tessera.data.config import DataConfig
from tessera.data.corpus import load_images
from tessera.data.emoji import EmojiCorpus

# N images, H W pixels.

CorpusName = Literal["scenes", "emoji"]

HELD_OUT_DESIGNS = 0.05
_MEASURED_HELD_OUT = 500
_MEASURED_SEEN = 4000
_PEOPLE = re.compile("[\U0001f468\U0001f469]")  # man, woman; the person without a gender replaces them
# Skin tones, the signs of gender and direction with their joiner, and the choice of a colored picture.
_VARIATION = re.compile("[\U0001f3fb-\U0001f3ff]|\u200d[\u2640\u2642\u27a1]\ufe0f?|\ufe0f")


class Pictures(NamedTuple):
    """One corpus, ready for both sides."""

    data: DataConfig
    """what ours trains on"""
    train: Path
    """the same training pictures in the same order, uint8 [N, H, W, 3], for the peer"""
    held_out: Path
    """uint8 [N, H, W, 3] of pictures that nobody trains on: scenes of the validation split, emoji of unseen designs"""
    seen: Path
    """uint8 [N, H, W, 3] of up to 4,000 training pictures"""


def prepare(
    name: CorpusName, directory: Path, *, limit: int | None = None, image_size: int = 64, font: str | None = None
) -> Pictures:
    """Writes the pictures of a corpus, or finds those written before.

    Args:
        name: scenes or emoji.
        directory: receives arrays and, for emoji, a folder of PNG files; one for every limit and size.
        limit: only so many training pictures.
        image_size: side in pixels.
        font: path of the color font for emoji; searched for if None.
    """
    directory.mkdir(parents=True, exist_ok=True)
    cache = str(directory / "cache")
    if name == "scenes":
        data = DataConfig(path="scenes", image_size=(image_size, image_size), limit=limit, cache_dir=cache)
        held_out = load_images(data.open("validation"))[:_MEASURED_HELD_OUT]
    else:
        corpus = EmojiCorpus((image_size, image_size), font=font)
        held_out = _write_emoji(corpus, directory / "files", limit=limit)
        data = DataConfig(path=str(directory / "files"), image_size=(image_size, image_size), cache_dir=cache)
    train = load_images(data.open("train"), directory=data.cache_path)
    assert isinstance(train, np.memmap) and train.filename is not None
    pictures = Pictures(data, Path(train.filename), directory / "held_out.npy", directory / "seen.npy")
    spread = np.linspace(0, len(train) - 1, min(len(train), _MEASURED_SEEN)).round().astype(int)
    for path, images in ((pictures.held_out, held_out), (pictures.seen, train[spread])):
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.save(file, images)
    return pictures


def design(sequence: str) -> str:
    """What is left of an emoji without skin tone, gender and direction: the drawing that its variants share."""
    return _PEOPLE.sub("\U0001f9d1", _VARIATION.sub("", sequence))


def is_held_out(sequence: str) -> bool:
    """Whether an emoji's design, and so all of its variants, is among those that nobody trains on."""
    digest = hashlib.blake2b(design(sequence).encode(), key=b"tokenizer benchmark designs", digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_DESIGNS * 2**64


def _write_emoji(corpus: EmojiCorpus, folder: Path, *, limit: int | None) -> NDArray[np.uint8]:
    """Writes a folder of captioned PNG files of the designs to train on; returns the pictures of all other designs."""
    held_out = [index for index, entry in enumerate(corpus.entries) if is_held_out(entry.sequence)]
    trained = [index for index, entry in enumerate(corpus.entries) if not is_held_out(entry.sequence)][:limit]
    rows = [{"file_name": f"{index:04}.png", "text": corpus.captions(index)[0]} for index in trained]
    listing, wanted = folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows)
    if not listing.exists() or listing.read_text() != wanted:
        folder.mkdir(parents=True, exist_ok=True)
        for index, row in zip(trained, rows, strict=True):
            Image.fromarray(corpus.image(index)).save(folder / row["file_name"])
        listing.write_text(wanted)
    return np.stack([corpus.image(index) for index in held_out])
