"""The prior's training step as a LightningModule."""

from typing import NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from tessera.training.optim import OptimizerConfig, build_optimizer
from transformer.kernels.flops import register_flop_formulas
from transformer.model import Prior, PriorOutput

# B batch, T text positions, I image positions, V text ids, K codebook size.

# Ramesh et al. 2021, section 2.2: the image is what the model is for.
TEXT_WEIGHT, IMAGE_WEIGHT = 1 / 8, 7 / 8


class PriorLoss(NamedTuple):
    """Mean cross-entropy in nats per token, float scalars.

    Attributes:
        total: the weighted sum that is trained.
        text: over the caption's tokens and the first pad after them, which marks its end.
        image: over the image codes.
    """

    total: Tensor
    text: Tensor
    image: Tensor


def prior_loss(output: PriorOutput, text_ids: Tensor, image_codes: Tensor, *, text_vocab_size: int) -> PriorLoss:
    """The loss of teacher-forced predictions for text ids int64 [B, T] and codes int64 [B, I]."""
    image = F.cross_entropy(output.image_logits.flatten(0, 1).float(), image_codes.flatten())
    target = text_ids[:, 1:]
    # A pad after a pad is certain and teaches nothing.
    is_told = text_ids[:, :-1] < text_vocab_size
    each = F.cross_entropy(output.text_logits.flatten(0, 1).float(), target.flatten(), reduction="none")
    told = is_told.flatten().float()
    text = (each * told).sum() / told.sum().clamp_min(1)
    return PriorLoss(TEXT_WEIGHT * text + IMAGE_WEIGHT * image, text, image)


class PriorLit(pl.LightningModule):
    """Trains `model` on batches {"text_ids": int64 [B, T], "codes": int64 [B, I]}.

    Args:
        model: the prior.
        optim: rates.
    """

    progress = 0.0

    def __init__(self, model: Prior, *, optim: OptimizerConfig) -> None:
        super().__init__()
        register_flop_formulas()
        self.model = model
        self.optim = optim

    def _loss(self, output: PriorOutput, text_ids: Tensor, codes: Tensor) -> PriorLoss:
        return prior_loss(output, text_ids, codes, text_vocab_size=self.model.layout.text_vocab_size)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        text_ids, codes = batch["text_ids"], batch["codes"]
        loss = self._loss(self.model(text_ids, codes), text_ids, codes)
        self.log_dict({"loss": loss.total, "text_loss": loss.text, "image_loss": loss.image})
        return loss.total

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        text_ids, codes = batch["text_ids"], batch["codes"]
        # `forward` and not the call: a compiled model would be compiled once more, for passes without gradients
        loss = self._loss(self.model.forward(text_ids, codes), text_ids, codes)
        # What the captions are worth: the image loss under a neighbor's caption minus that under one's own.
        shuffled_ids = text_ids.roll(1, dims=0)
        shuffled = self._loss(self.model.forward(shuffled_ids, codes), shuffled_ids, codes)
        self.log_dict(
            {
                "val_loss": loss.total,
                "val_text_loss": loss.text,
                "val_image_loss": loss.image,
                "val_caption_gap": shuffled.image - loss.image,
            },
            batch_size=len(codes),
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model, self.optim)
