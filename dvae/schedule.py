"""When the relaxed quantizer's temperature falls and its KL weight rises (Ramesh et al. 2021, section 2.1)."""

import math
from dataclasses import dataclass

from tessera.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Temperature and KL weight of the `gumbel` quantizer; the others have neither."""

    final_temperature: float = 1 / 16
    """tau at the end of its cosine from 1"""
    temperature_share: float = 0.5
    """share of training over which tau falls; the paper's 3,000,000 updates take 0.05"""
    kl_share: float = 0.1
    """share of training over which the KL weight rises to loss.kl; the paper's 3,000,000 updates take 1/600"""

    def __post_init__(self) -> None:
        if self.final_temperature <= 0 or not 0 <= self.temperature_share <= 1 or not 0 <= self.kl_share <= 1:
            raise UserError(
                f"schedule needs final_temperature > 0 and shares in [0, 1]; got {self.final_temperature}, "
                f"{self.temperature_share} and {self.kl_share}"
            )


def relaxation_temperature(progress: float, *, final: float = 1 / 16, share: float = 0.05) -> float:
    """The Gumbel tau at `progress` in [0, 1]: a cosine from 1 to `final` over the first `share` of training.

    The paper takes 150,000 of 3,000,000 updates, a twentieth. Short runs need a larger share.
    """
    done = min(1.0, progress / share) if share > 0 else 1.0
    return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2


def kl_weight(progress: float, *, final: float = 6.6, share: float = 1 / 600) -> float:
    """The weight beta of the KL term at `progress`: a cosine from 0 to `final` over the first `share`, then flat."""
    done = min(1.0, progress / share) if share > 0 else 1.0
    return final * (1 - math.cos(math.pi * done)) / 2
