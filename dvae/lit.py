"""The dVAE's training step as a LightningModule."""

from collections import deque

import lightning.pytorch as pl
import torch
from torch import Tensor

from dvae.losses import elbo_scale, kl_weight, pixel_loss, psnr, relaxation_temperature, to_pixels
from dvae.model import DiscreteVAE
from dvae.pixels import to_float
from dvae.schedule import ScheduleConfig
from dvae.usage import code_usage
from tessera.training.optim import OptimizerConfig, build_optimizer

# B batch, H W image pixels.

# Batches over which codebook usage is counted.
_USAGE_WINDOW = 50
_USAGE_EVERY_STEPS = 10


class DiscreteVAELit(pl.LightningModule):
    """Trains `model` on batches {"images": uint8 [B, H, W, 3]}.

    Args:
        model: the dVAE.
        optim: rates.
        schedule: temperature and KL weight of the relaxed quantizer.
    """

    progress = 0.0

    def __init__(self, model: DiscreteVAE, *, optim: OptimizerConfig, schedule: ScheduleConfig) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.schedule = schedule
        self._recent: deque[Tensor] = deque(maxlen=_USAGE_WINDOW)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        images = to_float(batch["images"])
        temperature = relaxation_temperature(
            self.progress, final=self.schedule.final_temperature, share=self.schedule.temperature_share
        )
        result = self.model(images, temperature=temperature)
        reconstruction_loss = pixel_loss(result.output, images, self.model.config.pixel_loss)
        beta = kl_weight(self.progress, final=self.schedule.kl_weight, share=self.schedule.kl_share)
        regularizer = result.regularizer * elbo_scale((images.shape[2], images.shape[3]))
        loss = reconstruction_loss + beta * regularizer
        self._recent.append(result.codes.detach())
        self.log_dict({"loss": loss, "pixel_loss": reconstruction_loss})
        if self.model.config.quantizer == "gumbel":
            self.log_dict({"kl": regularizer, "kl_weight": beta, "temperature": temperature})
        if self.trainer.global_step % _USAGE_EVERY_STEPS == 0:
            usage = code_usage(torch.cat([codes.flatten() for codes in self._recent]), self.model.codebook_size)
            self.log_dict({"usage": usage.share, "perplexity": usage.perplexity, "dead_codes": float(usage.dead)})
            pixels = to_pixels(result.output.detach(), self.model.config.pixel_loss)
            self.log("psnr", psnr(pixels, images).mean())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        images = to_float(batch["images"])
        reconstruction = self.model.decode(self.model.encode(images))
        self.log("val_psnr", psnr(reconstruction, images).mean(), batch_size=len(images))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model, self.optim)
