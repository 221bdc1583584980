"""Reads a picture of the scenes benchmark back into objects, and judges whether it shows what a prompt says.

Plain image processing, nothing learned. Pixels that are more than half covered by something are grouped into connected
components; each component is then explained by synthesis: every shape is drawn at the place and with the area that the
component has, the color that fits best follows by least squares, and the share of the component's energy which that
drawing explains decides about the shape. A component that no shape explains well is an object of unknown shape, which
no prompt asks for: blobs, merged objects and two-colored objects count against a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tessera.data.scenes_render import coverage
from tessera.data.scenes_world import (
    BACKGROUNDS,
    COLORS,
    PALETTE,
    SHAPES,
    SIZE_THRESHOLD,
    ObjectSpec,
    SceneSpec,
    image_extent,
    relation_offsets,
)
from tessera.errors import UserError

UNKNOWN = "unknown"
"""The shape or color of an object that is none of the world's."""

# Pictures are read at this many pixels on the shorter side at most: templates need no more, and reading stays fast.
_WORKING_SIDE = 64
# A pixel belongs to an object when the object covers this much of it.
_COVERED = 0.5
# Components of fewer pixels, in fractions of the shorter side squared, are specks: 5 pixels at 64x64, where the
# smallest object has about 60.
_SPECK_AREA = 0.0012
# Objects thinner than any that the world has are not sized by the templates below.
_RADIUS_LIMITS = (0.06, 0.26)
# Templates are drawn with these multiples of the radius that the area suggests; each sharp, and blurred once and twice.
_RADIUS_FACTORS = (0.95, 1.0, 1.05)
_BLUR_LEVELS = 2
# The share of a component's energy that the best template must explain, and its least lead over the next shape. A round
# or square template explains much of any blob, so those two must fit more closely.
_LEAST_CONFIDENCE = {"circle": 0.93, "square": 0.93, "triangle": 0.89, "star": 0.86, "cross": 0.89, "ring": 0.86}
_LEAST_LEAD = 0.005
# Farthest in OKLab that an object's or background's color may be from the palette's.
_COLOR_TOLERANCE = 0.16


@dataclass(frozen=True, slots=True)
class ParsedObject:
    """One object that was found.

    Args:
        shape: One of SHAPES, or "unknown" where none fits well.
        color: One of COLORS, or "unknown".
        size: One of SIZES.
        x: Center, rightward, in units of the shorter side.
        y: Center, downward, in units of the shorter side.
        radius: Of the circle around the object, in units of the shorter side.
        confidence: Share of the object's energy that the drawn shape explains, 0..1.
    """

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    confidence: float


@dataclass(frozen=True, slots=True)
class ParsedScene:
    """What was found in a picture: objects from left to right, and one of BACKGROUNDS or "unknown"."""

    objects: tuple[ParsedObject, ...]
    background: str


def parse(image: NDArray[np.uint8]) -> ParsedScene:
    """Reads a picture.

    Args:
        image: [height, width, 3], RGB, each side at least 16 pixels.

    Returns:
        The objects and the background.

    Raises:
        UserError: Not such an array.
    """
    pixels = _working_pixels(image)  # [H, W, 3], 0..1
    side = min(pixels.shape[:2])
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    ground = np.median(border, axis=0)  # [3]
    background = _nearest(ground, BACKGROUNDS)
    difference = pixels - ground
    labels, count = _components(_alpha(difference, ground) > _COVERED)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    large_enough = areas >= max(2.0, _SPECK_AREA * side * side)
    # Specks become background again: often they are the tips of a star's rays, and part of what is explained below.
    labels = np.where(large_enough[labels], labels, 0)
    objects = [
        _explain_component(labels, label, difference, ground) for label in range(1, count + 1) if large_enough[label]
    ]
    return ParsedScene(tuple(sorted(objects, key=lambda found: found.x)), background)


def satisfies(image: NDArray[np.uint8] | ParsedScene, spec: SceneSpec) -> bool:
    """Whether a picture shows exactly what a spec says: `explain` finds nothing to object to."""
    return explain(image, spec) is None


