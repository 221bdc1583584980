"""The scenes corpus: reproducible, balanced, true to its captions, and without a held-out pair."""

import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from tessera.data.scenes import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    HELD_OUT_PAIRS,
    PALETTE,
    PROMPT_CLASSES,
    SEEN_PAIRS,
    SHAPES,
    SIZES,
    ObjectSpec,
    PlacedObject,
    Scene,
    ScenesCorpus,
    SceneSpec,
    change_one_attribute,
    describe,
    paraphrases,
    render,
    sample_prompts,
    sample_scene,
    sample_scene_for,
    scene_captions,
)
from tessera.data.scenes_parser import oklab
from tessera.data.scenes_world import CLEARANCE, LATTICE, RADII, RELATION_DOMINANCE, SIZE_THRESHOLD, relation_offsets
from tessera.errors import UserError

_DOCUMENT = Path(__file__).parents[3] / "docs" / "scenes.md"


def _true_of(caption: str, scene: Scene) -> bool:
    """Checks a caption against the truth, by a reading of its words that knows nothing of the grammar's code."""
    words = re.sub(r"[^a-z0-9 ]", " ", caption).split()
    for background in BACKGROUNDS:
        if background in words:
            words.remove(background)
            if scene.background != background:
                return False
    singular = {shape: shape for shape in SHAPES} | {
        ("crosses" if shape == "cross" else shape + "s"): shape for shape in SHAPES
    }
    sizes = {"little": "small", "big": "large", "small": "small", "large": "large"}
    mentions: list[dict[str, str]] = []
    pending: dict[str, str] = {}
    for place, word in enumerate(words):
        if word in sizes:
            pending["size"] = sizes[word]
        elif word in COLORS:
            # "a star that is red" and "a star in red" name the color after the shape.
            if words[place - 1] in ("is", "in"):
                mentions[-1]["color"] = word
            else:
                pending["color"] = word
        elif word in singular:
            mentions.append({"shape": singular[word], **pending})
            pending = {}
    counts = {"2": 2, "two": 2, "3": 3, "three": 3, "4": 4, "four": 4}
    for word, count in counts.items():
        if word in words:
            mentions *= count

    def fits(placed: PlacedObject, mention: dict[str, str]) -> bool:
        return all(getattr(placed, attribute) == value for attribute, value in mention.items())

    if len(mentions) != len(scene.objects):
        return False
    if len(mentions) != 2:
        return all(fits(placed, mention) for placed, mention in zip(scene.objects, mentions, strict=True))
    for first, second in (scene.objects, scene.objects[::-1]):
        if not (fits(first, mentions[0]) and fits(second, mentions[1])):
            continue
        dx, dy = first.x - second.x, first.y - second.y
        sides = {"left": -dx, "right": dx, "above": -dy, "over": -dy, "below": dy, "under": dy}
        named = [side for word, side in sides.items() if word in words]
        if not named:
            return True
        # "left of B is A" and "A with B to its left" speak of the second object.
        turned = words[0] in sides or words[:3] in (["to", "the", "left"], ["to", "the", "right"]) or "with" in words
        if (-named[0] if turned else named[0]) > 0:
            return True
    return False


def test_captions_are_true_of_their_picture() -> None:
    corpus = ScenesCorpus(600, seed=3)
    for index in range(len(corpus)):
        scene = corpus.sample(index)[1]
        for caption in corpus.captions(index):
            assert _true_of(caption, scene), (index, caption, scene)
    # The reading above must be able to object.
    scene = Scene(
        (PlacedObject("star", "red", "small", 0.3, 0.5, 0.11), PlacedObject("ring", "blue", "large", 0.7, 0.5, 0.16)),
        "white",
    )
    assert _true_of("a red star left of a blue ring", scene)
    for wrong in (
        "a blue star left of a red ring",
        "a red star right of a ring",
        "a star",
        "a ring with a star on black",
    ):
        assert not _true_of(wrong, scene)


