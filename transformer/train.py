"""Trains the prior on token shards and exports it: `tessera train-prior CONFIG.yaml key=value ...`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tessera.config import from_plain, load, to_plain
from tessera.data.order import SampleKey, mix, permuted
from tessera.data.shards import TokenShards, batches
from tessera.errors import UserError
from tessera.model_folder import ModelFolder, write_part
from tessera.precision import resolve_device, resolve_precision
from tessera.text_tokenizer import TextTokenizer
from tessera.training import stage
from tessera.training.optim import OptimizerConfig
from tessera.training.processes import first_goes_ahead, is_first, join, on_first, whole_state_dict
from tessera.training.progress import count_operations
from tessera.training.run import TrainerConfig, run_training
from transformer.attention import AttentionConfig, describe_backends
from transformer.lit import PriorLit, Show
from transformer.model import Prior, PriorConfig, SequenceLayout

_LEAST_VALIDATION_SAMPLES = 8
_MOST_VALIDATION_SAMPLES = 512
_VALIDATION_BATCH = 64  # without gradients larger batches than those of training fit, and take less time


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run of the prior."""

    shards: str = "runs/shards"
    """token shards, made by `tessera encode`"""
    model: PriorConfig = PriorConfig()
    """sizes; `model.layout` is taken from the shards"""
    attention: AttentionConfig = AttentionConfig()
    """how attention is computed; no part of the model"""
    optim: OptimizerConfig = OptimizerConfig()
    """rates"""
    trainer: TrainerConfig = TrainerConfig(batch_size=64)
    """how long and on what"""
    condition_dropout: float = 0.1
    """share of captions, 0 to 1, replaced by the empty one, so that guidance has an unconditional branch"""
    bpe_dropout: float = 0.1
    """chance, 0 to 1, that a merge of the text tokenizer is skipped in training"""
    validation_share: float = 0.02
    """share of the samples, 0 to 1, kept out of training"""
    init_from: str | None = None
    """model folder whose prior the training starts from; null begins with new weights"""
    out: str = "my-model"
    """model folder that receives the prior part"""
    run_dir: str = "runs/prior"
    """receives checkpoints and metrics; the same command resumes from it"""

    def __post_init__(self) -> None:
        for name in ("condition_dropout", "bpe_dropout", "validation_share"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must lie in [0, 1); got {getattr(self, name)}")


class TokenBatches:
    """A `BatchSource` over token shards: choice of view and caption, BPE and condition dropout by the key's seed.

    Args:
        shards: the samples.
        rows: int64, which of them.
        tokenizer: splits captions.
        condition_dropout: share of captions replaced by the empty one.
        bpe_dropout: chance of a skipped merge.
        crops: draw from whichever view of a sample; False takes the picture as it is.
    """

    def __init__(
        self,
        shards: TokenShards,
        rows: np.ndarray,
        tokenizer: TextTokenizer,
        *,
        condition_dropout: float,
        bpe_dropout: float,
        crops: bool = True,
    ) -> None:
        self.shards, self.rows, self.tokenizer = shards, rows, tokenizer
        self.condition_dropout, self.bpe_dropout = condition_dropout, bpe_dropout
        self.num_views = shards.index.crops if crops else 1

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, keys: Sequence[SampleKey]) -> dict[str, torch.Tensor]:
        rows = self.rows[[key.index for key in keys]]
        seeds = np.array([key.seed for key in keys])
        draws, conditions, crops = mix(seeds, np.array([[1], [2], [3]]))  # each uint64 [B]
        dropped = conditions < np.uint64(self.condition_dropout * 2**64)
        views = (crops % np.uint64(self.num_views)).astype(np.int64)
        captions = []
        for row, draw, drop in zip(rows.tolist(), draws.tolist(), dropped.tolist(), strict=True):
            choices = self.shards.captions(row)
            captions.append("" if drop else choices[draw % len(choices)])
        text_ids = self.tokenizer.encode_batch(
            captions, text_len=self.shards.index.text_len, dropout=self.bpe_dropout, seeds=[key.seed for key in keys]
        )
        return {"text_ids": text_ids, "codes": torch.from_numpy(self.shards.codes[rows, views].astype(np.int64))}


