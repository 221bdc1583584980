"""What the pipeline returns: an image, all that is needed to make it again, and how it fared among its candidates."""

import dataclasses
import io
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from PIL import Image

from sampling.settings import SamplingSettings

ScorerName = Literal["clip", "likelihood", "context", "combined"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartialImage:
    """An image that is still being drawn."""

    image: np.ndarray = dataclasses.field(repr=False)
    """uint8 [H, W, 3]; gray below the rows that are there."""
    num_rows: int
    """How many rows of pixels are there."""
    num_tokens: int
    """How many tokens are drawn."""
    prompt: str
    seed: int
    image_index: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """One image, and all that is needed to make it again."""

    image: np.ndarray = dataclasses.field(repr=False)
    """uint8 [H, W, 3]."""
    codes: np.ndarray = dataclasses.field(repr=False)
    """int64 [h, w], what the prior drew."""
    prompt: str
    """As cleaned; empty means unconditional."""
    seed: int
    image_index: int
    """Which candidate of its prompt and seed it is, from 0."""
    rank: int
    """Place among the candidates of its prompt, 0 is the best; the image index if nothing ranked them."""
    candidates: int
    """How many were ranked."""
    scorer: ScorerName | None
    """What ranked them."""
    scores: Mapping[str, float]
    """Every score that was computed, higher is better: clip, likelihood (nats), context (nats), combined."""
    settings: SamplingSettings
    model_sha256: str
    precision: str
    """bf16, fp32 or int8: the same seed gives the same pixels on the same machine in the same precision."""
    edit: Mapping[str, Any] | None = None
    """What was kept of which image, where one was edited; see `sampling.image_edit.ImageEdit.recipe`."""

    def recipe(self) -> dict[str, Any]:
        """What determines the pixels, as plain values."""
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "image_index": self.image_index,
            "settings": dataclasses.asdict(self.settings),
            "model_sha256": self.model_sha256,
            "precision": self.precision,
            **({} if self.edit is None else {"edit": dict(self.edit)}),
        }

    def description(self) -> dict[str, Any]:
        """The recipe and how the image fared, as plain values; a score that is not a number is None."""
        return {
            **self.recipe(),
            "rank": self.rank,
            "candidates": self.candidates,
            "scorer": self.scorer,
            "scores": {name: score if math.isfinite(score) else None for name, score in self.scores.items()},
        }

    def to_pil(self) -> Image.Image:
        """The image as a PIL image."""
        return Image.fromarray(self.image)

    def _repr_png_(self) -> bytes:
        """How notebooks show it."""
        stream = io.BytesIO()
        self.to_pil().save(stream, format="PNG")
        return stream.getvalue()
