"""Copies of training pictures are found, also weak ones, and pictures that are merely of the kind are not."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from recipes.memorization import COPY_RATIO, Pair, Thumbnails, memorization, memorization_line, nearest_sheet
from tessera.data.config import DataConfig
from tessera.data.corpus import Corpus
from tessera.data.scenes import ScenesCorpus, render, sample_scene


def scenes(count: int, *, first: int = 0) -> NDArray[np.uint8]:
    return np.stack([render(sample_scene(0, first + index)[1], (32, 32)) for index in range(count)])


def noisy(images: NDArray[np.uint8], gray_levels: float) -> NDArray[np.uint8]:
    noise = np.random.default_rng(0).normal(0, gray_levels, images.shape)
    return (images + noise).clip(0, 255).astype(np.uint8)


def thumbnails_of(images: NDArray[np.uint8]) -> Thumbnails:
    thumbnails = Thumbnails()
    thumbnails.add(images)
    return thumbnails


def test_noisy_copies_are_told_from_other_pictures_of_the_kind() -> None:
    training = scenes(500)
    thumbnails = thumbnails_of(training)
    copies = thumbnails.nearest(noisy(training[:60], 8.0))
    assert copies.index.tolist() == list(range(60))
    assert copies.is_copy.all()
    others = thumbnails.nearest(scenes(60, first=500))
    assert others.is_copy.mean() <= 0.02
    assert 0.7 < np.median(others.ratio) < 1.4, "about as far as pictures of the kind are from each other"


@pytest.mark.parametrize("at_once", [7, 1000])
def test_the_nearest_is_that_of_a_plain_search(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr("recipes.memorization._AT_ONCE", at_once)
    draw = np.random.default_rng(0)
    pictures, wanted = (draw.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8) for count in (300, 20))
    thumbnails = Thumbnails()
    for start in range(0, 300, 40):
        thumbnails.add(pictures[start : start + 40])
    assert len(thumbnails) == 300
    found = thumbnails.nearest(wanted)
    distances = np.sqrt(((wanted[:, None].astype(float) - pictures) ** 2).mean(axis=(2, 3, 4)))  # [20, 300]
    assert found.index.tolist() == distances.argmin(axis=1).tolist()
    np.testing.assert_allclose(found.distance, distances.min(axis=1))
    own = pictures[found.index].astype(float)
    around = np.sort(np.sqrt(((own[:, None] - pictures) ** 2).mean(axis=(2, 3, 4))), axis=1)[:, 1:6]
    np.testing.assert_allclose(found.ratio, distances.min(axis=1) / around.mean(axis=1))


def test_a_copy_of_a_picture_that_the_corpus_has_many_times_is_one() -> None:
    training = scenes(100)
    again = noisy(training[[5] * 12], 3.0)
    copy = noisy(training[5:6], 8.0)
    assert thumbnails_of(np.concatenate([training, again])).nearest(copy).is_copy.all()


def test_pictures_are_compared_whatever_their_size() -> None:
    small = scenes(3)
    large = small.repeat(2, axis=1).repeat(2, axis=2)
    found = thumbnails_of(small).nearest(large)
    assert found.index.tolist() == [0, 1, 2] and found.distance.tolist() == [0.0, 0.0, 0.0]


def test_a_picture_without_neighbors_is_measured_in_what_can_hardly_be_seen() -> None:
    gray = np.full((1, 16, 16, 3), 100, np.uint8)
    thumbnails = thumbnails_of(gray)
    assert thumbnails.nearest(gray + np.uint8(6)).ratio.tolist() == [1.5]
    assert thumbnails.nearest(gray).is_copy.all()


def test_wrong_pictures_and_empty_collections_are_refused() -> None:
    with pytest.raises(ValueError, match="among no pictures"):
        Thumbnails().nearest(scenes(1))
    with pytest.raises(ValueError, match=r"expected uint8 images \[n, H, W, 3\]; got float64"):
        Thumbnails().add(np.zeros((1, 16, 16, 3)))  # type: ignore[arg-type]


class Parrot:
    """In place of a pipeline: draws training pictures for captions that it knows, and new scenes for all others."""

    vae = precision = None

    def __init__(self, training: Corpus) -> None:
        self.known = {training.captions(index)[0]: training.image(index) for index in range(len(training))}

    def __call__(self, captions: Sequence[str], *, seed: range, **_: Any) -> list[SimpleNamespace]:
        assert len(seed) == len(captions)
        new = iter(scenes(len(captions), first=10_000))
        return [SimpleNamespace(image=self.known[text] if text in self.known else next(new)) for text in captions]


def test_the_share_of_copies_is_told_by_where_the_captions_are_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "recipes.memorization.reconstruct", lambda vae, images, precision: SimpleNamespace(images=noisy(images, 3.0))
    )
    training = ScenesCorpus(300, image_size=(32, 32))
    held_out = ScenesCorpus(40, image_size=(32, 32), split="validation")
    parrot = Parrot(training)
    told: list[tuple[int, int]] = []
    figures, sheet = memorization(
        parrot,  # type: ignore[arg-type]
        training,
        held_out,
        samples=40,
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1] == (300, 300)
    assert figures["samples"] == 40 and figures["training_pictures"] == 300
    assert figures["of_training_captions"] == 1.0
    assert figures["of_held_out_captions"] <= 0.2, "scenes have few words, some of these captions are training's"
    assert figures["share"] == pytest.approx((figures["of_training_captions"] + figures["of_held_out_captions"]) / 2)
    assert figures["of_held_out_pictures"] <= 0.05 and figures["usual_ratio"] > 2 * COPY_RATIO
    assert "copies  " in memorization_line(figures)
    assert sheet.dtype == np.uint8 and sheet.shape[2] == 3


def test_pictures_that_are_trained_on_are_no_baseline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        "recipes.memorization.reconstruct", lambda vae, images, precision: SimpleNamespace(images=noisy(images, 3.0))
    )
    for index, picture in enumerate(scenes(6)):
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"scene {index}")
    data = DataConfig(path=str(tmp_path), image_size=(32, 32))
    training = data.open("train")
    figures, _ = memorization(Parrot(training), training, data.open("validation"), samples=40)  # type: ignore[arg-type]
    assert figures["training_pictures"] == 6 and figures["samples"] == 12
    assert figures["share"] == figures["of_training_captions"] == 1.0, "a parrot is one nevertheless"
    assert figures["of_held_out_captions"] is figures["of_held_out_pictures"] is figures["usual_ratio"] is None
    line = memorization_line(figures)
    assert "100.0% of 12 samples; " in line and "no baseline: all pictures are trained on" in line
    json.dumps(figures)


def test_a_picture_that_a_corpus_holds_twice_does_not_take_away_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "recipes.memorization.reconstruct", lambda vae, images, precision: SimpleNamespace(images=images)
    )
    training = ScenesCorpus(30, image_size=(32, 32))
    held_out = ScenesCorpus(10, image_size=(32, 32), split="validation")
    picture = held_out.image
    monkeypatch.setattr(held_out, "image", lambda index: picture(index) if index else training.image(7))
    figures, _ = memorization(Parrot(training), training, held_out, samples=20)  # type: ignore[arg-type]
    assert figures["of_held_out_pictures"] == 0.1 and "no_baseline" not in figures


def test_the_sheet_has_the_pairs_side_by_side() -> None:
    red, blue = np.zeros((2, 16, 16, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    sheet = nearest_sheet([Pair(red, "a red one", blue, "a blue one", 1.0)], title="", tile_pixels=16)
    is_red, is_blue = (np.argwhere((sheet == color).all(axis=2)) for color in ([255, 0, 0], [0, 0, 255]))
    assert len(is_red) == len(is_blue) == 256
    assert is_red[:, 1].max() < is_blue[:, 1].min()
