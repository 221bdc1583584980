"""The prior's training step as a LightningModule."""

from collections.abc import Callable
from typing import NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F

from tessera.training.optim import OptimizerConfig, build_optimizer
from tessera.training.pictures import log_picture
from transformer.kernels.flops import register_flop_formulas
from transformer.model import Prior, PriorOutput

# B batch, T text positions, I image positions, V text ids, K codebook size.

Show = Callable[[int, Prior], NDArray[np.uint8] | None]

# Ramesh et al. 2021, section 2.2: the image is what the model is for.
TEXT_WEIGHT, IMAGE_WEIGHT = 1 / 8, 7 / 8


class PriorLoss(NamedTuple):
    """Mean cross-entropy in nats per token, float scalars.

    Attributes:
        total: the weighted sum that is trained.
        text: over the tokens of a caption and the first pad after them, which marks its end; then over captions, so
            that parts of a batch, of one process or of several, add up to the whole. Empty captions count as 0.
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
    told = is_told.float()  # [B, T - 1]
    text = ((each.view_as(told) * told).sum(dim=1) / told.sum(dim=1).clamp_min(1)).mean()
    return PriorLoss(TEXT_WEIGHT * text + IMAGE_WEIGHT * image, text, image)


class PriorLit(pl.LightningModule):
    """Trains `model` on batches {"text_ids": int64 [B, T], "codes": int64 [B, I]}.

    Args:
        model: the prior.
        optim: rates.
        show: called with the step and the averaged model in every validation, returns a picture uint8 [H, W, 3], or
            None where it makes none; None for no pictures.
    """

    progress = 0.0

    def __init__(self, model: Prior, *, optim: OptimizerConfig, show: Show | None = None) -> None:
        super().__init__()
        register_flop_formulas()
        self.model = model
        self.optim = optim
        self._show = show

    def configure_model(self) -> None:
        """Cuts the weights into parts, block by block, where the strategy shares them out among processes (FSDP2)."""
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def _loss(self, output: PriorOutput, text_ids: Tensor, codes: Tensor) -> PriorLoss:
        return prior_loss(output, text_ids, codes, text_vocab_size=self.model.layout.text_vocab_size)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        text_ids, codes = batch["text_ids"], batch["codes"]
        loss = self._loss(self.model(text_ids, codes), text_ids, codes)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log_dict({"loss": loss.total, "text_loss": loss.text, "image_loss": loss.image}, sync_dist=True)
        return loss.total

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        text_ids, codes = batch["text_ids"], batch["codes"]
        # `forward` and not the call: a compiled model would be compiled once more, for passes without gradients. But
        # weights in parts are put together by the call.
        is_cut = isinstance(self.model, FSDPModule)
        predict: Callable[[Tensor, Tensor], PriorOutput] = self.model.__call__ if is_cut else self.model.forward
        loss = self._loss(predict(text_ids, codes), text_ids, codes)
        figures = {"val_loss": loss.total, "val_text_loss": loss.text, "val_image_loss": loss.image}
        if len(codes) > 1:
            # What the captions are worth: the image loss under a neighbor's caption minus that under one's own.
            shuffled_ids = text_ids.roll(1, dims=0)
            shuffled = self._loss(predict(shuffled_ids, codes), shuffled_ids, codes)
            figures["val_caption_gap"] = shuffled.image - loss.image
        self.log_dict(figures, batch_size=len(codes))
        # here and not at the end of validation, when the averaged weights have left again
        picture = self._show(self.global_step, self.model) if batch_idx == 0 and self._show is not None else None
        if picture is not None:
            log_picture(self, "samples", picture)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model, self.optim)
