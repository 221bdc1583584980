"""What is asked of the pipeline: one prompt, how many images of it, and how to draw them."""

from dataclasses import dataclass
from numbers import Integral

from sampling.image_edit import ImageEdit
from sampling.random_stream import check_seed
from sampling.settings import SamplingSettings
from tessera.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and everything that its images depend on; requests of any kind may share a batch."""

    prompt: str
    """Cleaned; empty means unconditional."""
    seed: int = 0
    """From 0 to 2^63 - 1."""
    n: int = 1
    """Images to return, >= 1."""
    num_candidates: int = 1
    """Images to draw, of which the n best are returned, >= n."""
    settings: SamplingSettings = SamplingSettings()
    """How to draw."""
    edit: ImageEdit | None = None
    """The image that is edited; None draws a new one."""

    def __post_init__(self) -> None:
        for name, value in (("seed", self.seed), ("n", self.n), ("best_of", self.num_candidates)):
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise UserError(f"{name} is {value!r}, expected an integer")
        check_seed(self.seed)
        if self.n < 1:
            raise UserError(f"n is {self.n}, expected at least 1")
        if self.num_candidates < self.n:
            raise UserError(
                f"best_of is {self.num_candidates}, expected at least n = {self.n}: it counts all candidates"
            )
