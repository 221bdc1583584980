"""What a prior draws while it trains: always the same captions, in little time, and without a trace in training."""

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from dvae.model import DiscreteVAE, DiscreteVAEConfig
from recipes.memorization import Pair
from recipes.samples import SamplePainter, prior_painter
from sampling.decode import sample_codes
from tessera.config import to_plain
from tessera.data.shards import ShardIndex, ShardWriter, TokenShards
from tessera.model_folder import ModelFolder, write_part, write_tokenizer
from tessera.text_tokenizer import TextTokenizer
from tessera.training.run import TrainerConfig
from transformer.model import Prior, PriorConfig
from transformer.train import TrainConfig, layout_of, split_rows, train

CAPTIONS = [(f"a red star number {i}", "a star") for i in range(40)]


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A dVAE with random weights, shards of random codes, and a small prior to train on them."""
    folder = tmp_path / "model"
    vae = DiscreteVAE(DiscreteVAEConfig(levels=(5, 3), patch_size=4, widths=(8, 8), blocks=(1, 1)))
    write_part(folder, "dvae", config=to_plain(vae.config), tensors=vae.state_dict())
    write_tokenizer(folder, TextTokenizer.train((text for texts in CAPTIONS for text in texts), vocab_size=320).proto)
    opened = ModelFolder.open(folder, parts=["dvae"])
    index = ShardIndex(
        num_samples=len(CAPTIONS),
        grid_height=2,
        grid_width=3,
        codebook_size=vae.codebook_size,
        image_height=16,
        image_width=24,
        corpus_name="test",
        corpus_fingerprint="c",
        dvae_sha256=opened.part_sha256("dvae"),
        tokenizer_sha256=opened.tokenizer_sha256,
        text_len=8,
    )
    codes = np.random.default_rng(0).integers(0, vae.codebook_size, (len(CAPTIONS), 1, 2, 3))
    with ShardWriter(tmp_path / "shards", index) as writer:
        writer.append(codes, CAPTIONS)
    return TrainConfig(
        shards=str(tmp_path / "shards"),
        model=PriorConfig(dim=16, depth=1, heads=2),
        trainer=TrainerConfig(max_steps=4, batch_size=4, device="cpu", precision="fp32", validate_every_steps=2),
        validation_share=0.3,
        out=str(folder),
        run_dir=str(tmp_path / "run"),
    )


def prior_of(config: TrainConfig) -> Prior:
    shards = TokenShards(Path(config.shards))
    tokenizer = TextTokenizer(ModelFolder.open(config.out, parts=["dvae"]).tokenizer_proto())
    return Prior(replace(config.model, layout=layout_of(shards, tokenizer)))


def pictures(config: TrainConfig) -> list[str]:
    return sorted(path.name for path in (Path(config.run_dir) / "pictures").glob("*"))


class Pairs:
    """Keeps what the sheets show, in place of drawing them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown: list[list[Pair]] = []
        monkeypatch.setattr("recipes.samples.nearest_sheet", self._keep)

    def _keep(self, pairs: Sequence[Pair], *, title: str) -> NDArray[np.uint8]:
        self.shown.append(list(pairs))
        return np.zeros((1, 1, 3), np.uint8)


