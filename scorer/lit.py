"""The scorer's training step as a LightningModule."""

from typing import NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from scorer.losses import contrastive_loss, fitting_pairs
from scorer.model import IGNORED, ClipScorer, TextStates
from tessera.training.optim import OptimizerConfig, build_optimizer
from tessera.training.processes import join_rows, mean_over_processes

# B batch, G captions per image, H W pixels, T text positions, S text states.


class ScorerLoss(NamedTuple):
    """Float scalars.

    Attributes:
        total: the weighted sum that is trained.
        contrastive: of the embeddings, in nats.
        caption: mean surprise of a caption to the matching head, in nats; zero without a head.
    """

    total: Tensor
    contrastive: Tensor
    caption: Tensor


def scorer_loss(
    model: ClipScorer,
    images: Tensor,
    text_ids: Tensor,
    not_negative: Tensor,
    *,
    blind: Tensor,
    contrastive_weight: float,
    shared: bool = False,
) -> ScorerLoss:
    """Both losses of a batch.

    Args:
        model: the scorer.
        images: float [B, 3, H, W] in [0, 1].
        text_ids: int64 [B, G, T], captions of each image; the first is its partner in the contrastive loss.
        not_negative: bool [B, B], True for pairs off the diagonal that fit as well; of all processes if `shared`.
        blind: bool [B], images that are hidden from the matching head, which so learns what is said without one.
        contrastive_weight: of the embeddings' loss beside the matching head's.
        shared: whether the processes that train hold parts of one batch, all of whose images are compared.
    """
    patches = model.encode_images(images)
    texts = model.encode_texts(text_ids.flatten(0, 1))
    states, targets = (values.unflatten(0, text_ids.shape[:2]) for values in texts)  # [B, G, S, ...]
    image_rows = model.project_images(patches)
    text_rows = model.project_texts(TextStates(states[:, 0], targets[:, 0]))
    if shared:
        image_rows, text_rows = join_rows(image_rows), join_rows(text_rows)
    contrastive = contrastive_loss(image_rows, text_rows, scale=model.scale, not_negative=not_negative)
    if not model.config.matcher_layers:
        return ScorerLoss(contrastive, contrastive, contrastive.new_zeros(()))
    shown = torch.where(blind[:, None, None], model.no_image.to(patches.dtype), patches)
    losses = model.word_losses(shown, TextStates(states, targets))  # [B, G, S]
    num_tokens = (targets != IGNORED).sum()
    per_token = losses.sum() / (mean_over_processes(num_tokens) if shared else num_tokens)
    return ScorerLoss(per_token + contrastive_weight * contrastive, contrastive, losses.sum(dim=2).mean())


class ScorerLit(pl.LightningModule):
    """Trains `model` on the batches of `scorer.batches.CaptionedBatches`.

    Args:
        model: the scorer.
        optim: rates.
        contrastive_weight: of the embeddings' loss beside the matching head's.
        blind_share: share of images, 0 to 1, that are hidden from the matching head.
    """

    progress = 0.0

    def __init__(
        self, model: ClipScorer, *, optim: OptimizerConfig, contrastive_weight: float, blind_share: float
    ) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.contrastive_weight = contrastive_weight
        self.blind_share = blind_share

    def _loss(self, batch: dict[str, Tensor], *, blind_share: float, shared: bool = False) -> ScorerLoss:
        first, known = batch["first"], batch["known"]
        if shared:
            first, known = join_rows(first), join_rows(known)
        return scorer_loss(
            self.model,
            batch["images"].permute(0, 3, 1, 2).float().div(255),
            batch["text_ids"],
            fitting_pairs(first, known),
            blind=batch["draws"] < blind_share,
            contrastive_weight=self.contrastive_weight,
            shared=shared,
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch, blind_share=self.blind_share, shared=True)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            figures = {
                "loss": loss.total,
                "contrastive_loss": loss.contrastive,
                "caption_loss": loss.caption,
                "scale": self.model.scale,
            }
            self.log_dict(figures, sync_dist=True)
        return loss.total

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        seen, blind = self._loss(batch, blind_share=0.0), self._loss(batch, blind_share=1.0)
        figures = {
            "val_loss": seen.total,
            "val_contrastive_loss": seen.contrastive,
            "val_caption_loss": seen.caption,
            # What an image tells about its caption: the mean ranking score of pairs that belong together.
            "val_score": blind.caption - seen.caption,
        }
        self.log_dict(figures, batch_size=len(batch["images"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model, self.optim)