def explain(image: NDArray[np.uint8] | ParsedScene, spec: SceneSpec) -> str | None:
    """Says why a picture does not satisfy a spec.

    A picture satisfies a spec when it has as many objects as the spec, they can be paired one to one so that every
    named attribute fits, the named relation holds between the paired objects (the right sign, and more along its axis
    than across it), and the named background is there.

    Args:
        image: [height, width, 3] uint8, or what `parse` made of it.
        spec: What a prompt says.

    Returns:
        One short reason, or None where the picture satisfies the spec.

    Raises:
        UserError: Not such an image.
    """
    scene = image if isinstance(image, ParsedScene) else parse(image)
    if spec.background is not None and scene.background != spec.background:
        return f"the background is {scene.background}, not {spec.background}"
    if len(scene.objects) != len(spec.objects):
        return f"{len(scene.objects)} objects, not {len(spec.objects)}"
    for described in spec.objects:
        if not any(_fits(found, described) for found in scene.objects):
            wanted = " ".join(word for word in (described.size, described.color, described.shape) if word)
            return f"no {wanted} among: {', '.join(_name(found) for found in scene.objects)}"
    pairings = [
        order
        for order in permutations(scene.objects)
        if all(_fits(found, described) for found, described in zip(order, spec.objects, strict=True))
    ]
    if not pairings:
        return f"not one object each as described among: {', '.join(_name(found) for found in scene.objects)}"
    if spec.relation is not None and not any(_related(order[0], order[1], spec.relation) for order in pairings):
        return f"the first object is not {spec.relation} the second"
    return None


def oklab(rgb: NDArray[np.floating]) -> NDArray[np.float64]:
    """Converts sRGB to OKLab, in which Euclidean distance is close to perceived difference.

    Paper: B. Ottosson, "A perceptual color space for image processing", 2020.

    Args:
        rgb: [..., 3], 0..1.

    Returns:
        [..., 3]: lightness 0..1, and two opponent axes.
    """
    rgb = np.clip(rgb, 0, 1)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    cones = np.cbrt(linear @ _CONES_FROM_LINEAR.T)
    return cones @ _LAB_FROM_CONES.T


