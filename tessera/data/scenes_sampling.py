"""Draws specs and scenes: every draw is a pure function of (seed, index).

A counter-based generator is keyed with the two, so that sample 7 is the same whatever was drawn before it, in any
process. Training, validation and prompts are separate streams of that generator.
Paper: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from tessera.data.scenes_world import (
    BACKGROUNDS,
    CLEARANCE,
    COLORS,
    HELD_OUT_PAIRS,
    LATTICE,
    MAX_COUNT,
    PROMPT_CLASSES,
    RADII,
    RELATION_DOMINANCE,
    RELATIONS,
    SEEN_PAIRS,
    SHAPES,
    SIZES,
    ObjectSpec,
    PlacedObject,
    Scene,
    SceneSpec,
    image_extent,
    relation_offsets,
)
from tessera.errors import UserError

Pairs = Literal["seen", "unseen"]
Stream = Literal["train", "validation", "prompts"]

ATTRIBUTES = ("shape", "color", "size", "count", "relation", "background")
"""What `change_one_attribute` can change."""

# Counting and position are the hardest to learn, so somewhat more pictures come from them. A picture of two objects
# also carries captions of the other two-object classes.
_CLASS_SHARES = {"single": 0.13, "two": 0.14, "counting": 0.23, "colors": 0.13, "position": 0.20, "binding": 0.17}
# Where in the generator's space of counters a draw lives.
_STREAMS = {"train": 0, "validation": 1, "prompts": 2, "scene_for": 3}
_PURPOSES = {"content": 0, "captions": 1}

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
    generator = sample_generator(seed, index, stream=stream, purpose="content")
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
    """Draws a scene that satisfies a spec; colors that it leaves open are drawn so that the pair is a seen one.

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
    generator = sample_generator(seed, index, stream="scene_for", purpose="content")
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


def change_one_attribute(spec: SceneSpec, attribute: str, generator: np.random.Generator) -> SceneSpec | None:
    """Makes a hard negative: a spec that differs from another in one attribute of one object, or of the whole.

    Args:
        spec: Where to start.
        attribute: One of ATTRIBUTES. Objects of one kind that are counted change together in shape, color and size.
        generator: Where the choices come from; it is advanced.

    Returns:
        The changed spec, or None where the spec does not name that attribute (or four objects cannot become more).

    Raises:
        UserError: An unknown attribute.
    """
    if attribute not in ATTRIBUTES:
        raise UserError(f"unknown attribute {attribute!r}: one of {', '.join(ATTRIBUTES)}")
    if attribute == "count":
        counts = [n for n in (len(spec.objects) - 1, len(spec.objects) + 1) if 1 <= n <= MAX_COUNT]
        count = _pick(generator, counts)
        objects = (*spec.objects, spec.objects[-1])[:count]
        return replace(spec, objects=objects, relation=None)
    if attribute == "relation":
        others = [word for word in RELATIONS if word != spec.relation]
        return None if spec.relation is None else replace(spec, relation=_pick(generator, others))
    if attribute == "background":
        others = [word for word in BACKGROUNDS if word != spec.background]
        return None if spec.background is None else replace(spec, background=_pick(generator, others))
    places = [i for i, described in enumerate(spec.objects) if getattr(described, attribute) is not None]
    if not places:
        return None
    place = _pick(generator, places)
    described = spec.objects[place]
    words = {"shape": SHAPES, "color": COLORS, "size": SIZES}[attribute]
    changed = replace(
        described, **{attribute: _pick(generator, [w for w in words if w != getattr(described, attribute)])}
    )
    if spec.prompt_class == "counting":
        return replace(spec, objects=(changed,) * len(spec.objects))
    return replace(spec, objects=(*spec.objects[:place], changed, *spec.objects[place + 1 :]))


def another_spec(generator: np.random.Generator, origin: SceneSpec, scene: Scene) -> SceneSpec:
    """Chooses another spec that holds for a scene: of any class that fits it, naming other things."""
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


def sample_generator(seed: int, index: int, *, stream: str, purpose: str) -> np.random.Generator:
    """Returns the random numbers of one sample.

    Args:
        seed: Any integer from 0 to 2**64 - 1.
        index: Any integer from 0 to 2**64 - 1.
        stream: One of Stream, or "scene_for".
        purpose: "content" or "captions".

    Raises:
        UserError: An unknown stream, or numbers out of range.
    """
    if stream not in _STREAMS:
        raise UserError(f"unknown stream {stream!r}: train, validation or prompts")
    if not 0 <= seed < 1 << 64 or not 0 <= index < 1 << 64:
        raise UserError(f"seed and index must be integers from 0 to 2**64 - 1, got {seed} and {index}")
    # Philox counts upward in the lowest of four words; the other three are free to address by.
    key = np.array([seed, _STREAMS[stream]], np.uint64)
    counter = np.array([0, 0, index, _PURPOSES[purpose]], np.uint64)
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


def _clear_relation(dx: float, dy: float) -> str | None:
    """The relation that an offset shows beyond doubt, if any."""
    for relation in RELATIONS:
        along, across = relation_offsets(relation, dx, dy)
        if along >= RELATION_DOMINANCE * across:
            return relation
    return None


def _on_lattice(u: NDArray[np.float64], inset: NDArray[np.float64], side: float) -> NDArray[np.float64]:
    """Numbers u in [0, 1) as coordinates on the lattice, each equally likely, no closer to the border than `inset`."""
    reach = np.floor((side / 2 - inset) * LATTICE)  # steps from the middle to either side
    return side / 2 + (np.floor(u * (2 * reach + 1)) - reach) / LATTICE


def _place(
    generator: np.random.Generator,
    content: Sequence[ObjectSpec],
    relation: str | None,
    extent: tuple[float, float],
) -> tuple[PlacedObject, ...]:
    """Draws places until nothing touches and the relation is clear."""
    count = len(content)
    radii = np.array([RADII[full.size or "small"] for full in content])  # [N]
    inset = radii + CLEARANCE
    # Layouts are drawn by the batch and the first that fits is taken. The second half of a batch puts every object into
    # a quarter of its own: three or four large ones would hardly ever fit by chance.
    tries = (1, 64, 128, 256)[min(count, 4) - 1]
    apart = ~np.eye(count, dtype=bool)
    for _ in range(100):
        u = generator.random((tries, count, 2))
        if 2 < count <= 4:
            u[tries // 2 :] = (u[tries // 2 :] + _QUARTERS[generator.permutation(4)[:count]]) / 2
        x = _on_lattice(u[..., 0], inset, extent[1])  # [tries, N]
        y = _on_lattice(u[..., 1], inset, extent[0])
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
                    full.shape,
                    full.color or "",
                    full.size or "",
                    float(x[chosen, i]),
                    float(y[chosen, i]),
                    float(radii[i]),
                )
                for i, full in enumerate(content)
            )
    raise UserError(f"found no room for {count} objects: ask for fewer or smaller ones")


def _is_clear(relation: str, dx: NDArray[np.float64], dy: NDArray[np.float64]) -> NDArray[np.bool_]:
    sign = -1 if relation in ("left of", "above") else 1
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    return sign * along >= RELATION_DOMINANCE * np.abs(across)
