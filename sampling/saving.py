"""Images as PNG files that say how they were made, under names that never cover another image."""

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tessera
from sampling.generated_image import GeneratedImage
from sampling.pictures import Tile, contact_sheet
from sampling.settings import SamplingSettings
from tessera.data.images import ImageError, read_png_text, save_png
from tessera.model_folder import short_sha256

METADATA_KEY = "tessera"
_SLUG_BYTES = 80  # of a prompt, and of settings; leaves room for seed, index and counter in the 255 of a file name
# Settings that files name only where they are not the default: how guidance grows along an image.
_SCHEDULE_FIELDS = {
    "guidance_schedule": "Guidance schedule",
    "guidance_power": "Guidance power",
    "guidance_threshold": "Guidance threshold",
}
_MAX_PROMPT_COLUMNS = 8


def save_image(image: GeneratedImage, folder: Path, *, model_name: str = "", axes: Sequence[str] = ()) -> Path:
    """Write one image as PNG with its recipe, scores and an A1111-readable `parameters` text.

    The same recipe writes the same file again; a file that holds anything else is left alone and the name numbered.

    Args:
        image: what the pipeline returned.
        folder: where to write; must exist.
        model_name: for the `parameters` text.
        axes: the settings in which images of a grid differ; they become part of the name.

    Returns:
        The path written: <slug of the prompt>-<seed>-<image index>.png, or with -2, -3, ... before the suffix.
    """
    stem = f"{slug(image.prompt)}-{image.seed}-{image.image_index}"
    if axes:
        values = "-".join(f"{name}-{_setting(image, name)}" for name in axes)
        stem = f"{stem}-{values[:_SLUG_BYTES]}"  # all ASCII
    text = {
        METADATA_KEY: json.dumps(
            {"kind": "image", "tessera": tessera.__version__, **description(image)}, ensure_ascii=False
        ),
        "parameters": parameters_text(image, model_name=model_name),
    }
    path = free_path(folder, stem, same={"kind": "image", **_without_default_schedule(image.recipe())})
    save_png(path, image.image, text)
    return path


def save_sheet(
    images: Sequence[GeneratedImage], folder: Path, *, axes: Mapping[str, Sequence[Any]] | None = None
) -> Path:
    """Write a contact sheet as sheet-<slug of the first prompt>-<seed>.png.

    Args:
        images: at least one, all of one size.
        folder: where to write; must exist.
        axes: the settings of a grid and their values. There is one row for each value of the first; a grid of one
            setting is one row.

    Returns:
        The path written.

    Raises:
        UserError: the sheet would be too large; see `contact_sheet`.
    """
    prompts = list(dict.fromkeys(image.prompt for image in images))
    one_prompt = len(prompts) == 1

    def caption(image: GeneratedImage) -> str:
        if axes:
            return ", ".join(f"{name} {_setting(image, name)}" for name in axes)
        return "" if one_prompt else image.prompt or "(no prompt)"

    tiles = [Tile(image.image, caption(image), _note(image, with_seed=one_prompt and not axes)) for image in images]
    title = (prompts[0] or "(no prompt)") if one_prompt else f"{len(images)} images for {len(prompts)} prompts"
    columns = None
    if axes:
        first, *others = [len(values) for values in axes.values()]
        columns = math.prod(others) if others else first
    elif not one_prompt and len(images) % len(prompts) == 0 and len(images) > len(prompts):
        columns = min(_MAX_PROMPT_COLUMNS, len(images) // len(prompts))  # one row per prompt
    sheet = contact_sheet(tiles, columns=columns, title=title)
    same = {"kind": "contact sheet", "images": [_without_default_schedule(image.recipe()) for image in images]}
    text = {METADATA_KEY: json.dumps({**same, "tessera": tessera.__version__}, ensure_ascii=False)}
    path = free_path(folder, f"sheet-{slug(prompts[0])}-{images[0].seed}", same=same)
    save_png(path, np.asarray(sheet), text)
    return path


def description(image: GeneratedImage) -> dict[str, Any]:
    """What files and `--json` say of an image, as plain values."""
    return _without_default_schedule(image.description())


def read_metadata(path: Path) -> dict[str, Any] | None:
    """What `save_image` or `save_sheet` wrote into a PNG; None if the file is not one of theirs."""
    try:
        content = json.loads(read_png_text(path).get(METADATA_KEY, "null"))
    except (ImageError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def free_path(folder: Path, stem: str, *, same: dict[str, Any]) -> Path:
    """The first of stem.png, stem-2.png, ... that does not exist, or whose metadata agree with `same`."""
    number = 1
    while True:
        path = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        if not path.exists():
            return path
        found = read_metadata(path)
        if found is not None and {key: found.get(key) for key in same} == json.loads(json.dumps(same)):
            return path
        number += 1


def slug(prompt: str) -> str:
    """A prompt as a file name: its words in lower case, joined by hyphens, in any script, at most 80 bytes."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", prompt).lower())
    joined = "-".join(words).encode()[:_SLUG_BYTES].decode(errors="ignore")  # a character cut in two is dropped
    return joined.strip("-_") or "image"


def parameters_text(image: GeneratedImage, *, model_name: str = "") -> str:
    """The recipe in the form that the Stable Diffusion web UI writes, which many viewers show and search."""
    height, width, _ = image.image.shape
    settings = image.settings
    schedule = _without_default_schedule(image.recipe())["settings"]
    fields = {
        "Steps": image.codes.size,
        "Sampler": "tessera",
        "CFG scale": settings.guidance,
        **{label: schedule[name] for name, label in _SCHEDULE_FIELDS.items() if name in schedule},
        "Seed": image.seed,
        "Size": f"{width}x{height}",
        "Model hash": short_sha256(image.model_sha256),
        **({"Model": model_name} if model_name else {}),
        "Image index": image.image_index,
        "Temperature": settings.temperature,
        "Top-k": settings.top_k,
        "Top-p": settings.top_p,
        "Min-p": settings.min_p,
        "Version": f"tessera {tessera.__version__}",
    }
    return f"{image.prompt}\nNegative prompt: \n" + ", ".join(f"{name}: {value}" for name, value in fields.items())


def _without_default_schedule(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe or description whose settings name a schedule only where there is one to name."""
    default = SamplingSettings()
    settings = {
        name: value
        for name, value in values["settings"].items()
        if name not in _SCHEDULE_FIELDS or value != getattr(default, name)
    }
    return {**values, "settings": settings}


def _setting(image: GeneratedImage, name: str) -> str:
    value = getattr(image.settings, name)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _note(image: GeneratedImage, *, with_seed: bool) -> str:
    parts = [f"seed {image.seed} / {image.image_index}"] if with_seed else []
    if image.scorer is not None:
        parts.append(f"{image.scorer} {image.scores[image.scorer]:.2f}")
    return ", ".join(parts)
