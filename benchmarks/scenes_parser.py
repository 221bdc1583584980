"""How well the scenes parser reads pictures whose content is known: sharp, blurred, noisy, and wrong by one attribute.

python -m benchmarks.scenes_parser [--quick] [--out benchmarks/results/scenes_parser.json]
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.record import Row, write_results
from tessera.data.scenes import (
    ATTRIBUTES,
    PROMPT_CLASSES,
    ObjectSpec,
    Scene,
    SceneSpec,
    change_one_attribute,
    render,
    sample_scene,
    sample_scene_for,
)
from tessera.data.scenes_parser import parse, satisfies

CLAIM = "the scenes parser accepts true renders and rejects those that differ from the spec in one attribute"
_SEED = 20_26
_Picture = NDArray[np.uint8]


def main() -> None:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--quick", action="store_true", help="a tenth of the pictures")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/scenes_parser.json"), help="where to write"
    )
    arguments = parser.parse_args()
    count = 200 if arguments.quick else 2000
    rows: list[Row] = []

    for name, degrade, goal in (
        ("sharp", _keep, 0.995),
        ("blur 0.7 px and noise 6/255", _blur_and_noise, 0.98),
        ("blur, noise and a color shift of 8/255 per 8x8 block", _shift_blocks, 0.98),
        ("JPEG quality 25", _compress, 0.95),
    ):
        rows.append(Row(f"accepted, {name}", _accepted(count, (64, 64), degrade), "share", "", None, goal))
    for size in ((32, 32), (48, 96), (128, 128)):
        share = _accepted(count // 4, size, _keep)
        rows.append(Row(f"accepted, sharp, {size[0]}x{size[1]} pixels", share, "share", "", None, 0.995))
        share = _accepted(count // 4, size, _blur_and_noise)
        rows.append(Row(f"accepted, blur and noise, {size[0]}x{size[1]} pixels", share, "share", "", None, 0.98))
    moved = _accepted(count, (64, 64), _keep, move=True)
    rows.append(
        Row("accepted, sharp, off the lattice and up to 5 % larger or smaller", moved, "share", "", None, 0.995)
    )
    rejected_of_all = []
    for attribute in ATTRIBUTES:
        rejected = _rejected(count // 4, attribute)
        rejected_of_all += rejected
        rows.append(Row(f"rejected, other {attribute}", _share(rejected), "share", "", None, 0.99))
    rows.append(Row("rejected, one attribute changed", _share(rejected_of_all), "share", "", None, 0.99))
    rows.append(Row("pictures parsed per second of CPU time, 64x64", _rate(count // 4), "1/s", "", None, 200.0))
    write_results(arguments.out, claim=CLAIM, rows=rows)


def _samples(count: int, image_size: tuple[int, int]) -> list[tuple[SceneSpec, Scene]]:
    """Specs that name everything that their scene shows, of all classes, every fourth with an unseen pair."""
    samples = []
    for index in range(count):
        spec, scene = sample_scene(
            _SEED,
            index,
            pairs="unseen" if index % 4 == 0 else "seen",
            stream="prompts",
            prompt_class=PROMPT_CLASSES[index % len(PROMPT_CLASSES)],
            image_size=image_size,
        )
        objects = tuple(ObjectSpec(placed.shape, placed.color, placed.size) for placed in scene.objects)
        samples.append((SceneSpec(spec.prompt_class, objects, spec.relation, scene.background), scene))
    return samples


def _accepted(
    count: int,
    image_size: tuple[int, int],
    degrade: Callable[[_Picture, np.random.Generator], _Picture],
    *,
    move: bool = False,
) -> float:
    generator = np.random.default_rng(_SEED)
    accepted = []
    for spec, scene in _samples(count, image_size):
        drawn = _moved(scene, generator) if move else scene
        accepted.append(satisfies(degrade(render(drawn, image_size), generator), spec))
    return _share(accepted)


def _moved(scene: Scene, generator: np.random.Generator) -> Scene:
    """Shifts objects by up to 0.01 and changes their radius by up to 5 %: models do not keep to the lattice."""
    objects = []
    for placed in scene.objects:
        dx, dy, growth = generator.uniform(-1, 1, 3) * (0.01, 0.01, 0.05)
        objects.append(replace(placed, x=placed.x + dx, y=placed.y + dy, radius=placed.radius * (1 + growth)))
    return replace(scene, objects=tuple(objects))


def _rejected(count: int, attribute: str) -> list[bool]:
    """For each spec that names the attribute: is a picture of the changed spec rejected?"""
    generator = np.random.default_rng(_SEED)
    rejected = []
    for index, (spec, _) in enumerate(_samples(2 * count, (64, 64))):
        changed = change_one_attribute(spec, attribute, generator)
        if changed is not None:
            rejected.append(not satisfies(render(sample_scene_for(changed, _SEED, index)), spec))
    return rejected


def _rate(count: int) -> float:
    seconds = []
    for _, scene in _samples(count, (64, 64)):
        picture = render(scene)
        start = time.process_time()
        parse(picture)
        seconds.append(time.process_time() - start)
    return 1 / statistics.median(seconds)


def _share(outcomes: list[bool]) -> float:
    return sum(outcomes) / len(outcomes)


def _keep(picture: _Picture, generator: np.random.Generator) -> _Picture:
    return picture


def _blur_and_noise(picture: _Picture, generator: np.random.Generator) -> _Picture:
    blurred = _blur(picture.astype(np.float64), 0.7) + generator.normal(0, 6, picture.shape)
    return np.clip(blurred + 0.5, 0, 255).astype(np.uint8)


def _shift_blocks(picture: _Picture, generator: np.random.Generator) -> _Picture:
    height, width = picture.shape[:2]
    shifts = generator.normal(0, 8, (-(-height // 8), -(-width // 8), 3))
    shifted = picture + np.kron(shifts, np.ones((8, 8, 1)))[:height, :width]
    return _blur_and_noise(np.clip(shifted, 0, 255).astype(np.uint8), generator)


def _compress(picture: _Picture, generator: np.random.Generator) -> _Picture:
    """JPEG loses detail by 8x8 blocks, much as a codebook for patches does."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=25, subsampling=0)
    return np.asarray(Image.open(file))


def _blur(picture: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    reach = int(3 * sigma + 1)
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma * sigma))
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.moveaxis(np.pad(picture, ((reach, reach), (reach, reach), (0, 0)), mode="edge"), axis, 0)
        length = picture.shape[axis]
        blurred = sum(weight * padded[step : step + length] for step, weight in enumerate(kernel))
        crop = [slice(None), slice(reach, -reach), slice(None)]
        picture = np.moveaxis(np.asarray(blurred)[tuple(crop)], 0, axis)
    return picture


if __name__ == "__main__":
    main()
