"""The scenes benchmark: an endless, reproducible supply of small captioned pictures, and prompts to judge models by.

Everything is a pure function of (seed, index). The world, drawing, captions, sampling and parser have files of their
own; what users need is exported here and in `scenes_parser`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tessera.data.scenes_captions import describe, paraphrases
from tessera.data.scenes_render import render
from tessera.data.scenes_sampling import (
    ATTRIBUTES,
    Pairs,
    Stream,
    another_spec,
    change_one_attribute,
    sample_generator,
    sample_scene,
    sample_scene_for,
    sample_spec,
)
from tessera.data.scenes_world import (
    BACKGROUNDS,
    CLEARANCE,
    COLORS,
    HELD_OUT_PAIRS,
    LATTICE,
    PALETTE,
    PROMPT_CLASSES,
    RADII,
    RELATIONS,
    SEEN_PAIRS,
    SHAPES,
    SIZES,
    ObjectSpec,
    PlacedObject,
    Prompt,
    Scene,
    SceneSpec,
    image_extent,
)
from tessera.errors import UserError

__all__ = [
    "ATTRIBUTES",
    "BACKGROUNDS",
    "COLORS",
    "HELD_OUT_PAIRS",
    "PALETTE",
    "PROMPT_CLASSES",
    "RELATIONS",
    "SEEN_PAIRS",
    "SHAPES",
    "SIZES",
    "ObjectSpec",
    "PlacedObject",
    "Prompt",
    "Scene",
    "SceneSpec",
    "ScenesCorpus",
    "change_one_attribute",
    "describe",
    "paraphrases",
    "render",
    "sample_prompts",
    "sample_scene",
    "sample_scene_for",
    "sample_spec",
    "scene_captions",
]

VERSION = 2
"""Raised whenever the same (seed, index) would give another picture or caption: results compare within a version."""

CAPTIONS_PER_SCENE = 5
"""Upper limit on the captions of one training picture."""


def scene_captions(
    seed: int, index: int, *, pairs: Pairs = "seen", stream: Stream = "train", image_size: tuple[int, int] = (64, 64)
) -> tuple[str, ...]:
    """Returns several different captions, all true, of the picture that `sample_scene` gives for the same arguments.

    The first comes from the spec that the scene was drawn for, the others say more or less about the same picture, if
    need be in the words of another prompt class: a scene of two objects can be told as two, position or binding.

    Args:
        seed: As in `sample_scene`.
        index: As in `sample_scene`.
        pairs: As in `sample_scene`.
        stream: As in `sample_scene`.
        image_size: As in `sample_scene`.

    Returns:
        2 to CAPTIONS_PER_SCENE lower-case captions (rarely a single one).
    """
    spec, scene = sample_scene(seed, index, pairs=pairs, stream=stream, image_size=image_size)
    generator = sample_generator(seed, index, stream=stream, purpose="captions")
    texts = [describe(spec, generator), describe(spec, generator)]
    while len(texts) < CAPTIONS_PER_SCENE:
        texts.append(describe(another_spec(generator, spec, scene), generator))
    return tuple(dict.fromkeys(texts))


def sample_prompts(count: int, *, seed: int = 0, pairs: Pairs = "seen") -> list[Prompt]:
    """Draws prompts for judging a model, as many of each class as of the others.

    They come from a stream of their own: no training or validation scene is drawn with the same numbers.

    Args:
        count: How many, 0 or more.
        seed: Another seed, other prompts.
        pairs: "unseen": each prompt names at least one (shape, color) pair that never occurs in training.

    Returns:
        Prompts whose classes follow PROMPT_CLASSES in rotation. A text is not repeated, unless the class has run out.
    """
    prompts: list[Prompt] = []
    texts: set[str] = set()
    # Seen and unseen prompts draw from different halves of the index range.
    base = 0 if pairs == "seen" else 1 << 62
    for number in range(count):
        for attempt in range(50):
            index = base + number * 50 + attempt
            prompt_class = PROMPT_CLASSES[number % len(PROMPT_CLASSES)]
            spec = sample_spec(seed, index, pairs=pairs, stream="prompts", prompt_class=prompt_class)
            text = describe(spec, sample_generator(seed, index, stream="prompts", purpose="captions"))
            if text not in texts:
                break
        texts.add(text)
        prompts.append(Prompt(text, spec))
    return prompts


class ScenesCorpus:
    """Scenes as a corpus: sample `index` is drawn when it is asked for, nothing is stored.

    Args:
        count: Number of pictures.
        image_size: (height, width) in pixels, each at least 16.
        seed: Another seed, other pictures.
        split: "train" or "validation": two streams of the same distribution; neither holds a held-out pair.

    Raises:
        UserError: A count below 1, an unknown split or an image size that is too small.
    """

    name = "scenes"

    def __init__(
        self,
        count: int,
        *,
        image_size: tuple[int, int] = (64, 64),
        seed: int = 0,
        split: Literal["train", "validation"] = "train",
    ) -> None:
        if count < 1:
            raise UserError(f"a scenes corpus needs at least 1 picture, got {count}")
        if split not in ("train", "validation"):
            raise UserError(f"unknown split {split!r}: train or validation")
        image_extent(image_size)
        self.image_size = image_size
        self.seed = seed
        self.split: Literal["train", "validation"] = split
        self._count = count

    def __len__(self) -> int:
        return self._count

    def captions(self, index: int) -> tuple[str, ...]:
        """Returns 2 to CAPTIONS_PER_SCENE true captions of picture `index`."""
        self._check(index)
        return scene_captions(self.seed, index, stream=self.split, image_size=self.image_size)

    def image(self, index: int) -> NDArray[np.uint8]:
        """Draws picture `index`: [height, width, 3], RGB."""
        self._check(index)
        return render(self.sample(index)[1], self.image_size)

    def sample(self, index: int) -> tuple[SceneSpec, Scene]:
        """Returns the spec and scene behind picture `index`."""
        self._check(index)
        return sample_scene(self.seed, index, stream=self.split, image_size=self.image_size)

    def fingerprint(self) -> str:
        """Returns a sha256 over all that determines the pictures and captions."""
        identity = {
            "name": self.name,
            "version": VERSION,
            "count": self._count,
            "image_size": list(self.image_size),
            "seed": self.seed,
            "split": self.split,
            "palette": {name: list(color) for name, color in PALETTE.items()},
            "radii": dict(RADII),
            "lattice": LATTICE,
            "clearance": CLEARANCE,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def _check(self, index: int) -> None:
        # IndexError rather than UserError: plain iteration over a sequence ends on it.
        if not 0 <= index < self._count:
            raise IndexError(f"picture {index} of a scenes corpus of {self._count}")