_CONES_FROM_LINEAR = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_LAB_FROM_CONES = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def _working_pixels(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise UserError(f"a picture to parse is uint8 [height, width, 3], got {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    image_extent((height, width))
    side = min(height, width)
    if side > _WORKING_SIDE:
        size = (round(width * _WORKING_SIDE / side), round(height * _WORKING_SIDE / side))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    return image / 255.0


def _alpha(difference: NDArray[np.float64], ground: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far each pixel is from the background toward the palette color on whose mixing line it lies best.

    Args:
        difference: [H, W, 3], pixels minus background.
        ground: [3], the background's color.

    Returns:
        [H, W], 0 for background and 1 for an object's inside.
    """
    directions = _palette_rgb(COLORS) - ground  # [C, 3]
    squared = (directions * directions).sum(1)  # [C]
    # Not below 0: on gray, blue lies the opposite way of orange.
    along = np.maximum(difference @ (directions / squared[:, None]).T, 0)  # [H, W, C]
    # Squared distance to the line, up to the term |difference|^2 that all colors share.
    best = (along * along * squared).argmax(-1)
    return np.take_along_axis(along, best[..., None], -1)[..., 0]


def _components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int]:
    """Labels 4-connected components 1..count, 0 outside: runs of each row joined by union-find."""
    height, width = mask.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = mask
    steps = np.diff(padded, axis=1)
    rows, starts = np.nonzero(steps == 1)
    ends = np.nonzero(steps == -1)[1]
    parents = list(range(len(rows)))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = parents[parents[run]]
            run = parents[run]
        return run

    run_rows, run_starts, run_ends = rows.tolist(), starts.tolist(), ends.tolist()
    above = 0
    for run, row in enumerate(run_rows):
        while run_rows[above] < row - 1 or (run_rows[above] == row - 1 and run_ends[above] <= run_starts[run]):
            above += 1
        other = above
        while run_rows[other] == row - 1 and run_starts[other] < run_ends[run]:
            parents[root(other)] = root(run)
            other += 1
    labels = np.zeros((height, width), np.int64)
    names: dict[int, int] = {}
    for run, row in enumerate(run_rows):
        labels[row, run_starts[run] : run_ends[run]] = names.setdefault(root(run), len(names) + 1)
    return labels, len(names)


def _explain_component(
    labels: NDArray[np.int64], label: int, difference: NDArray[np.float64], ground: NDArray[np.float64]
) -> ParsedObject:
    """Fits every shape to one component and reports the best."""
    side = min(labels.shape)
    rows, columns = np.nonzero(labels == label)
    reach = max(2, side // 20)
    y0, y1 = max(0, rows.min() - reach), min(labels.shape[0], rows.max() + reach + 1)
    x0, x1 = max(0, columns.min() - reach), min(labels.shape[1], columns.max() + reach + 1)
    crop = labels[y0:y1, x0:x1]
    own = crop == label
    near = own | (_dilate(own, reach) & ~_dilate((crop != 0) & ~own, 1))
    energy = np.where(near[..., None], difference[y0:y1, x0:x1], 0)  # [h, w, 3]
    # The component's own color, seen from the background, measured where it is strongest: inside, off the soft edges.
    strength = (energy * energy).sum(-1)
    core = strength >= 0.7 * np.quantile(strength[own], 0.9)
    direction = energy[core & own].mean(0)
    alpha = np.clip(energy @ direction / (direction @ direction), 0, 1.2)  # [h, w]
    area = alpha.sum()
    y = np.arange(y0, y1)[:, None] + 0.5
    x = np.arange(x0, x1)[None, :] + 0.5
    center_x, center_y = (alpha * x).sum() / area, (alpha * y).sum() / area
    templates, radii = _templates(x - center_x, y - center_y, area)  # [T, h * w], [T]
    weights = np.einsum("tp,tp->t", templates, templates)
    projected = templates @ energy.reshape(-1, 3)  # [T, 3]
    explained = (projected * projected).sum(1) / (weights * strength.sum())
    best = int(explained.argmax())
    confidence, radius = float(explained[best]), float(radii[best])
    by_shape = explained.reshape(len(SHAPES), -1).max(1)
    shape = SHAPES[int(by_shape.argmax())]
    lead = confidence - float(np.partition(by_shape, -2)[-2])
    offset = projected[best] / weights[best]
    radius /= side
    known_radius = _RADIUS_LIMITS[0] <= radius <= _RADIUS_LIMITS[1]
    if confidence < _LEAST_CONFIDENCE[shape] or lead < _LEAST_LEAD or not known_radius:
        shape = UNKNOWN
    return ParsedObject(
        shape,
        _nearest(ground + offset, COLORS),
        "small" if radius < SIZE_THRESHOLD else "large",
        float(center_x) / side,
        float(center_y) / side,
        radius,
        confidence,
    )


def _templates(
    x: NDArray[np.float64], y: NDArray[np.float64], area: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draws every shape with a given area, a little smaller, and a little larger; each sharp and blurred.

    Blur keeps an object's area and centroid, so that they place and size the templates without a search.

    Args:
        x: [1, w], pixel centers relative to the centroid.
        y: [h, 1].
        area: In pixels.

    Returns:
        Coverage [T, h * w] and radii in pixels [T]; equally many for each of SHAPES, in that order.
    """
    sharp, radii = [], []
    for shape in SHAPES:
        for factor in _RADIUS_FACTORS:
            radius = float(np.sqrt(area / _unit_area(shape))) * factor
            sharp.append(coverage(shape, x, y, radius=radius))
            radii.append(radius)
    levels = [np.stack(sharp)]  # [K, h, w] each
    for _ in range(_BLUR_LEVELS):
        levels.append(_blur(levels[-1]))
    stack = np.stack(levels, axis=1)  # [K, L, h, w]
    return stack.reshape(stack.shape[0] * stack.shape[1], -1), np.repeat(radii, stack.shape[1])


def _blur(stack: NDArray[np.float64]) -> NDArray[np.float64]:
    """Blurs pictures [N, h, w], zero beyond their borders, by a binomial filter with a deviation of 0.7 pixels."""
    padded = np.pad(stack, ((0, 0), (1, 1), (1, 1)))
    rows = 0.25 * (padded[:, :-2] + padded[:, 2:]) + 0.5 * padded[:, 1:-1]
    return 0.25 * (rows[:, :, :-2] + rows[:, :, 2:]) + 0.5 * rows[:, :, 1:-1]


@cache
def _unit_area(shape: str) -> float:
    """Area of a shape of radius 1."""
    points = (np.arange(400) + 0.5) / 200 - 1
    return float(coverage(shape, points[None, :] * 200, points[:, None] * 200, radius=200).sum()) / 200**2


def _dilate(mask: NDArray[np.bool_], steps: int) -> NDArray[np.bool_]:
    """Grows a mask by a square of `steps` pixels to each side."""
    for _ in range(steps):
        padded = np.pad(mask, 1)
        mask = padded[:-2] | padded[1:-1] | padded[2:]
        mask = mask[:, :-2] | mask[:, 1:-1] | mask[:, 2:]
    return mask


def _palette_rgb(names: tuple[str, ...]) -> NDArray[np.float64]:
    return np.array([PALETTE[name] for name in names]) / 255.0


@cache
def _palette_oklab(names: tuple[str, ...]) -> NDArray[np.float64]:
    return oklab(_palette_rgb(names))


def _nearest(rgb: NDArray[np.float64], names: tuple[str, ...]) -> str:
    """The palette color nearest in OKLab, or UNKNOWN where all are far."""
    distances = np.linalg.norm(_palette_oklab(names) - oklab(rgb), axis=1)
    best = int(distances.argmin())
    return names[best] if distances[best] <= _COLOR_TOLERANCE else UNKNOWN


def _fits(found: ParsedObject, described: ObjectSpec) -> bool:
    return (
        found.shape == described.shape
        and described.color in (None, found.color)
        and described.size in (None, found.size)
    )


def _related(first: ParsedObject, second: ParsedObject, relation: str) -> bool:
    along, across = relation_offsets(relation, first.x - second.x, first.y - second.y)
    return along > across


def _name(found: ParsedObject) -> str:
    return f"{found.size} {found.color} {found.shape}"
