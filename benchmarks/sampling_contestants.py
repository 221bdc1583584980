"""Who takes part in benchmarks/sampling.py: shapes, contestants, what they are timed at together, and the goals."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Side = Literal["ours", "dalle-pytorch", "llama"]
Section = Literal["generate", "guided", "first", "pixels", "train", "positions"]
Unit = Literal["s", "images/s", "ms"]

PEER_SIDES: tuple[Side, ...] = ("dalle-pytorch", "llama")
GUIDANCE = 3.0


class Shape(NamedTuple):
    """Sizes that all models share; heads of 64 channels, a feed-forward layer four times as wide."""

    text_len: int = 32
    grid: int = 16
    text_ids: int = 1000
    codes: int = 1024
    dim: int = 256
    depth: int = 4
    heads: int = 4


class Contestant(NamedTuple):
    """One process."""

    side: Side
    variant: str
    settings: Mapping[str, Any]
    """what its worker reads beside the shape and the cell's job"""
    is_slow: bool = False
    """a call takes long: it is timed in few rounds, a call at a time"""

    @property
    def name(self) -> str:
        return f"{self.side}, {self.variant}"


class Versus(NamedTuple):
    """A ratio that becomes a row."""

    ours: Contestant
    other: Contestant
    goal: float | None = None


class Cell(NamedTuple):
    """What several contestants do in turns."""

    name: str
    section: Section
    job: Mapping[str, Any]
    unit: Unit
    versus: tuple[Versus, ...]

    @property
    def contestants(self) -> tuple[Contestant, ...]:
        """In the order in which they take turns."""
        by_name = {each.name: each for versus in self.versus for each in (versus.ours, versus.other)}
        return tuple(by_name.values())

    @property
    def batch(self) -> int:
        return self.job["batch"]


OURS = Contestant("ours", "fp32", {"weights": "fp32"})
OURS_BF16 = Contestant("ours", "bf16 weights", {"weights": "bf16"})
OURS_INT8 = Contestant("ours", "int8 weights", {"weights": "int8"})
SHIPPED = Contestant("dalle-pytorch", "as shipped", {"repaired": False}, is_slow=True)
REPAIRED = Contestant("dalle-pytorch", "cache repaired", {"repaired": True})
# its guided loop empties the prompt at the first step and guides nothing after it: a time, not a rival
BROKEN_GUIDANCE = Contestant("dalle-pytorch", "as shipped, its guidance broken", {"repaired": False}, is_slow=True)
LLAMA = Contestant("llama", "static cache", {"cache": "static", "dtype": "float32"})
LLAMA_DYNAMIC = Contestant("llama", "dynamic cache", {"cache": "dynamic", "dtype": "float32"})
LLAMA_BF16 = Contestant("llama", "static cache, bf16", {"cache": "static", "dtype": "bfloat16"})

OURS_PIXELS = Contestant("ours", "dVAE fp32", {})
PEER_PIXELS = Contestant("dalle-pytorch", "DiscreteVAE", {"repaired": False})
STEP = Contestant("ours", "fp32", {"precision": "fp32"})
STEP_BF16 = Contestant("ours", "bf16", {"precision": "bf16"})
STEP_AS_SHIPPED = Contestant(
    "ours", "bf16 as train-prior does it: Muon, clipping, averaging", {"precision": "bf16", "work": "train as shipped"}
)
PEER_STEP = Contestant("dalle-pytorch", "fp32", {"precision": "fp32", "repaired": False})
PEER_STEP_BF16 = Contestant("dalle-pytorch", "bf16 by autocast", {"precision": "bf16", "repaired": False})

_OWN = (Versus(OURS_BF16, OURS), Versus(OURS_INT8, OURS))
_GENERATE = {"work": "generate", "guidance": 1.0, "first_row": False}


def cells(shape: Shape) -> tuple[Cell, ...]:
    """Everything that is timed in turns."""
    codes = shape.grid**2
    generate, guided = f"{codes} codes", f"{codes} codes, guidance {GUIDANCE:g}"
    return (
        Cell(
            f"{generate}, batch 1",
            "generate",
            {**_GENERATE, "batch": 1},
            "s",
            (
                Versus(OURS, SHIPPED),
                Versus(OURS, REPAIRED, 2.0),
                Versus(OURS, LLAMA, 1.5),
                Versus(OURS, LLAMA_DYNAMIC),
                Versus(OURS_BF16, LLAMA_BF16),
                *_OWN,
            ),
        ),
        Cell(
            f"{generate}, batch 8",
            "generate",
            {**_GENERATE, "batch": 8},
            "images/s",
            (
                Versus(OURS, SHIPPED, 40.0),
                Versus(OURS, REPAIRED, 3.0),
                Versus(OURS, LLAMA, 1.5),
                Versus(OURS, LLAMA_DYNAMIC),
                Versus(OURS_BF16, LLAMA_BF16),
                *_OWN,
            ),
        ),
        Cell(
            f"{generate}, batch 64",
            "generate",
            {**_GENERATE, "batch": 64},
            "images/s",
            (Versus(OURS, REPAIRED), Versus(OURS, LLAMA), *_OWN),
        ),
        Cell(
            f"{guided}, batch 1",
            "guided",
            {**_GENERATE, "batch": 1, "guidance": GUIDANCE},
            "s",
            (Versus(OURS, BROKEN_GUIDANCE), *_OWN),
        ),
        Cell(f"{guided}, batch 8", "guided", {**_GENERATE, "batch": 8, "guidance": GUIDANCE}, "images/s", _OWN),
        Cell(
            f"first {shape.grid} of {codes} codes, and for ours their picture, batch 1",
            "first",
            {**_GENERATE, "batch": 1, "first_row": True},
            "s",
            (Versus(OURS, LLAMA), *_OWN),
        ),
        *(
            Cell(
                f"{codes} codes to pixels, batch {batch}",
                "pixels",
                {"work": "pixels", "batch": batch},
                "ms",
                (Versus(OURS_PIXELS, PEER_PIXELS),),
            )
            for batch in (1, 8)
        ),
        Cell(
            "training step of the prior, batch 8",
            "train",
            {"work": "train", "batch": 8},
            "ms",
            (
                Versus(STEP, PEER_STEP, 1.3),
                Versus(STEP_BF16, PEER_STEP, 3.0),
                Versus(STEP_BF16, PEER_STEP_BF16),
                Versus(STEP_AS_SHIPPED, PEER_STEP),
            ),
        ),
    )


# Left out of quick runs.
SIDE_ISSUES = (LLAMA_DYNAMIC, LLAMA_BF16, BROKEN_GUIDANCE, STEP_AS_SHIPPED)
