"""Training the prior as a command: batches from shards, splits, mismatches, export."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tessera.config import to_plain
from tessera.data.order import sample_keys
from tessera.data.shards import ShardIndex, TokenShards, write_shards
from tessera.errors import UserError
from tessera.model_folder import ModelFolder, write_part, write_tokenizer
from tessera.text_tokenizer import TextTokenizer
from tessera.training.run import TrainerConfig
from transformer.model import PriorConfig, load
from transformer.train import TokenBatches, TrainConfig, split_rows, train

CAPTIONS = [(f"a red star number {i}", "a star") for i in range(40)]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A model folder with something in place of a dvae, and shards made with it."""
    tokenizer = TextTokenizer.train((text for texts in CAPTIONS for text in texts), vocab_size=320)
    write_tokenizer(tmp_path / "model", tokenizer.proto)
    sha256 = write_part(tmp_path / "model", "dvae", config={}, tensors={"weight": torch.zeros(1)})
    index = ShardIndex(
        num_samples=40,
        grid_height=2,
        grid_width=3,
        codebook_size=11,
        image_height=16,
        image_width=24,
        corpus_name="test",
        corpus_fingerprint="c",
        dvae_sha256=sha256,
        tokenizer_sha256=tokenizer.sha256,
        text_len=8,
    )
    codes = np.random.default_rng(0).integers(0, 11, (40, 6))
    write_shards(tmp_path / "shards", codes=[codes], captions=CAPTIONS, index=index)
    return tmp_path


def config_of(project: Path) -> TrainConfig:
    return TrainConfig(
        shards=str(project / "shards"),
        model=PriorConfig(dim=16, depth=1, heads=2),
        trainer=TrainerConfig(max_steps=4, batch_size=4, device="cpu", precision="fp32", validate_every_steps=2),
        validation_share=0.2,
        out=str(project / "model"),
        run_dir=str(project / "run"),
    )


def batches_of(project: Path, **dropout: float) -> TokenBatches:
    shards = TokenShards(project / "shards")
    tokenizer = TextTokenizer(ModelFolder.open(project / "model", parts=["dvae"]).tokenizer_proto())
    rates = {"condition_dropout": 0.0, "bpe_dropout": 0.0} | dropout
    return TokenBatches(shards, np.arange(40), tokenizer, **rates)


def test_it_trains_and_exports_with_the_layout_of_the_shards(project: Path) -> None:
    result = train(config_of(project))
    folder = ModelFolder.open(project / "model", parts=["dvae", "prior"])
    prior = load(folder)
    assert (prior.layout.text_len, prior.layout.grid_height, prior.layout.grid_width) == (8, 2, 3)
    assert prior.layout.codebook_size == 11
    assert folder.part_sha256("prior") == result["sha256"]
    assert {"val_image_loss", "val_text_loss", "val_caption_gap"} <= set(result["metrics"])
    assert train(config_of(project)) == result


def test_shards_of_another_dvae_are_refused_by_name(project: Path) -> None:
    write_part(project / "model", "dvae", config=to_plain(PriorConfig()), tensors={"weight": torch.ones(1)})
    with pytest.raises(UserError, match="encoded with another dvae"):
        train(config_of(project))


def test_condition_dropout_leaves_the_empty_caption(project: Path) -> None:
    source = batches_of(project, condition_dropout=0.5)
    text_ids = source.batch(sample_keys(0, 400, size=40, seed=0))["text_ids"]
    null = source.tokenizer.encode_batch([""], text_len=8)
    share = (text_ids == null).all(dim=1).float().mean()
    assert 0.4 < float(share) < 0.6


def test_a_draw_is_a_function_of_its_key(project: Path) -> None:
    source = batches_of(project, condition_dropout=0.2, bpe_dropout=0.3)
    keys = sample_keys(0, 12, size=40, seed=3)
    whole = source.batch(keys)
    for place, key in enumerate(keys):
        alone = source.batch([key])
        assert torch.equal(alone["text_ids"][0], whole["text_ids"][place])
        assert torch.equal(alone["codes"][0], whole["codes"][place])


def test_bpe_dropout_splits_a_caption_in_many_ways(project: Path) -> None:
    source = batches_of(project, bpe_dropout=0.5)
    keys = [key for key in sample_keys(0, 400, size=40, seed=0) if key.index == 0]
    assert len({tuple(row) for row in source.batch(keys)["text_ids"].tolist()}) > 2


def test_held_out_rows_are_never_trained_on() -> None:
    training, held_out = split_rows(1000, 0.1)
    assert len(held_out) == 100
    assert not set(training) & set(held_out)
    assert len(training) + len(held_out) == 1000
    assert len(split_rows(19, 0.5)[1]) == 0


def test_shares_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"condition_dropout must lie in \[0, 1\); got 1.5"):
        replace(TrainConfig(), condition_dropout=1.5)
