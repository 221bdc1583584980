"""Files that say how they were made, under names that never cover another image."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sampling.saving
from sampling.outpainting import Margins
from sampling.pictures import Tile, contact_sheet
from sampling.pipeline import Pipeline
from sampling.saving import description, free_path, parameters_text, read_metadata, save_image, save_sheet, slug
from sampling.settings import SamplingSettings
from tessera.data.images import read_png_text, save_png


def test_png_metadata_make_a_round_trip(pipeline: Pipeline, tmp_path: Path) -> None:
    (image,) = pipeline('Звезда: a "red" star, 50%', seed=3, temperature=0.5, on_warning=print)
    path = save_image(image, tmp_path, model_name="tiny")
    assert path.name.startswith("звезда")
    metadata = read_metadata(path)
    assert metadata is not None
    assert {name: metadata[name] for name in description(image)} == description(image)
    assert SamplingSettings(**metadata["settings"]) == image.settings
    assert metadata["settings"]["temperature"] == 0.5 and metadata["scores"]["clip"] == image.scores["clip"]
    assert np.array_equal(np.asarray(Image.open(path)), image.image)
    parameters = read_png_text(path)["parameters"].splitlines()
    assert parameters[0] == 'Звезда: a "red" star, 50%'
    assert parameters[1] == "Negative prompt: "
    for field in ("Seed: 3", "Size: 24x16", f"Model hash: {image.model_sha256[:12]}", "CFG scale: 2.0", "Model: tiny"):
        assert field in parameters[2].split(", ")


def test_a_schedule_is_named_only_where_it_is_not_the_default(pipeline: Pipeline) -> None:
    (plain,) = pipeline("a red star")
    assert set(description(plain)["settings"]) == {"guidance", "temperature", "top_k", "top_p", "min_p"}
    assert "schedule" not in parameters_text(plain)
    (scheduled,) = pipeline("a red star", guidance_schedule="power-cosine", guidance_power=2.0, guidance_threshold=1.5)
    settings = description(scheduled)["settings"]
    assert SamplingSettings(**settings) == scheduled.settings
    assert settings["guidance_schedule"] == "power-cosine"
    text = parameters_text(scheduled)
    assert "Guidance schedule: power-cosine, Guidance power: 2.0, Guidance threshold: 1.5" in text


def test_edits_are_part_of_the_recipe(pipeline: Pipeline, photo: Image.Image, tmp_path: Path) -> None:
    images = [
        *pipeline("x", init=photo, keep_rows=2),
        *pipeline("x", init=photo, keep_rows=3),
        *pipeline.outpaint("x", init=photo, margins=Margins(right=1)),
    ]
    paths = [save_image(image, tmp_path) for image in images]
    assert [path.name for path in paths] == ["x-0-0.png", "x-0-0-2.png", "x-0-0-3.png"]
    for image, path in zip(images, paths, strict=True):
        metadata = read_metadata(path)
        assert metadata is not None and metadata["edit"] == image.edit
        assert save_image(image, tmp_path) == path, "the same recipe takes the same place"


def test_images_of_a_grid_are_named_by_what_tells_them_apart(pipeline: Pipeline, tmp_path: Path) -> None:
    axes: dict[str, Sequence[Any]] = {"guidance_schedule": ["linear"], "temperature": [0.25, 1.0]}
    images = pipeline.grid("a red star", axes=axes, seed=4)
    assert [save_image(image, tmp_path, axes=list(axes)).name for image in images] == [
        "a-red-star-4-0-guidance_schedule-linear-temperature-0.25.png",
        "a-red-star-4-0-guidance_schedule-linear-temperature-1.png",
    ]


@pytest.mark.parametrize(
    ("axes", "columns", "captions"),
    [
        ({"guidance": [1.0, 2.5, 3.0]}, 3, ["guidance 1", "guidance 2.5", "guidance 3"]),
        (
            {"top_p": [0.5, 1.0], "top_k": [0, 1, 2]},
            3,
            [f"top_p {p}, top_k {k}" for p in ("0.5", "1") for k in (0, 1, 2)],
        ),
        (
            {"guidance": [1.0, 2.0], "top_k": [0, 1], "top_p": [0.5, 1.0]},
            4,
            [f"guidance {w}, top_k {k}, top_p {p}" for w in (1, 2) for k in (0, 1) for p in ("0.5", "1")],
        ),
    ],
)
def test_the_sheet_of_a_grid_has_a_row_for_each_value_of_the_first_setting(
    pipeline: Pipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    axes: dict[str, Sequence[Any]],
    columns: int,
    captions: list[str],
) -> None:
    seen: list[tuple[int | None, list[str]]] = []

    def spy(tiles: Sequence[Tile], *, columns: int | None = None, title: str = "") -> Image.Image:
        seen.append((columns, [tile.caption for tile in tiles]))
        return contact_sheet(tiles, columns=columns, title=title)

    monkeypatch.setattr(sampling.saving, "contact_sheet", spy)
    path = save_sheet(pipeline.grid("a red star", axes=axes), tmp_path, axes=axes)
    assert seen == [(columns, captions)]
    height, width, _ = np.asarray(Image.open(path)).shape
    assert (width - 2 * 24 + 16) // (192 + 16) == columns
    assert (width > height) == (columns > len(captions) // columns)


def test_a_foreign_file_of_that_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("not an image")
    assert free_path(tmp_path, "x", same={}).name == "x-2.png"
    save_png(tmp_path / "x-2.png", np.zeros((8, 8, 3), dtype=np.uint8), {"tessera": "[1]"})
    assert free_path(tmp_path, "x", same={}).name == "x-3.png"


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red star, left of a ring!", "a-red-star-left-of-a-ring"),
        ("", "image"),
        ("../../etc/passwd", "etc-passwd"),
        ("赤い星", "赤い星"),
        ("🌟", "image"),
        ("x" * 500, "x" * 80),
    ],
)
def test_a_prompt_becomes_a_short_safe_file_name(prompt: str, name: str) -> None:
    assert slug(prompt) == name
    assert len(slug("é" * 300).encode()) <= 80


def test_the_metadata_of_an_unreadable_score_are_still_json(pipeline: Pipeline, tmp_path: Path) -> None:
    (image,) = pipeline("a red star")
    path = save_image(dataclasses.replace(image, scores={"clip": float("nan")}), tmp_path)
    metadata = read_metadata(path)
    assert metadata is not None and metadata["scores"] == {"clip": None}
