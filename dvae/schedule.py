"""When the relaxed quantizer's temperature falls and its KL weight rises (Ramesh et al. 2021, section 2.1)."""

from dataclasses import dataclass

from tessera.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Temperature and KL weight of the `gumbel` quantizer; the others have neither."""

    final_temperature: float = 1 / 16
    """tau at the end of its cosine from 1"""
    temperature_share: float = 0.5
    """share of training over which tau falls; the paper's 3,000,000 updates take 0.05"""
    kl_weight: float = 6.6
    """beta, reached after kl_share; the KL is divided by the number of pixel values"""
    kl_share: float = 0.1
    """share of training over which beta rises; the paper's 3,000,000 updates take 1/600"""

    def __post_init__(self) -> None:
        if self.final_temperature <= 0 or self.kl_weight < 0:
            raise UserError(
                f"schedule needs final_temperature > 0 and kl_weight >= 0; "
                f"got {self.final_temperature} and {self.kl_weight}"
            )
