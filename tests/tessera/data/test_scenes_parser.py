"""The scenes parser: accepts what is right, rejects what is wrong by a little, and is not fooled by garbage."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from tessera.data.scenes import (
    ATTRIBUTES,
    BACKGROUNDS,
    PALETTE,
    PROMPT_CLASSES,
    SHAPES,
    ObjectSpec,
    PlacedObject,
    Scene,
    SceneSpec,
    change_one_attribute,
    render,
    sample_scene,
    sample_scene_for,
)
from tessera.data.scenes_parser import UNKNOWN, ParsedScene, explain, parse, satisfies
from tessera.errors import UserError


def _samples(count: int, image_size: tuple[int, int] = (64, 64)) -> list[tuple[SceneSpec, Scene]]:
    """Specs of all classes that name everything that their scenes show."""
    samples = []
    for index in range(count):
        prompt_class = PROMPT_CLASSES[index % 6]
        pairs = "unseen" if index % 4 == 0 else "seen"
        spec, scene = sample_scene(77, index, pairs=pairs, prompt_class=prompt_class, image_size=image_size)
        objects = tuple(ObjectSpec(placed.shape, placed.color, placed.size) for placed in scene.objects)
        samples.append((replace(spec, objects=objects, background=scene.background), scene))
    return samples


def _degraded(picture: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
    """Blurred, shifted in color block by block, and noisy: what a discrete autoencoder does to a picture."""
    shifts = np.kron(generator.normal(0, 8, (picture.shape[0] // 8, picture.shape[1] // 8, 3)), np.ones((8, 8, 1)))
    shifted = np.clip(picture + shifts, 0, 255).astype(np.uint8)
    blurred = np.asarray(Image.fromarray(shifted).filter(ImageFilter.GaussianBlur(0.7)))
    return np.clip(blurred + generator.normal(0, 6, picture.shape) + 0.5, 0, 255).astype(np.uint8)


def _drawn(draw_on: str, *polygons: tuple[str, list[tuple[float, float]]]) -> NDArray[np.uint8]:
    """Polygons in pixels of a 64x64 picture, anti-aliased by drawing them eight times larger."""
    sheet = Image.new("RGB", (512, 512), PALETTE[draw_on])
    for color, points in polygons:
        ImageDraw.Draw(sheet).polygon([(8 * x, 8 * y) for x, y in points], fill=PALETTE[color])
    return np.asarray(sheet.resize((64, 64), Image.Resampling.BOX))


def _regular(
    corners: int, radius: float, turn_degrees: float, x: float = 32, y: float = 32
) -> list[tuple[float, float]]:
    angles = np.radians(turn_degrees) + 2 * np.pi * np.arange(corners) / corners
    return [(x + radius * np.sin(angle), y - radius * np.cos(angle)) for angle in angles]


@pytest.mark.parametrize("image_size", [(64, 64), (32, 32), (48, 96), (128, 128)])
def test_true_renders_are_accepted(image_size: tuple[int, int]) -> None:
    samples = _samples(240 if image_size == (64, 64) else 60, image_size)
    refused = [explain(render(scene, image_size), spec) for spec, scene in samples]
    assert [reason for reason in refused if reason is not None] == []


def test_degraded_renders_are_accepted() -> None:
    generator = np.random.default_rng(0)
    accepted = [satisfies(_degraded(render(scene), generator), spec) for spec, scene in _samples(240)]
    assert np.mean(accepted) >= 0.98


def test_compressed_renders_are_accepted() -> None:
    accepted = []
    for spec, scene in _samples(120):
        file = io.BytesIO()
        Image.fromarray(render(scene)).save(file, "JPEG", quality=25, subsampling=0)
        accepted.append(satisfies(np.asarray(Image.open(file)), spec))
    assert np.mean(accepted) >= 0.97


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_renders_that_differ_in_one_attribute_are_rejected(attribute: str) -> None:
    generator = np.random.default_rng(0)
    tried = 0
    for index, (spec, _) in enumerate(_samples(240)):
        changed = change_one_attribute(spec, attribute, generator)
        if changed is None or tried == 40:
            continue
        tried += 1
        picture = parse(render(sample_scene_for(changed, 0, index)))
        assert satisfies(picture, changed), (changed, picture)
        assert not satisfies(picture, spec), (spec, changed)
    assert tried == 40


def test_found_objects_lie_where_they_were_drawn() -> None:
    for _, scene in _samples(60, (48, 96)):
        found = parse(render(scene, (48, 96))).objects
        truth = sorted(scene.objects, key=lambda placed: placed.x)
        assert len(found) == len(truth)
        if any(abs(one.x - other.x) < 0.02 for one, other in zip(truth, truth[1:], strict=False)):
            continue  # the order from left to right may swap
        for one, placed in zip(found, truth, strict=True):
            assert (one.x, one.y) == pytest.approx((placed.x, placed.y), abs=0.01)
            assert one.radius == pytest.approx(placed.radius, rel=0.05)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_named_attributes_count_and_open_ones_do_not(shape: str, background: str) -> None:
    picture = render(Scene((PlacedObject(shape, "blue", "large", 0.5, 0.5, 0.17),), background))
    assert satisfies(picture, SceneSpec("single", (ObjectSpec(shape),)))
    assert satisfies(picture, SceneSpec("colors", (ObjectSpec(shape, "blue"),), background=background))
    assert not satisfies(picture, SceneSpec("single", (ObjectSpec(shape, None, "small"),)))
    assert not satisfies(picture, SceneSpec("counting", (ObjectSpec(shape),) * 2))
    for other in set(BACKGROUNDS) - {background}:
        assert not satisfies(picture, SceneSpec("colors", (ObjectSpec(shape, "blue"),), background=other))


def test_objects_are_paired_one_to_one() -> None:
    scene = Scene(
        (
            PlacedObject("star", "red", "small", 0.25, 0.3, 0.135),
            PlacedObject("star", "blue", "small", 0.75, 0.3, 0.135),
        ),
        "white",
    )
    picture = parse(render(scene))
    assert satisfies(picture, SceneSpec("binding", (ObjectSpec("star"), ObjectSpec("star", "red"))))
    # Each description fits one of the objects, and both fit the same one.
    assert not satisfies(
        picture, SceneSpec("binding", (ObjectSpec("star", "red"), ObjectSpec("star", None, "small"))[:1] * 2)
    )
    red, blue = ObjectSpec("star", "red"), ObjectSpec("star", "blue")
    assert satisfies(picture, SceneSpec("position", (red, blue), "left of"))
    assert satisfies(picture, SceneSpec("position", (blue, red), "right of"))
    for relation in ("right of", "above", "below"):
        assert not satisfies(picture, SceneSpec("position", (red, blue), relation))
    # Either star is left or right of the other one, whatever the pairing.
    assert satisfies(picture, SceneSpec("position", (ObjectSpec("star"), ObjectSpec("star")), "right of"))


def test_a_relation_needs_the_larger_part_of_the_offset() -> None:
    star, ring = (
        PlacedObject("star", "red", "small", 0.3, 0.3, 0.135),
        PlacedObject("ring", "blue", "small", 0.0, 0.0, 0.135),
    )
    spec = SceneSpec("position", (ObjectSpec("star"), ObjectSpec("ring")), "left of")
    mostly_right = parse(render(Scene((star, replace(ring, x=0.75, y=0.6)), "white")))
    mostly_below = parse(render(Scene((star, replace(ring, x=0.6, y=0.75)), "white")))
    assert satisfies(mostly_right, spec) and not satisfies(mostly_below, spec)


@pytest.mark.parametrize(
    "polygons",
    [
        pytest.param([("red", _regular(3, 10, 60))], id="triangle on its tip"),
        pytest.param([("red", _regular(3, 10, 25))], id="turned triangle"),
        pytest.param([("red", _regular(4, 10, 0))], id="square on its corner"),
        pytest.param([("red", [(20, 24), (44, 24), (44, 40), (20, 40)])], id="oblong"),
        pytest.param([("red", [(22, 20), (22, 42), (44, 42)])], id="right triangle"),
        pytest.param([("red", [(22, 20), (30, 20), (30, 36), (44, 36), (44, 44), (22, 44)])], id="L"),
        pytest.param([("red", _regular(40, 7, 0, 26)), ("red", _regular(40, 7, 0, 38))], id="merged circles"),
        pytest.param([("red", _regular(40, 7, 0, 27)), ("blue", _regular(40, 7, 0, 39))], id="touching circles"),
        pytest.param(
            [("red", _regular(4, 11, 45)), ("blue", [(32, 24), (40, 24), (40, 40), (32, 40)])], id="two colors"
        ),
        pytest.param([("red", _regular(40, 28, 0))], id="far too large"),
        pytest.param([("red", _regular(40, 2.2, 0))], id="far too small"),
    ],
)
def test_what_is_no_shape_of_the_world_is_unknown(polygons: list[tuple[str, list[tuple[float, float]]]]) -> None:
    picture = parse(_drawn("white", *polygons))
    assert [found.shape for found in picture.objects] == [UNKNOWN]
    assert not any(satisfies(picture, SceneSpec("single", (ObjectSpec(shape),))) for shape in SHAPES)


def test_an_extra_blob_counts_and_a_speck_does_not() -> None:
    spec = SceneSpec("single", (ObjectSpec("circle", "red"),))
    circle = ("red", _regular(60, 9, 0, 20, 20))
    assert satisfies(_drawn("white", circle, ("blue", _regular(4, 1, 0, 48, 48))), spec)
    blob = _drawn("white", circle, ("blue", [(44, 46), (52, 44), (53, 50), (46, 51)]))
    assert not satisfies(blob, spec)
    assert explain(blob, spec) == "2 objects, not 1"


@pytest.mark.parametrize("level", [0, 60, 128, 255])
def test_empty_and_noisy_pictures_are_read_without_fail(level: int) -> None:
    empty = parse(np.full((64, 64, 3), level, np.uint8))
    assert empty.objects == ()
    noise = np.random.default_rng(level).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    spec = SceneSpec("single", (ObjectSpec("circle"),))
    assert not satisfies(noise, spec) and not satisfies(empty, spec)


def test_reasons_say_what_is_wrong() -> None:
    picture = parse(render(Scene((PlacedObject("star", "red", "small", 0.5, 0.5, 0.135),), "white")))
    assert explain(picture, SceneSpec("single", (ObjectSpec("star"),))) is None
    assert explain(picture, SceneSpec("colors", (ObjectSpec("star", "blue"),))) == (
        "no blue star among: small red star"
    )
    assert explain(picture, SceneSpec("colors", (ObjectSpec("star"),), background="black")) == (
        "the background is white, not black"
    )
    assert explain(ParsedScene((), "white"), SceneSpec("single", (ObjectSpec("star"),))) == "0 objects, not 1"


def test_only_pictures_are_parsed() -> None:
    arrays: list[Any] = [np.zeros((64, 64), np.uint8), np.zeros((3, 64, 64), np.uint8), np.zeros((64, 64, 3))]
    for wrong in arrays:
        with pytest.raises(UserError, match="uint8"):
            parse(wrong)
    with pytest.raises(UserError, match="at least 16 pixels"):
        parse(np.zeros((8, 64, 3), np.uint8))
