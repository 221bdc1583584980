"""Run by test_processes.py as one of several processes: trains something small and writes down what came of it.

Its globals are given: `environment`, what a launcher would have set; `scenario`, a function below; `options` for it;
`out`, the file for the result.
"""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from dvae.lit import DiscreteVAELit
from dvae.model import DiscreteVAE, DiscreteVAEConfig
from dvae.train import ImageBatches, TrainConfig, objective_of
from scorer.batches import CaptionedBatches
from scorer.lit import ScorerLit
from scorer.model import ClipScorer, ClipScorerConfig
from tessera.data.loader import KeyedLoader
from tessera.data.order import SampleKey, mix
from tessera.errors import UserError
from tessera.text_tokenizer import TextTokenizer
from tessera.training.optim import OptimizerConfig
from tessera.training.processes import (
    first_goes_ahead,
    gather,
    is_first,
    join,
    mean_over_processes,
    whole,
    whole_state_dict,
)
from tessera.training.run import TrainerConfig, run_training
from transformer.lit import PriorLit
from transformer.model import Prior, PriorConfig, SequenceLayout

LAYOUT = SequenceLayout(text_len=8, grid_height=4, grid_width=4, text_vocab_size=50, codebook_size=16)
OPTIM = OptimizerConfig(ema_horizon=0.3)


class Sequences:
    """A `BatchSource` of random captions of 2 to 6 ids and random codes."""

    def __len__(self) -> int:
        return 64

    def batch(self, keys: Sequence[SampleKey]) -> dict[str, Tensor]:
        rows = np.array([key.index for key in keys])[:, None]
        text_ids = 4 + mix(rows, 1, np.arange(8)) % np.uint64(46)
        pads = 50 + np.arange(8)
        text_ids = np.where(np.arange(8) < 2 + rows % 5, text_ids.astype(np.int64), pads)
        codes = (mix(rows, 2, np.arange(16)) % np.uint64(16)).astype(np.int64)
        return {"text_ids": torch.from_numpy(text_ids), "codes": torch.from_numpy(codes)}


class Watch(Callback):
    """Keeps the gradients and losses of every step, of the batch as a whole."""

    def __init__(self, interrupt_rank: int | None = None) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.losses: list[float] = []
        self.interrupt_rank = interrupt_rank

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        named = pl_module.model.named_parameters()  # type: ignore[operator]
        self.gradients.append({name: whole(each.grad).clone() for name, each in named if each.grad is not None})

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, step: int) -> None:
        if trainer.global_step == 3 and trainer.global_rank == self.interrupt_rank:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(mean_over_processes(outputs["loss"])))


def build(stage: str) -> tuple[pl.LightningModule, Any]:
    """A model with its training step, and what it is trained on."""
    torch.manual_seed(0)
    images = (mix(np.arange(24 * 16 * 16 * 3), 5) % np.uint64(256)).astype(np.uint8).reshape(24, 16, 16, 3)
    if stage in ("fsq", "vq"):
        sizes = DiscreteVAEConfig(widths=(8, 16), blocks=(0, 1), levels=(4, 4), quantizer=stage, codebook_size=16)
        return DiscreteVAELit(DiscreteVAE(sizes), objective_of(TrainConfig()), optim=OPTIM), ImageBatches(images)
    if stage == "scorer":
        captions = [("a star", f"a star number {place % 7}") for place in range(len(images))]
        tokenizer = TextTokenizer.train((text for texts in captions for text in texts), vocab_size=400)
        config = ClipScorerConfig(
            image_size=(16, 16), patch_size=8, dim=16, heads=2, text_len=16, text_vocab_size=tokenizer.vocab_size
        )
        model = ClipScorer(config)
        return (
            ScorerLit(model, optim=OPTIM, contrastive_weight=0.2, blind_share=0.1),
            CaptionedBatches(images, captions, tokenizer, text_len=16, num_captions=2),
        )
    prior = Prior(
        PriorConfig(layout=LAYOUT, dim=32, depth=2, heads=2), checkpoint_activations=stage == "prior, checkpointed"
    )
    return PriorLit(prior, optim=OPTIM), Sequences()


def train(stage: str, run_dir: str, *, interrupt_rank: int | None = None, **trainer: Any) -> dict[str, Any]:
    module, source = build(stage)
    watch = Watch(interrupt_rank)
    interrupted = False
    try:
        run_training(
            module,
            source,
            name="test",
            config=TrainerConfig(precision="fp32", device="cpu", **trainer),
            optim=OPTIM,
            run_dir=Path(run_dir),
            validation=[source.batch([SampleKey(0, 0), SampleKey(1, 1)])] if stage == "prior" else (),
            callbacks=(watch,),
        )
    except KeyboardInterrupt:
        interrupted = True
    return {
        "gradients": watch.gradients,
        "losses": watch.losses,
        "weights": whole_state_dict(module.model),  # type: ignore[arg-type]
        "interrupted": interrupted,
        "files": sorted(str(path.relative_to(run_dir)) for path in Path(run_dir).rglob("*") if path.is_file()),
    }


def order(*, num_workers: int, start_step: int, steps: int, batch_size: int) -> list[list[int]]:
    """The samples of each step, put together again from what the processes have got."""
    processes = join("cpu")
    loader = KeyedLoader(
        Sequences(),
        batch_size=batch_size,
        seed=3,
        start_step=start_step,
        rank=processes.rank,
        world_size=processes.world_size,
        num_workers=num_workers,
    )
    own = [batch["codes"].tolist() for batch, _ in zip(loader, range(steps), strict=False)]
    of_all = gather(own)
    return [
        [codes for row in zip(*(part[step] for part in of_all), strict=True) for codes in row] for step in range(steps)
    ]


def who() -> dict[str, int]:
    """How this process sees itself."""
    processes = join("cpu")
    return {"rank": processes.rank, "world_size": processes.world_size, "per_node": processes.per_node}


def mistaken() -> str:
    """What becomes of a mistake of the user's in this process."""
    join("cpu")
    try:
        with first_goes_ahead():
            if is_first():
                raise UserError("wrong data")
    except UserError as error:
        return f"told: {error}"
    except SystemExit as exit_:
        assert exit_.code == 2
        return "ended quietly"
    return "nothing"


if __name__ == "__main__":
    os.environ.update(globals()["environment"])
    torch.set_num_threads(1)
    torch.save(globals()[globals()["scenario"]](**globals()["options"]), globals()["out"])
