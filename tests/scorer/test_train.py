"""Training tells pairs apart that differ only in who has which color, and what it exports is what it trained."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scorer.model import ClipScorerConfig, load
from scorer.train import TrainConfig, fitted_config, main, train, train_scorer
from tessera.errors import UserError
from tessera.model_folder import ModelFolder
from tessera.text_tokenizer import TextTokenizer
from tessera.training.optim import OptimizerConfig
from tessera.training.run import TrainerConfig

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
TINY = ClipScorerConfig(
    patch_size=8, stem_width=16, dim=32, heads=2, image_layers=1, text_layers=1, matcher_layers=1, embedding_dim=16
)


def two_sided(sides: list[tuple[str, str]]) -> tuple[NDArray[np.uint8], list[tuple[str, ...]]]:
    """Images with one color on the left and one on the right, and captions that say which."""
    images = np.zeros((len(sides), 16, 16, 3), np.uint8)
    for image, (left, right) in zip(images, sides, strict=True):
        image[:, :8], image[:, 8:] = COLORS[left], COLORS[right]
    return images, [(f"{left} to the left of {right}", f"{right} to the right of {left}") for left, right in sides]


PAIRS = list(itertools.product(COLORS, COLORS))  # 16: each with its mirror image


def configured(**changes: object) -> TrainConfig:
    trainer = TrainerConfig(
        max_steps=120, batch_size=16, device="cpu", precision="fp32", validate_every_steps=60, log_every_steps=20
    )
    arguments: dict = {"model": TINY, "trainer": trainer, "optim": OptimizerConfig(learning_rate=3e-2), **changes}
    return TrainConfig(**arguments)


def test_sixteen_pairs_with_swapped_colors_are_learned_by_heart(tmp_path: Path) -> None:
    images, captions = two_sided(PAIRS)
    tokenizer = TextTokenizer.train([text for texts in captions for text in texts], vocab_size=300)
    result = train_scorer(images, captions, tokenizer, config=configured(), run_dir=tmp_path)
    assert result.steps == 120
    assert result.metrics["best_of_16"] == 1.0
    assert result.metrics["text_to_image"] >= 0.5
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    for row, (left, right) in enumerate(PAIRS):
        scores = result.scorer.score(pixels, [f"{right} to the right of {left}"] * 16)
        assert int(scores.argmax()) == row


def test_blank_captions_and_three_pairs_are_trained_on(tmp_path: Path) -> None:
    images, _ = two_sided(PAIRS[:3])
    captions: list[tuple[str, ...]] = [("",), (" ", "red"), ("",)]
    tokenizer = TextTokenizer.train(["red"], vocab_size=300)
    config = configured()
    config = replace(config, trainer=replace(config.trainer, max_steps=2))
    result = train_scorer(images, captions, tokenizer, config=config, run_dir=tmp_path)
    assert all(torch.isfinite(parameter).all() for parameter in result.scorer.model.parameters())
    with pytest.raises(UserError, match="at least 2 captioned images, got 1"):
        train_scorer(images[:1], captions[:1], tokenizer, config=config, run_dir=tmp_path / "one")


def test_reconstructions_are_seen_in_training(tmp_path: Path) -> None:
    images, captions = two_sided(PAIRS)
    tokenizer = TextTokenizer.train([text for texts in captions for text in texts], vocab_size=300)
    config = configured()
    config = replace(config, trainer=replace(config.trainer, max_steps=2), reconstruction_share=1.0)
    gray = np.full_like(images, 128)

    def reconstruct(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return gray[rows]

    plain = train_scorer(images, captions, tokenizer, config=config, run_dir=tmp_path / "plain")
    mixed = train_scorer(
        images, captions, tokenizer, config=config, run_dir=tmp_path / "mixed", reconstruct=reconstruct
    )
    first, second = (result.scorer.model.image_stem.from_pixels.weight for result in (plain, mixed))
    assert not torch.equal(first, second)


def test_large_images_get_larger_patches() -> None:
    tokenizer = TextTokenizer.train(["a star"], vocab_size=300)
    sizes = {size: fitted_config(TINY, (size, 2 * size), [("a star",)], tokenizer) for size in (16, 64, 256)}
    assert [config.patch_size for config in sizes.values()] == [8, 8, 32]
    assert all(config.num_patches <= 144 for config in sizes.values())
    assert sizes[64].image_size == (64, 128)
    assert sizes[64].text_vocab_size == tokenizer.vocab_size


def test_the_command_exports_a_part_that_loads_and_runs_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        "data.path=scenes",
        "data.limit=40",
        "data.image_size=[32,32]",
        *(f"model.{name}={getattr(TINY, name)}" for name in ("stem_width", "dim", "heads", "embedding_dim")),
        "trainer.max_steps=3",
        "trainer.batch_size=16",
        "trainer.device=cpu",
        "trainer.precision=fp32",
        f"out={tmp_path / 'model'}",
        f"run_dir={tmp_path / 'run'}",
    ]
    assert main(settings) == 0
    assert "scorer in" in capsys.readouterr().out
    folder = ModelFolder.open(tmp_path / "model")
    assert folder.requires("scorer") == {"tokenizer": folder.tokenizer_sha256}
    assert folder.metadata("scorer")["measured"].keys() == {"image_to_text", "text_to_image", "best_of_16"}
    scores = load(folder).score(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), ["a red star", ""])
    assert scores.isfinite().all()
    before = folder.part_sha256("scorer")
    assert main(settings) == 0  # finished: nothing is trained again
    assert ModelFolder.open(tmp_path / "model").part_sha256("scorer") == before


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="num_captions"):
        TrainConfig(num_captions=0)
    with pytest.raises(UserError, match="blind_share"):
        TrainConfig(blind_share=1.5)


def test_a_corpus_that_is_not_there_is_the_users_mistake(tmp_path: Path) -> None:
    config = replace(configured(), out=str(tmp_path / "model"))
    with pytest.raises(UserError, match="no data"):
        train(replace(config, data=replace(config.data, path=str(tmp_path / "nowhere"))))
