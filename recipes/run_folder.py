"""The folder that a fit goes on from: what was asked, the plan made of it, what was tuned, and if it is finished."""

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from recipes.plan import Plan
from recipes.plan_sizes import DataFacts
from recipes.tune import Trial, Tuned
from tessera.atomic_write import atomic_write
from tessera.config import from_plain, to_plain
from tessera.errors import UserError
from tessera.model_folder import INDEX_FILE, short_sha256
from tessera.plain_yaml import read_yaml, write_yaml

DEFAULT_MINUTES = 20.0
PLAN_FILE, TUNING_FILE, FINISHED_FILE, LEDGER_FILE = "plan.yaml", "tuning.json", "finished.json", "seconds.json"
DATA_FOLDER = "data"

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for; a run folder goes on only with the same."""

    path: str
    """scenes, emoji, hf:NAME, or a folder or file as an absolute path"""
    minutes: float = DEFAULT_MINUTES
    """time for everything"""
    image_size: tuple[int, int] = (64, 64)
    """height and width in pixels"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    seed: int = 0
    """of all that is random"""
    font: str | None = None
    """color font for emoji"""
    overrides: tuple[str, ...] = ()
    """key=value settings of the plan"""
    init_from: str | None = None
    """model folder to go on from, as an absolute path"""
    init_sha256: str | None = None
    """of that model when it was asked for"""
    train_dvae: bool = False
    """whether its dvae is trained on, too"""

    def __post_init__(self) -> None:
        check_minutes(self.minutes)
        if self.train_dvae and self.init_from is None:
            raise UserError(
                "--train-dvae trains on the dvae of a model: name it with --from, or leave --train-dvae out"
            )


class Stored(NamedTuple):
    """What a run folder remembers of the moment when it was planned."""

    request: Request
    plan: Plan
    facts: DataFacts
    fingerprint: str
    """Of the corpus."""


class RunFolder:
    """Reads and writes a run folder.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def is_planned(self) -> bool:
        """Whether there is a plan to go on with."""
        return (self.path / PLAN_FILE).is_file()

    @property
    def finished_sha256(self) -> str | None:
        """The hash of the model folder when the last step had been made; None before."""
        file = self.path / FINISHED_FILE
        return json.loads(file.read_text())["sha256"] if file.is_file() else None

    def write_plan(self, stored: Stored) -> None:
        """Stores the plan and what it was made for."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_yaml(self.path / PLAN_FILE, to_plain(stored._asdict()))

    def read_plan(self) -> Stored:
        """Reads what `write_plan` wrote.

        Raises:
            UserError: if the file is damaged.
        """
        content = self._read_plan_file()
        return Stored(
            request=self._part(Request, content, "request"),
            plan=self._part(Plan, content, "plan"),
            facts=self._part(DataFacts, content, "facts"),
            fingerprint=str(self._present(content, "fingerprint")),
        )

    def read_request(self) -> Request:
        """The request alone, which is read sooner than the plan.

        Raises:
            UserError: if the file is damaged.
        """
        return self._part(Request, self._read_plan_file(), "request")

    def check_request(self, request: Request) -> None:
        """Raises UserError, naming the difference, if the folder was begun for another request."""
        stored = self.read_request()
        if stored.init_from == request.init_from:
            check_sha256(stored, request.init_sha256)
        before, now = asdict(stored), asdict(request)
        for name, value in now.items():
            if before[name] != value:
                raise UserError(
                    f"{self.path} was begun with {name} {_shown(before[name])}, now it is {_shown(value)}: "
                    "choose another --out, or start over with --fresh"
                )

    def _read_plan_file(self) -> dict[str, Any]:
        return read_yaml(self.path / PLAN_FILE)

    def _part(self, config_class: type[ConfigT], content: dict[str, Any], name: str) -> ConfigT:
        return from_plain(config_class, self._present(content, name), source=str(self.path / PLAN_FILE))

    def _present(self, content: dict[str, Any], name: str) -> Any:
        if name not in content:
            raise UserError(f"{self.path / PLAN_FILE} is damaged: it has no {name!r}; start over with --fresh")
        return content[name]

    def write_tuning(self, tuned: Tuned) -> None:
        """Stores the sampling settings and how they were chosen."""
        with atomic_write(self.path / TUNING_FILE) as temporary:
            temporary.write_text(json.dumps(tuned._asdict(), indent=1))

    def read_tuning(self) -> Tuned | None:
        """What `write_tuning` wrote, or None."""
        file = self.path / TUNING_FILE
        if not file.is_file():
            return None
        content: dict[str, Any] = json.loads(file.read_text())
        return Tuned(content["settings"], content["how"], [Trial(*trial) for trial in content["trials"]])

    def finish(self, sha256: str) -> None:
        """Marks the fit as finished with a model folder of this hash."""
        with atomic_write(self.path / FINISHED_FILE) as temporary:
            temporary.write_text(json.dumps({"sha256": sha256}))


def check_minutes(minutes: float) -> None:
    """Raises UserError if this is no time to plan with: zero, negative, infinite or not a number."""
    if not 0 < 60 * minutes < math.inf:
        raise UserError(f"--minutes must be positive and finite, got {minutes:g}")


def check_sha256(request: Request, found: str | None) -> None:
    """Raises UserError if the model to go on from, of the hash that was found, is not the one that was asked for."""
    if request.init_sha256 is not None and found is not None and found != request.init_sha256:
        raise UserError(
            f"--from {request.init_from} has changed: expected sha256 {short_sha256(request.init_sha256)}..., found "
            f"{short_sha256(found)}...; put it back, choose another --out, or start over with --fresh"
        )


def check_ours(out: Path, run_dir: Path) -> None:
    """Raises UserError if one of the folders exists and is neither empty nor what an earlier fit made."""
    for folder, mark in ((out, INDEX_FILE), (run_dir, PLAN_FILE)):
        if not folder.exists():
            continue
        names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else {""}
        # a fit that was interrupted before it had a plan leaves the images that it has checked
        unplanned = folder == run_dir and names <= {DATA_FOLDER}
        if mark not in names and names and not unplanned:
            raise UserError(f"--fresh: {folder} is not what an earlier fit made; delete it yourself to have it gone")


def start_over(out: Path, run_dir: Path) -> None:
    """Deletes a model folder, and of its run folder all but the checked images, which follow the files.

    Raises:
        UserError: if one of them holds something else.
    """
    check_ours(out, run_dir)
    if out.exists():
        shutil.rmtree(out)
    for entry in run_dir.iterdir() if run_dir.exists() else ():
        if entry.name != DATA_FOLDER:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
