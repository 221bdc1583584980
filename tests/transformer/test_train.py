"""Training the prior as a command: batches from shards, splits, mismatches, export."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tessera.config import load as load_config
from tessera.config import to_plain
from tessera.data.order import sample_keys
from tessera.data.shards import ShardIndex, ShardWriter, TokenShards
from tessera.errors import UserError
from tessera.model_folder import ModelFolder, write_part, write_tokenizer
from tessera.text_tokenizer import TextTokenizer
from tessera.training.run import TrainerConfig
from transformer.attention import AttentionConfig
from transformer.model import PriorConfig, load
from transformer.train import TokenBatches, TrainConfig, split_rows, train, validation_batches

CAPTIONS = [(f"a red star number {i}", "a star") for i in range(40)]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A model folder with something in place of a dvae, and shards made with it."""
    write_part(tmp_path / "model", "dvae", config={}, tensors={"weight": torch.zeros(1)})
    write_tokenizer(
        tmp_path / "model", TextTokenizer.train((text for texts in CAPTIONS for text in texts), vocab_size=320).proto
    )
    encode(tmp_path, np.random.default_rng(0).integers(0, 11, (40, 1, 2, 3)))
    return tmp_path


def encode(project: Path, codes: np.ndarray) -> None:
    """Writes codes [40, V, 2, 3] as the shards of the project."""
    folder = ModelFolder.open(project / "model", parts=["dvae"])
    index = ShardIndex(
        num_samples=40,
        grid_height=2,
        grid_width=3,
        codebook_size=11,
        image_height=16,
        image_width=24,
        crops=codes.shape[1],
        corpus_name="test",
        corpus_fingerprint="c",
        dvae_sha256=folder.part_sha256("dvae"),
        tokenizer_sha256=folder.tokenizer_sha256,
        text_len=8,
    )
    with ShardWriter(project / "shards", index) as writer:
        writer.append(codes, CAPTIONS)


def config_of(project: Path) -> TrainConfig:
    return TrainConfig(
        shards=str(project / "shards"),
        model=PriorConfig(dim=16, depth=1, heads=2),
        trainer=TrainerConfig(max_steps=4, batch_size=4, device="cpu", precision="fp32", validate_every_steps=2),
        validation_share=0.2,
        out=str(project / "model"),
        run_dir=str(project / "run"),
    )


def batches_of(project: Path, *, condition_dropout: float = 0.0, bpe_dropout: float = 0.0) -> TokenBatches:
    shards = TokenShards(project / "shards")
    tokenizer = TextTokenizer(ModelFolder.open(project / "model", parts=["dvae"]).tokenizer_proto())
    return TokenBatches(shards, np.arange(40), tokenizer, condition_dropout=condition_dropout, bpe_dropout=bpe_dropout)


def test_it_trains_and_exports_with_the_layout_of_the_shards(project: Path) -> None:
    result = train(config_of(project))
    folder = ModelFolder.open(project / "model", parts=["dvae", "prior"])
    prior = load(folder)
    assert (prior.layout.text_len, prior.layout.grid_height, prior.layout.grid_width) == (8, 2, 3)
    assert prior.layout.codebook_size == 11
    assert folder.part_sha256("prior") == result["sha256"]
    assert {"val_image_loss", "val_text_loss", "val_caption_gap"} <= set(result["metrics"])
    assert train(config_of(project)) == result


def test_the_attention_backend_is_a_setting_of_the_run_and_not_of_the_model(project: Path) -> None:
    assert load_config(TrainConfig, ["attention.backend=flex"], prog="train").attention.backend == "flex"
    with pytest.raises(UserError, match="attention.backend"):
        load_config(TrainConfig, ["attention.backend=fast"], prog="train")
    train(replace(config_of(project), attention=AttentionConfig(backend="reference")))
    folder = ModelFolder.open(project / "model", parts=["dvae", "prior"])
    assert "backend" not in str(folder.config("prior"))
    assert load(folder).attention_backend == "auto"
    assert load(folder, attention_backend="sdpa").attention_backend == "sdpa"


def test_the_attention_backend_asked_for_trains(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend triton"):
        train(replace(config_of(project), attention=AttentionConfig(backend="triton")))


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


def test_every_view_of_a_sample_is_drawn_and_only_the_first_to_validate(project: Path) -> None:
    encode(project, np.arange(3)[None, :, None, None] + np.zeros((40, 1, 2, 3), np.int64))  # every code says its view
    source = batches_of(project)
    drawn = source.batch(sample_keys(0, 400, size=40, seed=0))["codes"]
    assert (drawn == drawn[:, :1]).all(), "one view at a time"
    views, counts = drawn[:, 0].unique(return_counts=True)
    assert views.tolist() == [0, 1, 2] and counts.min() > 90
    keys = [key for key in sample_keys(0, 400, size=40, seed=0) if key.index == 0]
    assert len(set(source.batch(keys)["codes"][:, 0].tolist())) == 3, "another epoch, another view"
    for batch in validation_batches(source.shards, np.arange(40), source.tokenizer):
        assert (batch["codes"] == 0).all()


def test_shards_with_other_views_are_another_run(project: Path) -> None:
    train(config_of(project))
    encode(project, np.zeros((40, 2, 2, 3), np.int64))
    with pytest.raises(UserError, match=r"holds another run: inputs\.views was None and is now '2, crop_scale 1"):
        train(config_of(project))


def test_held_out_rows_are_never_trained_on() -> None:
    training, held_out = split_rows(1000, 0.1)
    assert len(held_out) == 100
    assert not set(training) & set(held_out)
    assert len(training) + len(held_out) == 1000
    assert len(split_rows(19, 0.5)[1]) == 0
    assert [len(split_rows(count, 0.02)[1]) for count in (20, 50, 113, 500)] == [2, 5, 8, 10]
    assert len(split_rows(113, 0.0)[1]) == 0


def test_shares_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"condition_dropout must lie in \[0, 1\); got 1.5"):
        replace(TrainConfig(), condition_dropout=1.5)


def test_the_user_is_told_how_attention_is_computed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config_of(project))
    assert "attention: full by matmul" in capsys.readouterr().err


def test_flex_attention_cannot_train_on_a_cpu(project: Path) -> None:
    config = replace(config_of(project), attention=AttentionConfig(backend="flex"))
    with pytest.raises(UserError, match="FlexAttention has no backward pass on a CPU; use auto or sdpa"):
        train(config)
    assert not Path(config.run_dir).exists()
