"""The one format of all benchmark results: claim, device, versions, commit and rows."""

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


def write_results(
    path: Path, *, claim: str, rows: Sequence[Row], raw: Mapping[str, Any] | None = None, quiet: bool = False
) -> None:
    """Writes one JSON object and prints its rows.

    Args:
        path: file to write.
        claim: what the rows bear out.
        rows: the measurements.
        raw: what they were computed from, such as every sample; stored beside them.
        quiet: print nothing.
    """
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]  # a changed tree says so
    try:
        commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # no git on this machine
        commit = ""
    commit = commit or os.environ.get("TESSERA_COMMIT", "")  # of a copy without its history
    result: dict[str, Any] = {
        "claim": claim,
        "device": describe_hardware(),
        "versions": versions(),
        "commit": commit or "unknown",
        "rows": [{**row._asdict(), "holds": row.holds} for row in rows],
    }
    if raw is not None:
        result["raw"] = raw
    path.parent.mkdir(parents=True, exist_ok=True)
    # whoever is stopped while writing leaves the file of before
    part = path.with_name(f"{path.name}.part")
    part.write_text(_numbers_on_one_line(json.dumps(result, indent=1)) + "\n")
    part.replace(path)
    if quiet:
        return
    for row in rows:
        compared = f"  against {row.against}, ratio {row.ratio:.2f}" if row.ratio is not None else ""
        judged = "" if row.goal is None else f"  goal {row.goal:g}: {'holds' if row.holds else 'fails'}"
        print(f"{row.name}: {row.value:.4g} {row.unit}{compared}{judged}")
    print(f"written to {path}")


def _numbers_on_one_line(text: str) -> str:
    """Indented JSON with every list of plain numbers on one line."""
    return re.sub(r"\[[-\d\s.,eE+]+\]", lambda numbers: "[" + " ".join(numbers[0][1:-1].split()) + "]", text)