def test_captions_are_several_short_and_lower_case() -> None:
    counts = []
    for index in range(600):
        captions = scene_captions(0, index)
        counts.append(len(captions))
        assert len(set(captions)) == len(captions)
        for caption in captions:
            assert caption == caption.lower().strip() and "  " not in caption
            assert len(caption.split()) <= 14
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption), caption
    assert np.mean(counts) > 4


def test_no_training_scene_has_a_held_out_pair() -> None:
    pairs: Counter[tuple[str, str]] = Counter()
    for split in ("train", "validation"):
        corpus = ScenesCorpus(2000, split=split)
        pairs.update((placed.shape, placed.color) for i in range(2000) for placed in corpus.sample(i)[1].objects)
    assert not set(pairs) & set(HELD_OUT_PAIRS)
    assert set(pairs) == set(SEEN_PAIRS)
    assert max(pairs.values()) < 2 * min(pairs.values())
    assert sorted(color for _, color in HELD_OUT_PAIRS) == sorted(COLORS)
    assert {shape for shape, _ in HELD_OUT_PAIRS} == set(SHAPES)


def test_classes_sizes_and_backgrounds_are_balanced() -> None:
    samples = [sample_scene(5, index) for index in range(2000)]
    classes = Counter(spec.prompt_class for spec, _ in samples)
    assert set(classes) == set(PROMPT_CLASSES)
    assert min(classes.values()) > 0.11 * 2000 and max(classes.values()) < 0.26 * 2000
    for words in (
        Counter(scene.background for _, scene in samples),
        Counter(scene.objects[0].size for _, scene in samples),
        Counter(len(spec.objects) for spec, _ in samples if spec.prompt_class == "counting"),
        Counter(spec.relation for spec, _ in samples if spec.relation),
    ):
        assert max(words.values()) < 1.5 * min(words.values()), words


@pytest.mark.parametrize("image_size", [(64, 64), (48, 96), (96, 40)])
def test_objects_keep_their_distance_and_relations_are_clear(image_size: tuple[int, int]) -> None:
    for index in range(400):
        spec, scene = sample_scene(1, index, image_size=image_size, pairs="unseen" if index % 2 else "seen")
        height, width = scene.extent
        assert (height, width) == (image_size[0] / min(image_size), image_size[1] / min(image_size))
        for placed in scene.objects:
            assert placed.radius == RADII[placed.size]
            for steps in ((placed.x - width / 2) * LATTICE, (placed.y - height / 2) * LATTICE):
                assert abs(steps - round(steps)) < 1e-6
            reach = placed.radius + CLEARANCE - 1e-9
            assert reach <= placed.x <= width - reach and reach <= placed.y <= height - reach
        for one, other in combinations(scene.objects, 2):
            gap = np.hypot(one.x - other.x, one.y - other.y) - one.radius - other.radius
            assert gap >= CLEARANCE - 1e-9
        if spec.relation is not None:
            first, second = scene.objects
            along, across = relation_offsets(spec.relation, first.x - second.x, first.y - second.y)
            assert along >= RELATION_DOMINANCE * across


def test_sizes_leave_a_gap_around_the_threshold() -> None:
    assert RADII["small"] * 1.1 < SIZE_THRESHOLD < RADII["large"] / 1.1


def test_samples_depend_on_seed_index_and_split_alone() -> None:
    corpus, again = ScenesCorpus(50), ScenesCorpus(50)
    backward = {index: again.image(index) for index in reversed(range(50))}
    for index in range(50):
        assert np.array_equal(corpus.image(index), backward[index])
        assert corpus.captions(index) == again.captions(index)
    others = [ScenesCorpus(50, seed=1), ScenesCorpus(50, split="validation")]
    for other in others:
        assert sum(corpus.sample(i) == other.sample(i) for i in range(50)) == 0
        assert corpus.fingerprint() != other.fingerprint()
    assert corpus.fingerprint() == again.fingerprint()
    assert corpus.fingerprint() != ScenesCorpus(51).fingerprint()


