"""The one format of all benchmark results: claim, device, versions, commit and rows."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tessera.precision import describe_hardware, versions


class Row(NamedTuple):
    """One measurement.

    Attributes:
        name: what was measured.
        value: ours.
        unit: of the value.
        against: the peer with its version and value, or "" for a plain goal.
        ratio: ours over the peer's in the same run, above 1 is better for us; None without a peer.
        goal: what the ratio (or, without a peer, the value) should reach; None where there is no such thing.
    """

    name: str
    value: float
    unit: str
    against: str
    ratio: float | None
    goal: float | None

    @property
    def holds(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        if self.goal is None:
            return None
        return (self.value if self.ratio is None else self.ratio) >= self.goal


def write_results(path: Path, *, claim: str, rows: Sequence[Row]) -> None:
    """Writes one JSON object and prints its rows."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]  # a changed tree says so
    commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "claim": claim,
        "device": describe_hardware(),
        "versions": versions(),
        "commit": commit or "unknown",
        "rows": [{**row._asdict(), "holds": row.holds} for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        compared = f"  against {row.against}, ratio {row.ratio:.2f}" if row.ratio is not None else ""
        judged = "" if row.goal is None else f"  goal {row.goal:g}: {'holds' if row.holds else 'fails'}"
        print(f"{row.name}: {row.value:.4g} {row.unit}{compared}{judged}")
    print(f"written to {path}")
