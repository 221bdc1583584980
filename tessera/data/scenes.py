"""The scenes benchmark: an endless, reproducible supply of small captioned pictures, and prompts to judge models by.

Everything is a pure function of (seed, index): a counter-based generator is keyed with them, so that sample 7 is the
same whatever was drawn before it, in any process. Training, validation and prompts are separate streams of that
generator. The vocabulary, drawing, captions and parser have files of their own; what users need is exported here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from tessera.data.scenes_captions import describe, paraphrases
from tessera.data.scenes_render import render
from tessera.data.scenes_world import (
    BACKGROUNDS,
    CLEARANCE,
    COLORS,
    HELD_OUT_PAIRS,
    MAX_COUNT,
    PALETTE,
    PROMPT_CLASSES,
    RADIUS_RANGES,
    RELATION_DOMINANCE,
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
    relation_offsets,
)
from tessera.errors import UserError

__all__ = [
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
    "paraphrases",
    "render",
    "sample_prompts",
    "sample_scene",
    "sample_scene_for",
    "sample_spec",
    "scene_captions",
]

Pairs = Literal["seen", "unseen"]
Stream = Literal["train", "validation", "prompts"]

VERSION = 1
"""Raised whenever the same (seed, index) would give another picture or caption: results compare within a version."""

CAPTIONS_PER_SCENE = 5
"""Upper limit on the captions of one training picture."""

# Counting and position are the hardest to learn, so somewhat more pictures come from them. A picture of two objects
# also carries captions of the other two-object classes.
_CLASS_SHARES = {"single": 0.13, "two": 0.14, "counting": 0.23, "colors": 0.13, "position": 0.20, "binding": 0.17}
_STREAMS = {"train": 0, "validation": 1, "prompts": 2, "scene_for": 3}
_CONTENT, _CAPTIONS = 0, 1

_T = TypeVar("_T")


def sample_spec(
    seed: int, index: int, *, pairs: Pairs = "seen", stream: Stream = "train", prompt_class: str | None = None
) -> SceneSpec:
    """Draws the spec of sample (seed, index): the first half of `sample_scene`."""
    return sample_scene(seed, index, pairs=pairs, stream=stream, prompt_class=prompt_class)[0]


def sample_scene(
    seed: int,
    index: int,
    *,
    pairs: Pairs = "seen",
    stream: Stream = "train",
    prompt_class: str | None = None,
    image_size: tuple[int, int] = (64, 64),
) -> tuple[SceneSpec, Scene]:
    """Draws a spec and a scene that satisfies it.

    Args:
        seed: Any integer from 0 to 2**64 - 1.
        index: Number of the sample, 0 or more.
        pairs: "seen": no object is of a held-out (shape, color) pair. "unseen": at least one is, and its color is
            named; the others are of seen pairs.
        stream: Which of the independent streams to draw from.
        prompt_class: One of PROMPT_CLASSES, or None to draw it.
        image_size: (height, width) in pixels; only its aspect matters here.

    Returns:
        What a prompt says, and the whole truth about one picture of it.

    Raises:
        UserError: An unknown word, a negative seed or index, or an image below 16 pixels.
    """
    extent = image_extent(image_size)
    generator = _generator(seed, index, stream=stream, purpose=_CONTENT)
    if prompt_class is None:
        prompt_class = _draw_class(generator)
    elif prompt_class not in PROMPT_CLASSES:
        raise UserError(f"unknown prompt class {prompt_class!r}: one of {', '.join(PROMPT_CLASSES)}")
    content = _draw_content(generator, prompt_class, pairs)
    background = _pick(generator, BACKGROUNDS)
    relation = _pick(generator, RELATIONS) if prompt_class == "position" else None
    spec = _say(generator, prompt_class, content, background, relation)
    return spec, Scene(_place(generator, content, relation, extent), background, extent)


def sample_scene_for(spec: SceneSpec, seed: int, index: int, *, image_size: tuple[int, int] = (64, 64)) -> Scene:
    """Draws a scene that satisfies a spec; what the spec leaves open is drawn from the seen pairs where that is possible.

    Args:
        spec: What the scene must show.
        seed: Any integer from 0 to 2**64 - 1.
        index: Another index, another scene.
        image_size: (height, width) in pixels; only its aspect matters here.

    Returns:
        The scene; objects in the order of the spec's.

    Raises:
        UserError: So many or so large objects that they find no room.
    """
    generator = _generator(seed, index, stream="scene_for", purpose=_CONTENT)
    counted = spec.prompt_class == "counting" and all(other == spec.objects[0] for other in spec.objects)
    content: list[ObjectSpec] = []
    for described in spec.objects:
        if counted and content:
            content.append(content[0])
            continue
        color = described.color
        if color is None:
            color = _pick(generator, [name for shape, name in SEEN_PAIRS if shape == described.shape])
        content.append(ObjectSpec(described.shape, color, described.size or _pick(generator, SIZES)))
    background = spec.background or _pick(generator, BACKGROUNDS)
    extent = image_extent(image_size)
    return Scene(_place(generator, content, spec.relation, extent), background, extent)


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
    generator = _generator(seed, index, stream=stream, purpose=_CAPTIONS)
    texts = [describe(spec, generator), describe(spec, generator)]
    while len(texts) < CAPTIONS_PER_SCENE:
        texts.append(describe(_view(generator, spec, scene), generator))
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
            text = describe(spec, _generator(seed, index, stream="prompts", purpose=_CAPTIONS))
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
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def _check(self, index: int) -> None:
        # IndexError rather than UserError: plain iteration over a sequence ends on it.
        if not 0 <= index < self._count:
            raise IndexError(f"picture {index} of a scenes corpus of {self._count}")


def _generator(seed: int, index: int, *, stream: str, purpose: int) -> np.random.Generator:
    """The random stream of one sample. Philox counts in the lowest of four words; the others are free to address by."""
    if stream not in _STREAMS:
        raise UserError(f"unknown stream {stream!r}: train, validation or prompts")
    if not 0 <= seed < 1 << 64 or not 0 <= index < 1 << 64:
        raise UserError(f"seed and index must be integers from 0 to 2**64 - 1, got {seed} and {index}")
    key = np.array([seed, _STREAMS[stream]], np.uint64)
    counter = np.array([0, 0, index, purpose], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _pick(generator: np.random.Generator, choices: Sequence[_T]) -> _T:
    return choices[int(generator.random() * len(choices))]


def _draw_class(generator: np.random.Generator) -> str:
    rest = generator.random()
    for prompt_class, share in _CLASS_SHARES.items():
        if rest < share:
            return prompt_class
        rest -= share
    return PROMPT_CLASSES[-1]


def _draw_content(generator: np.random.Generator, prompt_class: str, pairs: Pairs) -> list[ObjectSpec]:
    """Draws objects with all attributes settled."""
    if pairs not in ("seen", "unseen"):
        raise UserError(f"unknown pairs {pairs!r}: seen or unseen")
    shape, color = _pick(generator, SEEN_PAIRS if pairs == "seen" else HELD_OUT_PAIRS)
    first = ObjectSpec(shape, color, _pick(generator, SIZES))
    if prompt_class in ("single", "colors"):
        return [first]
    if prompt_class == "counting":
        return [first] * (2 + int(generator.random() * (MAX_COUNT - 1)))
    # The second object differs in shape, so that a prompt that names shapes alone still tells the two apart, and in
    # color, so that binding is put to the test.
    others = [(other, paint) for other, paint in SEEN_PAIRS if other != shape and paint != color]
    content = [first, ObjectSpec(*_pick(generator, others), _pick(generator, SIZES))]
    if generator.random() < 0.5:
        content.reverse()
    return content


def _say(
    generator: np.random.Generator,
    prompt_class: str,
    content: Sequence[ObjectSpec],
    background: str,
    relation: str | None,
) -> SceneSpec:
    """Chooses what a prompt of a class says about settled objects: the spec keeps that and leaves the rest open."""
    chance = generator.random(4)
    colored, sized = [False] * len(content), [False] * len(content)
    with_background = False
    if prompt_class == "single":
        colored, sized = [bool(chance[0] < 0.4)], [bool(chance[1] < 0.4)]
        with_background = chance[2] < 0.1
    elif prompt_class == "colors":
        colored, sized = [True], [bool(chance[1] < 0.15)]
        with_background = chance[2] < 0.35
    elif prompt_class == "counting":
        colored = [bool(chance[0] < 0.6)] * len(content)
        sized = [bool(chance[1] < 0.2)] * len(content)
        with_background = chance[2] < 0.08
    elif prompt_class == "two":
        colored = [bool(chance[0] < 0.2), bool(0.2 <= chance[0] < 0.4)]
        sized = [bool(chance[1] < 0.06), bool(0.06 <= chance[1] < 0.12)]
        with_background = chance[2] < 0.08
    elif prompt_class == "position":
        colored = [bool(chance[0] < 0.65), bool(chance[0] < 0.6 or chance[0] > 0.95)]
        sized = [bool(chance[1] < 0.05), bool(0.05 <= chance[1] < 0.10)]
    else:
        by_size = chance[0] < 0.1 and content[0].size != content[1].size
        colored = [not by_size] * 2
        sized = [bool(by_size or chance[1] < 0.3)] * 2
        with_background = chance[2] < 0.1 and not sized[0]  # both at once would make a long sentence
    objects = tuple(
        ObjectSpec(
            full.shape,
            # An unseen prompt must say what is unseen about it.
            full.color if colored[i] or (full.shape, full.color) in HELD_OUT_PAIRS else None,
            full.size if sized[i] else None,
        )
        for i, full in enumerate(content)
    )
    return SceneSpec(prompt_class, objects, relation, background if with_background else None)


def _view(generator: np.random.Generator, origin: SceneSpec, scene: Scene) -> SceneSpec:
    """Chooses another spec that holds for a scene, of any class that fits it."""
    content = [ObjectSpec(placed.shape, placed.color, placed.size) for placed in scene.objects]
    if origin.prompt_class == "counting":
        return _say(generator, "counting", content, scene.background, None)
    if len(content) == 1:
        return _say(generator, _pick(generator, ("single", "colors")), content, scene.background, None)
    order = (0, 1) if generator.random() < 0.5 else (1, 0)
    first, second = (scene.objects[i] for i in order)
    relation = _clear_relation(first.x - second.x, first.y - second.y)
    prompt_class = _pick(generator, ("two", "binding") if relation is None else ("two", "binding", "position"))
    return _say(
        generator,
        prompt_class,
        [content[i] for i in order],
        scene.background,
        relation if prompt_class == "position" else None,
    )


_QUARTERS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])


def _clear_relation(dx: float, dy: float) -> str | None:
    """The relation that an offset shows beyond doubt, if any."""
    for relation in RELATIONS:
        along, across = relation_offsets(relation, dx, dy)
        if along >= RELATION_DOMINANCE * across:
            return relation
    return None


def _place(
    generator: np.random.Generator,
    content: Sequence[ObjectSpec],
    relation: str | None,
    extent: tuple[float, float],
) -> tuple[PlacedObject, ...]:
    """Draws radii and places until nothing touches and the relation is clear."""
    count = len(content)
    ranges = np.array([RADIUS_RANGES[full.size or "small"] for full in content])  # [N, 2]
    # Layouts are drawn by the batch and the first that fits is taken. The second half of a batch puts every object into
    # a quarter of its own: three or four large ones would hardly ever fit by chance.
    tries = (1, 64, 128, 256)[min(count, 4) - 1]
    apart = ~np.eye(count, dtype=bool)
    for _ in range(100):
        radii = ranges[:, 0] + generator.random(count) * (ranges[:, 1] - ranges[:, 0])  # [N]
        inset = radii + CLEARANCE
        u = generator.random((tries, count, 2))
        if 2 < count <= 4:
            u[tries // 2 :] = (u[tries // 2 :] + _QUARTERS[generator.permutation(4)[:count]]) / 2
        x = inset + u[..., 0] * (extent[1] - 2 * inset)  # [tries, N]
        y = inset + u[..., 1] * (extent[0] - 2 * inset)
        fits = np.ones(tries, bool)
        if count > 1:
            dx, dy = x[:, :, None] - x[:, None, :], y[:, :, None] - y[:, None, :]  # [tries, N, N]
            least = radii[:, None] + radii[None, :] + CLEARANCE
            fits = ((dx * dx + dy * dy >= least * least) | ~apart).all(axis=(1, 2))
            if relation is not None:
                fits &= _is_clear(relation, dx[:, 0, 1], dy[:, 0, 1])
        if fits.any():
            chosen = int(fits.argmax())
            return tuple(
                PlacedObject(
                    full.shape, full.color or "", full.size or "", float(x[chosen, i]), float(y[chosen, i]), float(radii[i])
                )
                for i, full in enumerate(content)
            )
    raise UserError(f"found no room for {count} objects: ask for fewer or smaller ones")


def _is_clear(relation: str, dx: NDArray[np.float64], dy: NDArray[np.float64]) -> NDArray[np.bool_]:
    sign = -1 if relation in ("left of", "above") else 1
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    return sign * along >= RELATION_DOMINANCE * np.abs(across)
