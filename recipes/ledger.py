"""What a journey has spent so far, phase by phase, on disk: an interrupted one goes on with the rest of its budget."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tessera.atomic_write import atomic_write


class Ledger:
    """Seconds per phase, kept in a JSON file.

    Time is counted from `started` on, including what lies between phases; a process that is killed loses at most its
    running phase.

    Args:
        path: the file; read if it is there.
        started: `time.monotonic()` when this process began its work.
    """

    def __init__(self, path: Path, *, started: float) -> None:
        self.path = path
        self.started = started
        stored = json.loads(path.read_text()) if path.exists() else {}
        self.spent: dict[str, float] = stored.get("spent", {})
        self.budgets: dict[str, float] = stored.get("budgets", {})
        self.total_before: float = stored.get("total", 0.0)

    @property
    def total(self) -> float:
        """Seconds in this process and in the ones that it continues."""
        return self.total_before + time.monotonic() - self.started

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block to a phase, also when it is interrupted."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + time.monotonic() - began
            self.save()

    def budget(self, name: str, seconds: float) -> float:
        """The budget that a phase was given when it first began; `seconds` if it begins now."""
        if name not in self.budgets:
            self.budgets[name] = round(seconds, 1)
            self.save()
        return self.budgets[name]

    def save(self) -> None:
        """Writes the file."""
        content = {"total": self.total, "spent": self.spent, "budgets": self.budgets}
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps(content, indent=1))