def test_the_stream_of_version_2_does_not_change() -> None:
    # Published results compare only while these hold: a change of them is a change of scenes.VERSION.
    assert scene_captions(0, 0)[0] == "there is one small square"
    spec, scene = sample_scene(0, 1)
    assert spec.objects == (ObjectSpec("triangle", "orange"), ObjectSpec("circle", "blue", "small"))
    assert (spec.relation, scene.background, scene.objects[0].size) == ("above", "gray", "large")
    assert [(placed.x, placed.y) for placed in scene.objects] == [(0.640625, 0.375), (0.65625, 0.78125)]
    assert [prompt.text for prompt in sample_prompts(6, seed=0, pairs="unseen")] == [
        "there is an orange square",
        "one cyan circle and a blue cross",
        "three big red triangles",
        "one purple circle against a white background",
        "one cyan square is above a yellow ring",
        "one cyan ring, a purple circle",
    ]


def test_prompts_are_balanced_and_name_what_is_unseen() -> None:
    seen, unseen = sample_prompts(120, seed=4, pairs="seen"), sample_prompts(120, seed=4, pairs="unseen")
    for prompts in (seen, unseen):
        assert Counter(prompt.spec.prompt_class for prompt in prompts) == dict.fromkeys(PROMPT_CLASSES, 20)
        assert len({prompt.text for prompt in prompts}) == 120
        assert all(prompt.text in paraphrases(prompt.spec) for prompt in prompts)
    for prompt in unseen:
        assert any((named.shape, named.color) in HELD_OUT_PAIRS for named in prompt.spec.objects)
        assert any(color in prompt.text for color in COLORS)
    for prompt in seen:
        assert not any((named.shape, named.color) in HELD_OUT_PAIRS for named in prompt.spec.objects)


def test_paraphrases_are_all_that_describe_says() -> None:
    spec = SceneSpec("counting", (ObjectSpec("circle", "red"),) * 3)
    texts = paraphrases(spec)
    assert {"three red circles", "3 red circles", "there are three red circles"} <= set(texts)
    generator = np.random.default_rng(0)
    assert {describe(spec, generator) for _ in range(200)} == set(texts)
    position = SceneSpec("position", (ObjectSpec("star", "red"), ObjectSpec("ring", "blue")), relation="above")
    assert {"a red star above a blue ring", "above a blue ring there is a red star"} <= set(paraphrases(position))
    for index in range(100):
        assert len(paraphrases(sample_scene(0, index)[0])) >= 4