def test_training_is_the_same_to_the_last_bit_with_pictures_and_without(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.samples._SHARE_OF_TIME", 1.0)
    plain = train(replace(config, run_dir=f"{config.run_dir}-plain"))
    shown = train(config, show=prior_painter(config))
    assert shown["sha256"] == plain["sha256"]
    assert {name: value for name, value in shown["metrics"].items() if "loss" in name} == {
        name: value for name, value in plain["metrics"].items() if "loss" in name
    }
    assert pictures(config) == ["samples-000000002.png", "samples-000000004.png"]


def test_drawing_leaves_random_numbers_weights_and_mode_alone(config: TrainConfig) -> None:
    prior = prior_of(config).train()
    weights = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    states = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    sheet = prior_painter(config)(7, prior)
    assert sheet is not None
    assert np.array_equal(np.asarray(Image.open(Path(config.run_dir) / "pictures" / "samples-000000007.png")), sheet)
    assert random.getstate() == states[0]
    np.testing.assert_equal(np.random.get_state(legacy=False), states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in prior.state_dict().items())
    assert prior.training and all(weight.requires_grad and weight.grad is None for weight in prior.parameters())


def test_equal_weights_draw_equal_sheets_for_captions_held_out(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.samples._SHARE_OF_TIME", 1e9)
    kept = Pairs(monkeypatch)
    prior = prior_of(config)
    painter = prior_painter(config)
    for step in (1, 2):
        painter(step, prior)
    first, second = kept.shown
    assert len(first) == len(second) == 8
    for one, other in zip(first, second, strict=True):
        assert one.caption == other.caption and np.array_equal(one.sample, other.sample)
    _, held_out = split_rows(len(CAPTIONS), config.validation_share)
    captions = [pair.caption for pair in first]
    assert set(captions) <= {CAPTIONS[row][0] for row in held_out} and len(set(captions)) == 8
    trained = {CAPTIONS[row][0] for row in range(len(CAPTIONS))} - {CAPTIONS[row][0] for row in held_out}
    assert {pair.nearest_caption for pair in first} <= trained


def test_a_training_picture_that_is_drawn_is_found(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.samples._SHARE_OF_TIME", 1e9)
    kept = Pairs(monkeypatch)
    codes = TokenShards(Path(config.shards)).codes
    row = int(split_rows(len(CAPTIONS), config.validation_share)[0][3])

    def copying(decoder: Any, text_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(codes=torch.from_numpy(codes[[row] * len(text_ids), 0].astype(np.int64)))

    monkeypatch.setattr("recipes.samples.sample_codes", copying)
    prior_painter(config)(1, prior_of(config))
    (pairs,) = kept.shown
    assert {pair.nearest_caption for pair in pairs} == {CAPTIONS[row][0]}
    assert all(pair.ratio == 0.0 and np.array_equal(pair.sample, pair.nearest) for pair in pairs)


def test_drawing_takes_a_small_share_of_the_time(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Pairs(monkeypatch)
    now = 0.0
    monkeypatch.setattr("recipes.samples.time", SimpleNamespace(monotonic=lambda: now))
    painter, prior = prior_painter(config), prior_of(config)

    def slowly(decoder: Any, text_ids: torch.Tensor, **options: Any) -> Any:
        nonlocal now
        now += 10.0 * len(text_ids)
        return sample_codes(decoder, text_ids, **options)

    monkeypatch.setattr("recipes.samples.sample_codes", slowly)
    drawn = {}
    for step in range(1, 31):
        now = max(now, 100.0 * step)
        before = len(kept.shown)
        painter(step, prior)
        if len(kept.shown) > before:
            drawn[step] = len(kept.shown[-1])
    assert drawn[1] == 1, "how long one takes is not known before"
    assert sum(drawn.values()) * 10.0 <= 0.05 * now
    assert sum(drawn.values()) * 10.0 >= 0.03 * now


def test_errors_cost_a_picture_and_not_the_run(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full_disk(path: Path, *_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("recipes.samples._SHARE_OF_TIME", 1.0)
    monkeypatch.setattr("recipes.samples.save_png", full_disk)
    with caplog.at_level(logging.WARNING):
        result = train(config, show=prior_painter(config))
    assert result["steps"] == 4
    assert "no samples were drawn at step 2: OSError: no space left on device" in caplog.text
    assert "at step 4" in caplog.text


def test_without_held_out_samples_captions_of_training_are_shown(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Pairs(monkeypatch)
    painter: SamplePainter = prior_painter(replace(config, validation_share=0.0))
    painter(1, prior_of(config))
    assert kept.shown[0][0].caption in {texts[0] for texts in CAPTIONS}


def test_guidance_needs_a_prior_that_knows_the_empty_caption(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []

    def watching(decoder: Any, text_ids: torch.Tensor, *, settings: Any, **_: Any) -> SimpleNamespace:
        used.append(settings.guidance)
        return SimpleNamespace(codes=torch.zeros(len(text_ids), 6, dtype=torch.int64))

    monkeypatch.setattr("recipes.samples.sample_codes", watching)
    for condition_dropout in (0.1, 0.0):
        prior_painter(replace(config, condition_dropout=condition_dropout))(1, prior_of(config))
    assert used[0] > 1.0 and used[-1] == 1.0
