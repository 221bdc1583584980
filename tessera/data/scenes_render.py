"""Draws scenes: every shape as signed distances to its edges, turned into anti-aliased pixel coverage."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tessera.data.scenes_world import PALETTE, Scene, image_extent

# Outlines inside the unit circle. Areas are kept alike where the shape allows it, and strokes (the ring's band, the
# cross's arms, the star's rays) thick enough that they are about 3 pixels wide for a small object at 64x64.
_CIRCLE_RADIUS = 0.88
_SQUARE_HALF_SIDE = 1 / math.sqrt(2)
_CROSS_HALF_WIDTH = 0.30
_CROSS_HALF_LENGTH = math.sqrt(1 - _CROSS_HALF_WIDTH**2)
_STAR_INNER_RADIUS = 0.42
_RING_OUTER_RADIUS = 0.94
_RING_INNER_RADIUS = 0.46


def coverage(
    shape: str, x: NDArray[np.floating], y: NDArray[np.floating], *, radius: float, softness: float = 1.0
) -> NDArray[np.floating]:
    """Fraction of each pixel that a shape covers.

    Args:
        shape: One of SHAPES.
        x: Pixel centers relative to the shape's center, rightward, in pixels.
        y: Downward; broadcast against x.
        radius: Radius of the circle around the shape, in pixels.
        softness: Width of the edges' ramp in pixels: 1 is a sharp anti-aliased edge, more is a blurred one.

    Returns:
        0..1, in the broadcast shape of x and y.
    """
    return cover(edge_distances(shape, x / radius, y / radius), radius=radius, softness=softness)


def cover(edges: tuple[NDArray[np.floating], ...], *, radius: float, softness: float) -> NDArray[np.floating]:
    """Turns distances to a shape's edges, in radii and negative inside, into coverage: see `coverage`."""
    # One edge cuts off a part of the pixel that grows linearly with its distance. The parts add up, so that a ray or a
    # band thinner than the pixel is covered by its thickness.
    cut = sum(np.clip(0.5 + edge * (radius / softness), 0, 1) for edge in edges)
    return np.maximum(1 - cut, 0)


def render(scene: Scene, image_size: tuple[int, int] = (64, 64)) -> NDArray[np.uint8]:
    """Draws a scene.

    Args:
        scene: What to draw.
        image_size: (height, width) in pixels, each at least 16. A scene of another aspect is centered.

    Returns:
        [height, width, 3], RGB, C-contiguous.

    Raises:
        UserError: The image is too small.
    """
    height, width = image_size
    image_extent(image_size)
    image = np.empty((height, width, 3), np.uint8)
    image[:] = PALETTE[scene.background]
    scale = min(height / scene.extent[0], width / scene.extent[1])
    left = (width - scene.extent[1] * scale) / 2
    top = (height - scene.extent[0] * scale) / 2
    for placed in scene.objects:
        radius = placed.radius * scale
        center_x, center_y = left + placed.x * scale, top + placed.y * scale
        x0, x1 = max(0, int(center_x - radius - 1)), min(width, int(center_x + radius + 2))
        y0, y1 = max(0, int(center_y - radius - 1)), min(height, int(center_y + radius + 2))
        x = np.arange(x0, x1, dtype=np.float32)[None, :] + np.float32(0.5 - center_x)  # [1, w]
        y = np.arange(y0, y1, dtype=np.float32)[:, None] + np.float32(0.5 - center_y)  # [h, 1]
        alpha = coverage(placed.shape, x, y, radius=radius)[..., None]  # [h, w, 1]
        color = np.asarray(PALETTE[placed.color], np.float32)
        crop = image[y0:y1, x0:x1]
        crop[...] = crop + alpha * (color - crop) + 0.5  # the cast back to integers truncates, so + 0.5 rounds
    return image


def edge_distances(shape: str, x: NDArray[np.floating], y: NDArray[np.floating]) -> tuple[NDArray[np.floating], ...]:
    """Signed distances to the edges nearby, negative inside, of a shape whose surrounding circle is the unit circle.

    A point is inside the shape where it is inside of all of them; by symmetry one or two edges stand for all.
    """
    if shape == "circle":
        return (np.sqrt(x * x + y * y) - _CIRCLE_RADIUS,)
    if shape == "ring":
        distance = np.sqrt(x * x + y * y)
        return distance - _RING_OUTER_RADIUS, _RING_INNER_RADIUS - distance
    if shape == "square":
        return np.abs(x) - _SQUARE_HALF_SIDE, np.abs(y) - _SQUARE_HALF_SIDE
    if shape == "cross":
        x, y = np.abs(x), np.abs(y)
        return np.maximum(x, y) - _CROSS_HALF_LENGTH, np.minimum(x, y) - _CROSS_HALF_WIDTH
    if shape == "triangle":
        return y - 0.5, np.abs(x) * (math.sqrt(3) / 2) - 0.5 * y - 0.5
    return _star_edges(x, y)


def _star_edges(x: NDArray[np.floating], y: NDArray[np.floating]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """The two edges of the nearest of five rays, one of which points up: the plane is folded onto that one."""
    # Angles clockwise from the upper ray: 0..180 degrees after the first fold, -36..72 after the second, -36..36 after
    # the third.
    x, y = _mirror(np.abs(x), y, math.radians(72))
    x, y = _mirror(x, y, math.radians(36))
    # From the tip at (0, -1) to the notch beside it.
    edge_x = _STAR_INNER_RADIUS * math.sin(math.radians(36))
    edge_y = 1 - _STAR_INNER_RADIUS * math.cos(math.radians(36))
    length = math.hypot(edge_x, edge_y)
    across, along = x * (edge_y / length), (y + 1) * (edge_x / length)
    return across - along, -across - along


def _mirror(
    x: NDArray[np.floating], y: NDArray[np.floating], angle: float
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Reflects the points beyond the axis at `angle` clockwise from straight up back onto its near side."""
    normal_x, normal_y = math.cos(angle), math.sin(angle)
    beyond = np.maximum(x * normal_x + y * normal_y, 0) * 2
    return x - beyond * normal_x, y - beyond * normal_y
