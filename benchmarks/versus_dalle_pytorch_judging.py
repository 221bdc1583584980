"""How benchmarks/versus_dalle_pytorch.py judges pictures: what the parser of scenes reads against what was asked."""

import multiprocessing
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import permutations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tessera.data.scenes import ATTRIBUTES, ObjectSpec, SceneSpec
from tessera.data.scenes_parser import ParsedObject, ParsedScene, explain, parse
from tessera.data.scenes_world import relation_offsets
from tessera.precision import usable_cores

# N pictures, H W image pixels.


class Verdict(NamedTuple):
    """What is right about one picture."""

    is_right: bool
    """whether it shows all that was asked for and nothing else"""
    attributes: dict[str, bool]
    """those of ATTRIBUTES that were asked for, each looked at alone"""


class Accuracy(NamedTuple):
    """Shares in [0, 1] of pictures, and how many there were."""

    share: float
    count: int

    @property
    def at_least_half_a_picture(self) -> float:
        """The share, as if half a picture had been right where none was: a number that can be divided by."""
        return max(self.share, 0.5 / self.count)


def judge(pictures: NDArray[np.uint8], specs: Sequence[SceneSpec]) -> list[Verdict]:
    """Verdicts on N pictures uint8 [N, H, W, 3] with a spec each, made in as many processes as there are cores."""
    with ProcessPoolExecutor(usable_cores(), mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(verdict, pictures, specs, chunksize=32))


def verdict(picture: NDArray[np.uint8], spec: SceneSpec) -> Verdict:
    """Reads one picture, uint8 [H, W, 3]."""
    found = parse(picture)
    return Verdict(explain(found, spec) is None, attributes(found, spec))


def attributes(found: ParsedScene, spec: SceneSpec) -> dict[str, bool]:
    """What of a spec a picture shows, attribute by attribute.

    Shapes, colors and sizes are right when as many objects as asked for have each that was named, whichever they are:
    red and blue are right in a picture of a blue star and a red ring, also where the star was to be red.
    """
    wanted: dict[str, Counter[str]] = {
        name: Counter(getattr(described, name) for described in spec.objects if getattr(described, name) is not None)
        for name in ("shape", "color", "size")
    }
    shown = {
        name: counts <= Counter(getattr(each, name) for each in found.objects)
        for name, counts in wanted.items()
        if counts
    }
    shown["count"] = len(found.objects) == len(spec.objects)
    if spec.relation is not None:
        shown["relation"] = _is_related(found.objects, spec)
    if spec.background is not None:
        shown["background"] = found.background == spec.background
    return {name: shown[name] for name in ATTRIBUTES if name in shown}


def accuracy(verdicts: Iterable[Verdict]) -> Accuracy:
    """The share of pictures that are right."""
    found = [verdict.is_right for verdict in verdicts]
    return Accuracy(sum(found) / max(1, len(found)), len(found))


def attribute_accuracy(verdicts: Iterable[Verdict], name: str) -> Accuracy:
    """The share of the pictures on which an attribute is right, among those where it was asked for."""
    found = [verdict.attributes[name] for verdict in verdicts if name in verdict.attributes]
    return Accuracy(sum(found) / max(1, len(found)), len(found))


def _is_related(objects: Sequence[ParsedObject], spec: SceneSpec) -> bool:
    assert spec.relation is not None
    for first, second in permutations(objects, 2):
        if _is_meant(first, spec.objects[0]) and _is_meant(second, spec.objects[1]):
            along, across = relation_offsets(spec.relation, first.x - second.x, first.y - second.y)
            if along > across:
                return True
    return False


def _is_meant(found: ParsedObject, described: ObjectSpec) -> bool:
    """Whether an object is the one that was described, whatever its size."""
    return found.shape == described.shape and described.color in (None, found.color)