def test_palette_colors_that_can_meet_are_far_apart() -> None:
    lab = {name: oklab(np.array(PALETTE[name]) / 255) for name in (*COLORS, *BACKGROUNDS)}
    for one, other in combinations(lab, 2):
        assert np.linalg.norm(lab[one] - lab[other]) > 0.21, (one, other)
    assert oklab(np.ones(3)) == pytest.approx([1, 0, 0], abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_drawing_is_anti_aliased_and_keeps_its_place_at_any_size(shape: str) -> None:
    scene = Scene((PlacedObject(shape, "red", "large", 0.4, 0.55, 0.16),), "black")
    areas = []
    for side in (32, 64, 256):
        red = render(scene, (side, side))[..., 0] / PALETTE["red"][0]
        y, x = (np.mgrid[:side, :side] + 0.5) / side
        assert (red * x).sum() / red.sum() == pytest.approx(0.4, abs=0.004)
        assert (red * y).sum() / red.sum() == pytest.approx(0.55, abs=0.004)
        assert ((red > 0.1) & (red < 0.9)).any()
        assert not red[np.hypot(x - 0.4, y - 0.55) > 0.16 + 1 / side].any()
        areas.append(red.mean())
    assert np.ptp(areas) < 0.04 * areas[-1]


def test_overlapping_boxes_do_not_erase_a_neighbor() -> None:
    near = PlacedObject("square", "red", "large", 0.3, 0.3, 0.16)
    far = PlacedObject("circle", "blue", "large", 0.555, 0.555, 0.16)
    both, alone = render(Scene((near, far), "white")), render(Scene((near,), "white"))
    corner = alone[..., 1] < 250
    assert np.array_equal(both[corner], alone[corner])


def test_scene_for_a_spec_shows_it_and_nothing_unseen_by_itself() -> None:
    spec = SceneSpec("two", (ObjectSpec("star"), ObjectSpec("ring", "yellow", "large")), background="gray")
    scenes = [sample_scene_for(spec, 0, index) for index in range(60)]
    assert len(set(scenes)) > 50
    for scene in scenes:
        star, ring = scene.objects
        assert scene.background == "gray" and (ring.shape, ring.color, ring.size) == ("ring", "yellow", "large")
        assert star.shape == "star" and (star.shape, star.color) in SEEN_PAIRS
    assert {scene.objects[0].size for scene in scenes} == set(SIZES)
    kinds = {
        (placed.color, placed.size)
        for placed in sample_scene_for(SceneSpec("counting", (ObjectSpec("star"),) * 4), 0, 0).objects
    }
    assert len(kinds) == 1


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_changed_spec_differs_in_that_attribute(attribute: str) -> None:
    generator = np.random.default_rng(0)
    objects = (ObjectSpec("star", "red", "small"), ObjectSpec("ring", "blue", "large"))
    spec = SceneSpec("position", objects, "above", "gray")
    changed = change_one_attribute(spec, attribute, generator)
    assert changed is not None and changed != spec
    if attribute == "count":
        assert len(changed.objects) != 2
    elif attribute in ("relation", "background"):
        assert getattr(changed, attribute) != getattr(spec, attribute) and changed.objects == spec.objects
    else:
        differences = [
            name
            for before, after in zip(spec.objects, changed.objects, strict=True)
            for name in ("shape", "color", "size")
            if getattr(before, name) != getattr(after, name)
        ]
        assert differences == [attribute]
    bare = SceneSpec("single", (ObjectSpec("star"),))
    if attribute in ("color", "size", "relation", "background"):
        assert change_one_attribute(bare, attribute, generator) is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: ObjectSpec("blob"), "unknown shape 'blob'"),
        (lambda: ObjectSpec("star", "gray"), "unknown color 'gray'"),
        (lambda: SceneSpec("single", ()), "at least one object"),
        (lambda: SceneSpec("position", (ObjectSpec("star"),), "above"), "exactly 2 objects"),
        (lambda: ScenesCorpus(0), "at least 1 picture"),
        (lambda: ScenesCorpus(5, image_size=(8, 64)), "at least 16 pixels"),
        (lambda: sample_scene(-1, 0), "from 0 to"),
        (lambda: sample_scene(0, 0, prompt_class="poem"), "unknown prompt class"),
        (lambda: sample_scene_for(SceneSpec("counting", (ObjectSpec("star", None, "large"),) * 9), 0, 0), "no room"),
    ],
)
def test_mistakes_are_told_in_one_line(wrong, message: str) -> None:
    with pytest.raises(UserError, match=message):
        wrong()


def test_corpus_ends_where_it_says() -> None:
    corpus = ScenesCorpus(3, image_size=(32, 48))
    assert len(corpus) == 3
    image = corpus.image(2)
    assert image.shape == (32, 48, 3) and image.dtype == np.uint8 and image.flags["C_CONTIGUOUS"]
    for index in (3, -1):
        with pytest.raises(IndexError):
            corpus.image(index)


def test_the_documentation_states_the_sizes_that_are_drawn() -> None:
    text = _DOCUMENT.read_text()
    for radius in RADII.values():
        assert f"{radius:.3f}" in text
    assert f"lattice of {LATTICE}" in text
    assert f"at least {CLEARANCE} of the shorter side" in text


def test_the_examples_in_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", _DOCUMENT.read_text(), re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, str(_DOCUMENT), "exec"), {})
    assert (tmp_path / "scenes.png").stat().st_size > 0