def split_rows(count: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation rows: a fixed pseudo-random share is held out, nothing of fewer than 20 samples.

    A loss over two or three samples says nothing: up to 8 are held out as long as they are no more than a tenth.
    """
    shuffled = permuted(np.arange(count), size=count, key=0)
    held_out = 0
    if count >= 20 and share > 0:
        least = min(_LEAST_VALIDATION_SAMPLES, count // 10)
        held_out = min(max(least, int(count * share)), _MOST_VALIDATION_SAMPLES)
    return np.sort(shuffled[held_out:]), np.sort(shuffled[:held_out])


def train(config: TrainConfig, *, show: Show | None = None) -> dict[str, Any]:
    """Trains and exports; resumes or returns at once where that was done before.

    Args:
        config: the run.
        show: draws what the prior makes of a few captions, see `transformer.lit.PriorLit`; not where processes hold
            parts of the weights.

    Returns:
        steps, seconds, metrics (last value of everything logged) and sha256 of the exported part.

    Raises:
        UserError: if the shards were made with another dvae or tokenizer than the model folder holds.
        KeyboardInterrupt: after saving, when the user interrupted.
    """
    processes = join(config.trainer.device)
    run_dir, out = Path(config.run_dir), Path(config.out)
    shards = TokenShards(Path(config.shards))
    folder = ModelFolder.open(out, parts=["dvae"])
    tokenizer = TextTokenizer(folder.tokenizer_proto())
    check_shards(shards, folder)
    layout = layout_of(shards, tokenizer)
    begins_with = None
    if config.init_from is not None:
        begins_with = stage.weights_to_start_from(config.init_from, "prior", tokenizer_sha256=tokenizer.sha256)
        config = replace(config, model=_sizes_of(begins_with, layout))
    config = replace(config, model=replace(config.model, layout=layout))
    index = shards.index
    _announce_attention(config)
    inputs = {"dvae": index.dvae_sha256, "tokenizer": tokenizer.sha256, "corpus": index.corpus_fingerprint}
    if index.crops > 1:
        inputs["views"] = f"{index.crops}, crop_scale {index.crop_scale:g}, flip {index.flip}, seed {index.crop_seed}"
    if begins_with is not None:
        inputs["init_from"] = begins_with.part_sha256("prior")
    with first_goes_ahead():
        finished = stage.begin(run_dir, config, inputs=inputs)
    if finished is not None and _is_exported(out, finished["sha256"]):
        return finished
    train_rows, validation_rows = split_rows(len(shards), config.validation_share)
    source = TokenBatches(
        shards, train_rows, tokenizer, condition_dropout=config.condition_dropout, bpe_dropout=config.bpe_dropout
    )
    is_cut = processes.world_size > 1 and config.trainer.strategy == "fsdp"
    torch.manual_seed(config.trainer.seed)
    model = Prior(
        config.model,
        attention_backend=config.attention.backend,
        checkpoint_activations=config.trainer.checkpoint_activations,
    )
    if begins_with is not None:
        stage.start_from(model, begins_with, "prior")
    result = run_training(
        PriorLit(model, optim=config.optim, show=show if processes.is_first and not is_cut else None),
        source,
        name="prior",
        config=config.trainer,
        optim=config.optim,
        run_dir=run_dir,
        validation=validation_batches(shards, validation_rows, tokenizer),
        unit="tokens",
        per_sample=layout.seq_len,
        operations=lambda: operations_per_sample(config.model),
    )
    tensors = whole_state_dict(model)

    def export() -> dict[str, Any]:
        sha256 = write_part(
            out,
            "prior",
            config=to_plain(config.model),
            tensors=tensors,
            requires={"dvae": index.dvae_sha256, "tokenizer": tokenizer.sha256},
            metadata={
                "corpus": index.corpus_name,
                "image_size": [index.image_height, index.image_width],
                "samples": len(train_rows),
                "condition_dropout": config.condition_dropout,
                "steps": result.steps,
                "measured": result.metrics,
            },
        )
        finished = {"steps": result.steps, "seconds": result.seconds, "metrics": result.metrics, "sha256": sha256}
        stage.finish(run_dir, finished)
        return finished

    return on_first(export)


def _announce_attention(config: TrainConfig) -> None:
    """Tells the user how attention will be computed; refuses a backend that cannot run before anything is written."""
    device = resolve_device(config.trainer.device)
    is_bf16 = resolve_precision(config.trainer.precision, device).name == "bf16"
    if config.attention.backend == "flex" and device.type == "cpu":
        raise UserError("attention.backend: FlexAttention has no backward pass on a CPU; use auto or sdpa")
    try:
        chosen = describe_backends(
            config.model.masks(),
            config.model.layout.seq_len - 1,  # the last code is never an input
            device=device,
            head_dim=config.model.dim // config.model.heads,
            dtype=torch.bfloat16 if is_bf16 else torch.float32,
            backend=config.attention.backend,
        )
    except ValueError as error:
        raise UserError(f"attention.backend: {error}") from None
    if is_first():
        print(f"attention: {chosen}", file=sys.stderr)


def _sizes_of(folder: ModelFolder, layout: SequenceLayout) -> PriorConfig:
    """The sizes of the prior that training starts from, whose sequence must be that of the shards."""
    config = from_plain(PriorConfig, folder.config("prior"), source=f"{folder.path}/prior/config.yaml")
    if config.layout != layout:
        raise UserError(
            f"init_from={folder.path}: its prior reads sequences of {_shown(config.layout)}, the shards hold "
            f"{_shown(layout)}: encode with the dvae and tokenizer of that folder and "
            f"text_len={config.layout.text_len}, at its image size"
        )
    return config


def _shown(layout: SequenceLayout) -> str:
    return (
        f"{layout.text_len} text positions of {layout.text_vocab_size:,} pieces and {layout.grid_height}x"
        f"{layout.grid_width} of {layout.codebook_size:,} codes"
        + (f" in levels {list(layout.codebook_levels)}" if layout.codebook_levels else "")
    )


def operations_per_sample(config: PriorConfig) -> int:
    """Floating-point operations of training on one sample; attention counts as if it were dense."""

    def loss(model: Prior) -> torch.Tensor:
        text_ids, codes = (
            torch.zeros(1, count, dtype=torch.int64) for count in (model.layout.text_len, model.layout.image_len)
        )
        output = model(text_ids, codes)
        return output.text_logits.sum() + output.image_logits.sum()

    return count_operations(lambda: Prior(config, attention_backend="sdpa"), loss)


def validation_batches(
    shards: TokenShards, rows: np.ndarray, tokenizer: TextTokenizer
) -> list[dict[str, torch.Tensor]]:
    """The held-out samples with their pictures and captions as they are."""
    source = TokenBatches(shards, rows, tokenizer, condition_dropout=0.0, bpe_dropout=0.0, crops=False)
    keys = [SampleKey(index, 0) for index in range(len(rows))]
    return [source.batch(keys[span.start : span.stop]) for span in batches(len(keys), _VALIDATION_BATCH)]


def layout_of(shards: TokenShards, tokenizer: TextTokenizer) -> SequenceLayout:
    """The sequence that shards and tokenizer make."""
    index = shards.index
    return SequenceLayout(
        text_len=index.text_len,
        grid_height=index.grid_height,
        grid_width=index.grid_width,
        text_vocab_size=tokenizer.vocab_size,
        codebook_size=index.codebook_size,
        codebook_levels=index.codebook_levels,
    )


def check_shards(shards: TokenShards, folder: ModelFolder) -> None:
    """Raises UserError if the shards were made with another dvae or tokenizer than the folder holds."""
    for name, made_with, held in (
        ("dvae", shards.index.dvae_sha256, folder.part_sha256("dvae")),
        ("text tokenizer", shards.index.tokenizer_sha256, folder.tokenizer_sha256),
    ):
        if made_with != held:
            raise UserError(
                f"{shards.directory} was encoded with another {name} ({made_with[:12]}) than {folder.path} holds "
                f"({held[:12]}): encode again with `tessera encode`"
            )


def _is_exported(out: Path, sha256: str) -> bool:
    try:
        return ModelFolder.open(out, parts=["dvae", "prior"]).part_sha256("prior") == sha256
    except UserError:
        return False


def tell(config: TrainConfig, result: dict[str, Any]) -> None:
    """Says what came of a training, once for all processes."""
    if is_first():
        shown = "  ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items())
        print(f"prior in {config.out}: {result['steps']:,} steps, {result['seconds']:,.0f} s, {shown}")


def main(argv: Sequence[str]) -> int:
    """The command."""
    config = load(TrainConfig, argv, prog="tessera train-prior")
    tell(config, train(config))
    return 0


if __name__ == "__main__":
    from tessera.errors import run_command

    sys.exit(run_command(main, sys.argv[1:]))
