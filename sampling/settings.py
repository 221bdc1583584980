"""How codes are drawn from the prior's logits, and how strongly the prompt guides at each position."""

import difflib
import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor

from sampling import logits as logit_functions
from tessera.errors import UserError

GuidanceSchedule = Literal["constant", "linear", "power-cosine"]


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How codes are drawn; filters apply in the order in which they stand here."""

    guidance: float = 1.0
    """Weight w of u + w (c - u): 0 ignores the prompt, 1 is off, above 1 follows the prompt more closely."""
    guidance_schedule: GuidanceSchedule = "constant"
    """How the weight goes from 1 to w: at once, linearly, or by (1 - cos(pi s^p)) / 2 at share s of the image."""
    guidance_power: float = 1.5
    """The p of power-cosine, > 0; the larger, the later guidance sets in."""
    guidance_threshold: float = 0.0
    """Where the scheduled weight is below it, guidance is off (the weight is 1); 0 is never."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely code every time."""
    top_k: int = 0
    """Keep the k most likely codes; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely codes that sum to this probability; 1 keeps all."""
    min_p: float = 0.0
    """Keep codes at least this many times as likely as the most likely one; 0 keeps all."""

    def __post_init__(self) -> None:
        logit_functions.check_guidance(self.guidance)
        if self.guidance_schedule not in get_args(GuidanceSchedule):
            names = ", ".join(get_args(GuidanceSchedule))
            raise UserError(f"guidance_schedule is {self.guidance_schedule!r}, expected one of {names}")
        if not (isinstance(self.guidance_power, Real) and 0 < self.guidance_power < math.inf):
            raise UserError(f"guidance_power is {self.guidance_power!r}, expected a number > 0")
        if not (isinstance(self.guidance_threshold, Real) and 0 <= self.guidance_threshold < math.inf):
            raise UserError(
                f"guidance_threshold is {self.guidance_threshold!r}, expected a number >= 0 (0 is never off)"
            )
        logit_functions.check_temperature(self.temperature)
        logit_functions.check_top_k(self.top_k)
        logit_functions.check_top_p(self.top_p)
        logit_functions.check_min_p(self.min_p)

    @property
    def guided(self) -> bool:
        """Whether the empty caption is decoded beside the prompt."""
        largest = self.guidance if self.guidance_schedule == "constant" else max(1.0, self.guidance)
        return self.guidance != 1.0 and largest >= self.guidance_threshold

    def guidance_weights(self, image_len: int) -> Tensor:
        """The weight at each of `image_len` positions, float32.

        Paper: the ramp is that of RAR (Yu et al. 2024, 2411.00776), appendix; there the weight counts from 0.
        """
        share = torch.arange(image_len, dtype=torch.float64) / max(1, image_len - 1)  # s, 0 at the first position
        if self.guidance_schedule == "constant":
            way = torch.ones_like(share)
        elif self.guidance_schedule == "linear":
            way = share
        else:
            way = (1 - torch.cos(math.pi * share**self.guidance_power)) / 2
        weights = 1 + (self.guidance - 1) * way
        return torch.where(weights < self.guidance_threshold, 1.0, weights).float()


class SettingsOverrides(TypedDict, total=False):
    """Settings that a call gives in place of the model's own; None leaves the model's, too."""

    guidance: float | None
    guidance_schedule: GuidanceSchedule | None
    guidance_power: float | None
    guidance_threshold: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None


def override(settings: SamplingSettings, overrides: SettingsOverrides) -> SamplingSettings:
    """Settings with others in their place.

    Raises:
        UserError: there is no such setting, or a value is out of range.
    """
    known = SettingsOverrides.__annotations__
    for name in overrides:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"there is no option {name!r}{meant}")
    given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    return replace(settings, **given)
