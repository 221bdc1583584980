"""Says what a scene spec says in plain English: a small grammar with several paraphrases for each prompt class."""

from __future__ import annotations

from itertools import product

import numpy as np

from tessera.data.scenes_world import ObjectSpec, SceneSpec

_PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "ring": "rings",
}
_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_PLAIN = ("{0}", "{0}", "there is {0}", "a picture of {0}")
_PLURAL = ("{0}", "{0}", "there are {0}", "a picture of {0}")
_TWO = ("{0} and {1}", "{0} and {1}", "{1} and {0}", "{0} with {1}", "{1} next to {0}", "there is {0} and {1}")
_BINDING = ("{0} and {1}", "{0} and {1}", "{1} and {0}", "{0} with {1}", "{0}, {1}", "there is {0} and {1}")
_POSITION = {
    "left of": (
        "{0} left of {1}",
        "{0} to the left of {1}",
        "{0} on the left of {1}",
        "to the left of {1} is {0}",
        "left of {1} there is {0}",
        "{1} with {0} to its left",
    ),
    "right of": (
        "{0} right of {1}",
        "{0} to the right of {1}",
        "{0} on the right of {1}",
        "to the right of {1} is {0}",
        "right of {1} there is {0}",
        "{1} with {0} to its right",
    ),
    "above": (
        "{0} above {1}",
        "{0} is above {1}",
        "{0} over {1}",
        "above {1} there is {0}",
        "above {1} is {0}",
        "{1} with {0} above it",
    ),
    "below": (
        "{0} below {1}",
        "{0} is below {1}",
        "{0} under {1}",
        "below {1} there is {0}",
        "under {1} is {0}",
        "{1} with {0} below it",
    ),
}
_BACKGROUND = ("{0} on a {1} background", "{0} on {1}", "{0} against a {1} background", "on a {1} background, {0}")


def paraphrases(spec: SceneSpec) -> tuple[str, ...]:
    """Returns every caption that the grammar has for a spec: lower-case, each once, in a fixed order."""
    phrases = [_noun_phrases(spec, index) for index in range(_num_phrases(spec))]
    texts = []
    for template in _templates(spec):
        for choice in product(*phrases):
            text = template.format(*choice)
            if spec.background is None:
                texts.append(text)
            else:
                texts.extend(frame.format(text, spec.background) for frame in _BACKGROUND)
    return tuple(dict.fromkeys(texts))


def describe(spec: SceneSpec, generator: np.random.Generator) -> str:
    """Draws one of the captions of `paraphrases`, without listing them all.

    Args:
        spec: What to say.
        generator: Where the choices come from; it is advanced.

    Returns:
        A lower-case caption.
    """
    phrases = [_pick(_noun_phrases(spec, index), generator) for index in range(_num_phrases(spec))]
    text = _pick(_templates(spec), generator).format(*phrases)
    if spec.background is not None:
        text = _pick(_BACKGROUND, generator).format(text, spec.background)
    return text


def _templates(spec: SceneSpec) -> tuple[str, ...]:
    """The sentences that fit a spec, with a slot for each noun phrase; a favored one is listed twice."""
    if spec.relation is not None:
        return _POSITION[spec.relation]
    if spec.prompt_class == "counting" or _is_uniform(spec):
        return _PLURAL if len(spec.objects) > 1 else _PLAIN
    if len(spec.objects) == 1:
        return _PLAIN
    if len(spec.objects) == 2:
        return _BINDING if spec.prompt_class == "binding" else _TWO
    slots = [f"{{{index}}}" for index in range(len(spec.objects))]
    return (", ".join(slots[:-1]) + " and " + slots[-1],)


def _noun_phrases(spec: SceneSpec, index: int) -> tuple[str, ...]:
    """The ways to name one object, or all of them where they are of one kind."""
    described = spec.objects[index]
    if _is_uniform(spec) and len(spec.objects) > 1:
        return _counted(described, len(spec.objects))
    adjectives = [" ".join(words) for words in _adjectives(described)]
    phrases = []
    for adjective in adjectives:
        noun = f"{adjective} {described.shape}".strip()
        article = "an" if noun[0] in "aeiou" else "a"
        phrases += [f"{article} {noun}", f"{article} {noun}", f"one {noun}"]
    if spec.prompt_class == "colors" and described.color is not None:
        uncolored = ObjectSpec(described.shape, None, described.size)
        for words in _adjectives(uncolored):
            noun = " ".join((*words, described.shape))
            phrases += [f"a {noun} that is {described.color}", f"a {noun} in {described.color}"]
    return tuple(phrases)


def _counted(described: ObjectSpec, count: int) -> tuple[str, ...]:
    numbers = (str(count), _NUMBER_WORDS[count]) if count < len(_NUMBER_WORDS) else (str(count),)
    nouns = [" ".join((*words, _PLURALS[described.shape])) for words in _adjectives(described)]
    return tuple(f"{number} {noun}" for number in numbers for noun in nouns)


def _adjectives(described: ObjectSpec) -> list[tuple[str, ...]]:
    """Size then color, as English orders them, with the synonyms of the size."""
    color = () if described.color is None else (described.color,)
    if described.size is None:
        return [color]
    return [(size, *color) for size in _SIZE_WORDS[described.size]]


def _is_uniform(spec: SceneSpec) -> bool:
    """Whether one noun phrase names all objects: they are of one kind, and no relation tells them apart."""
    return spec.relation is None and all(described == spec.objects[0] for described in spec.objects)


def _num_phrases(spec: SceneSpec) -> int:
    return 1 if _is_uniform(spec) else len(spec.objects)


def _pick(choices: tuple[str, ...], generator: np.random.Generator) -> str:
    return choices[int(generator.random() * len(choices))]
