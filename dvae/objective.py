"""What training a dVAE minimizes: reconstruction, the quantizer's and the adversary's terms, weighted and added up."""

from dataclasses import asdict
from typing import NamedTuple

from torch import Tensor, nn

from dvae.adversarial import AdversarialConfig, Adversary
from dvae.losses import LossConfig, elbo_scale, reconstruction_terms, weighted_sum
from dvae.lpips import Lpips
from dvae.model import DiscreteVAE, Reconstruction
from dvae.pixels import to_pixels
from dvae.schedule import ScheduleConfig, kl_weight, relaxation_temperature
from tessera.training.optim import MuonAdamW, OptimizerConfig, build_optimizer

# B batch, H W image pixels.

# A discriminator follows a moving target: little momentum (Radford et al. 2015).
_ADVERSARY_BETAS = (0.5, 0.9)


class Losses(NamedTuple):
    """One evaluation of the objective.

    Attributes:
        total: float32 scalar, to be minimized.
        terms: float32 scalars by name, each before its weight but for the adversary's, whose weights move.
        schedule: the scheduled quantities that were used, by name.
        result: what the model returned.
    """

    total: Tensor
    terms: dict[str, Tensor]
    schedule: dict[str, float]
    result: Reconstruction


class Objective(nn.Module):
    """Holds the weights of all terms and the networks that judge, apart from the model that is judged.

    Args:
        loss: weights of the terms.
        schedule: temperature and KL weight of the relaxed quantizer.
        adversarial: the discriminator and its weights.
        lpips: the perceptual distance, where it has a weight.
    """

    def __init__(
        self,
        *,
        loss: LossConfig,
        schedule: ScheduleConfig,
        adversarial: AdversarialConfig,
        lpips: Lpips | None = None,
    ) -> None:
        super().__init__()
        self.loss, self.schedule, self.adversarial = loss, schedule, adversarial
        self.adversary = Adversary(adversarial) if adversarial.is_on else None
        # in a tuple, which is no submodule: frozen weights from a file have no place in checkpoints
        self._lpips = (lpips,)

    def forward(self, model: DiscreteVAE, images: Tensor, *, progress: float) -> Losses:
        """Evaluates the objective on images float [B, 3, H, W] in [0, 1] at `progress` in [0, 1] of training."""
        temperature = relaxation_temperature(
            progress, final=self.schedule.final_temperature, share=self.schedule.temperature_share
        )
        beta = kl_weight(progress, final=self.loss.kl, share=self.schedule.kl_share)
        weights = {**asdict(self.loss), "kl": beta}
        pixels = model.config.pixels
        result = model(images, temperature=temperature)
        (lpips,) = self._lpips
        terms = reconstruction_terms(result.output, images, pixels=pixels, config=self.loss, lpips=lpips)
        reconstruction_loss = total = weighted_sum(terms, weights)
        if result.terms:
            own = dict(result.terms)
            if "kl" in own:
                own["kl"] = own["kl"] * elbo_scale((images.shape[2], images.shape[3]))
            total = total + weighted_sum(own, weights)
            terms |= own
        if self.adversary is not None:
            judged = self.adversary.losses(
                images,
                to_pixels(result.output, pixels),
                reconstruction_loss=reconstruction_loss,
                last_layer=model.last_layer,
                progress=progress,
            )
            total = total + judged.total
            terms |= judged._asdict()
        scheduled = {"kl_weight": beta, "temperature": temperature} if model.config.quantizer == "gumbel" else {}
        return Losses(total, terms, scheduled, result)

    def build_optimizer(self, model: DiscreteVAE, config: OptimizerConfig) -> MuonAdamW:
        """One optimizer for the model and for the discriminator, if there is one, with a learning rate of its own."""
        optimizer = build_optimizer(model, config)
        if self.adversary is not None:
            optimizer.add_network(
                list(self.adversary.parameters()),
                rate=self.adversarial.learning_rate / config.learning_rate,
                betas=_ADVERSARY_BETAS,
            )
        return optimizer

    def to_device_of(self, model: DiscreteVAE) -> None:
        """Moves the networks that judge to where the model is."""
        device = next(model.parameters()).device
        self.to(device)
        for network in self._lpips:
            if network is not None:
                network.to(device)
