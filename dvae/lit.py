"""The dVAE's training step as a LightningModule."""

import logging
from collections.abc import Callable

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dvae.model import DiscreteVAE
from dvae.objective import Objective
from dvae.pixels import to_float, to_pixels
from dvae.similarity import psnr, ssim
from dvae.usage import UsageWindow
from tessera.training.optim import OptimizerConfig
from tessera.training.pictures import log_picture

# B batch, H W image pixels, h w code grid.

# Batches over which codebook usage is counted.
_USAGE_WINDOW = 50
# Below this share of the codebook, once the first tenth of training is over, something is wrong.
_COLLAPSED_SHARE, _COLLAPSED_FROM = 0.02, 0.1

_logger = logging.getLogger(__name__)


class DiscreteVAELit(pl.LightningModule):
    """Trains `model` on batches {"images": uint8 [B, H, W, 3]}.

    Args:
        model: the dVAE.
        objective: what it minimizes.
        optim: rates.
        show: called with the step and the averaged model in every validation, returns a picture uint8 [H, W, 3]; None
            for no pictures.
    """

    progress = 0.0

    def __init__(
        self,
        model: DiscreteVAE,
        objective: Objective,
        *,
        optim: OptimizerConfig,
        show: Callable[[int, DiscreteVAE], NDArray[np.uint8]] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.optim = optim
        self._show = show
        self._window = UsageWindow(model.codebook_size, length=_USAGE_WINDOW)
        self._warned = False

    def on_fit_start(self) -> None:
        self.objective.to_device_of(self.model)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        images = to_float(batch["images"])
        losses = self.objective(self.model, images, progress=self.progress)
        self._window.add(losses.result.codes)
        # Lightning's bookkeeping of a dozen values took several milliseconds of every step
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log_dict({"loss": losses.total, **losses.terms}, sync_dist=True)
            self.log_dict(losses.schedule)
            pixels = to_pixels(losses.result.output.detach(), self.model.config.pixels)
            self.log("psnr", psnr(pixels, images).mean(), sync_dist=True)
            self._log_usage()
        return losses.total

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        images = to_float(batch["images"])
        reconstruction = self.model.decode(self.model.encode(images))
        figures = {"val_psnr": psnr(reconstruction, images).mean(), "val_ssim": ssim(reconstruction, images).mean()}
        self.log_dict(figures, batch_size=len(images))
        # here and not at the end of validation, when the averaged weights have left again
        if batch_idx == 0 and self._show is not None:
            log_picture(self, "reconstructions", self._show(self.global_step, self.model))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.objective.build_optimizer(self.model, self.optim)

    def _log_usage(self) -> None:
        usage = self._window.usage()
        self.log_dict({"usage": usage.share, "perplexity": usage.perplexity, "dead_codes": float(usage.dead)})
        collapsed = self.progress > _COLLAPSED_FROM and usage.share < _COLLAPSED_SHARE
        if collapsed and not self._warned and self.trainer.is_global_zero:
            self._warned = True
            _logger.warning(
                "only %d of %d codes are in use, the codebook has collapsed: pictures may be too much alike, or "
                "optim.learning_rate too high; model.quantizer=fsq has no codebook that could collapse",
                self.model.codebook_size - usage.dead,
                self.model.codebook_size,
            )
