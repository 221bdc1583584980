"""The small world of the scenes benchmark: its vocabulary, palette, geometry, specs and scenes.

A *spec* is what a prompt says: objects whose color or size may be left open, perhaps a relation and a background. A
*scene* is one arrangement that can be drawn: every attribute settled, every object at a place. Lengths are fractions of
the shorter side of the image; x grows to the right and y grows downward, from the top-left corner.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from tessera.errors import UserError

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
SIZES = ("small", "large")
BACKGROUNDS = ("white", "black", "gray")
RELATIONS = ("left of", "right of", "above", "below")
PROMPT_CLASSES = ("single", "two", "counting", "colors", "position", "binding")
"""The six classes of prompts. Paper: GenEval, arXiv 2310.11513, section 3.1, on shapes instead of photographs."""

# Any two of these eleven that can meet in a picture are at least 0.21 apart in OKLab, and no color lies on the line
# between another color and a background, so that an anti-aliased edge is never mistaken for a third color.
PALETTE = MappingProxyType(
    {
        "red": (225, 10, 15),
        "green": (0, 178, 25),
        "blue": (0, 98, 255),
        "yellow": (248, 242, 0),
        "purple": (153, 0, 193),
        "orange": (255, 150, 5),
        "cyan": (15, 210, 252),
        "pink": (255, 110, 208),
        "white": (255, 255, 255),
        "black": (0, 0, 0),
        "gray": (128, 128, 128),
    }
)
"""Name -> sRGB of every color and background, 0..255."""

HELD_OUT_PAIRS = (
    ("triangle", "red"),
    ("star", "green"),
    ("cross", "blue"),
    ("ring", "yellow"),
    ("circle", "purple"),
    ("square", "orange"),
    ("triangle", "cyan"),
    ("star", "pink"),
)
"""(shape, color) pairs that no training or validation scene contains, in any object of any class: one per color."""

SEEN_PAIRS = tuple(
    (shape, color) for shape in SHAPES for color in COLORS if (shape, color) not in frozenset(HELD_OUT_PAIRS)
)
"""The other 40 of the 48 (shape, color) pairs."""

RADII = MappingProxyType({"small": 0.147, "large": 0.19})
"""Size -> radius of the circle around an object, in fractions of the shorter side."""

LATTICE = 64
"""Centers lie on a lattice of so many steps per shorter side, counted from the middle of the picture: on whole
pixels of a picture of 64, where a shape then looks the same wherever it stands."""

SIZE_THRESHOLD = 0.167
"""A radius below is small, from here on large: the middle between the two radii, as a ratio."""

CLEARANCE = 0.025
"""Least distance between the circles around two objects, and between such a circle and the border."""

MAX_COUNT = 4
"""The most objects that a sampled scene holds."""

RELATION_DOMINANCE = 1.6
"""In a sampled scene the offset along the relation's axis is at least this many times the offset across it."""


@dataclass(frozen=True, slots=True)
class ObjectSpec:
    """What a prompt says about one object; None where it says nothing.

    Args:
        shape: One of SHAPES.
        color: One of COLORS, or None for any.
        size: One of SIZES, or None for any.

    Raises:
        UserError: A word that the world does not know.
    """

    shape: str
    color: str | None = None
    size: str | None = None

    def __post_init__(self) -> None:
        _require("shape", self.shape, SHAPES)
        if self.color is not None:
            _require("color", self.color, COLORS)
        if self.size is not None:
            _require("size", self.size, SIZES)


@dataclass(frozen=True, slots=True)
class SceneSpec:
    """What a prompt says about a whole picture.

    Args:
        prompt_class: One of PROMPT_CLASSES.
        objects: Every object of the picture: an image with more or fewer does not satisfy the spec.
        relation: One of RELATIONS, read as "object 0 is <relation> object 1", or None.
        background: One of BACKGROUNDS, or None for any.

    Raises:
        UserError: An unknown word, no object, or a relation without exactly two objects.
    """

    prompt_class: str
    objects: tuple[ObjectSpec, ...]
    relation: str | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        _require("prompt class", self.prompt_class, PROMPT_CLASSES)
        if not self.objects:
            raise UserError("a scene spec needs at least one object, got none")
        if self.relation is not None:
            _require("relation", self.relation, RELATIONS)
            if len(self.objects) != 2:
                raise UserError(f"a relation joins exactly 2 objects, got {len(self.objects)}")
        if self.background is not None:
            _require("background", self.background, BACKGROUNDS)


@dataclass(frozen=True, slots=True)
class PlacedObject:
    """One object of a scene: its attributes, its center and the radius of the circle around it (shorter side = 1)."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture before it is drawn.

    Args:
        objects: The objects, which do not touch.
        background: One of BACKGROUNDS.
        extent: Height and width of the picture in units of its shorter side: (1, 1) for a square one.
    """

    objects: tuple[PlacedObject, ...]
    background: str
    extent: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's text together with the spec that a picture of it is judged by."""

    text: str
    spec: SceneSpec


def image_extent(image_size: tuple[int, int]) -> tuple[float, float]:
    """Returns (height, width) in units of the shorter side.

    Raises:
        UserError: A side is below 16 pixels, where shapes can no longer be told apart.
    """
    height, width = image_size
    if min(height, width) < 16:
        raise UserError(f"scenes need at least 16 pixels on each side, got {height}x{width}")
    side = min(height, width)
    return height / side, width / side


def relation_offsets(relation: str, dx: float, dy: float) -> tuple[float, float]:
    """Splits the offset from object 1 to object 0 into the part along a relation and the part across it.

    Args:
        relation: One of RELATIONS.
        dx: x of object 0 minus x of object 1.
        dy: y of object 0 minus y of object 1.

    Returns:
        (along, across): `along` is positive where object 0 is on the named side; `across` is never negative.
    """
    if relation == "left of":
        return -dx, abs(dy)
    if relation == "right of":
        return dx, abs(dy)
    if relation == "above":
        return -dy, abs(dx)
    return dy, abs(dx)


def _require(what: str, word: str, known: tuple[str, ...]) -> None:
    if word not in known:
        raise UserError(f"unknown {what} {word!r}: one of {', '.join(known)}")
