"""What makes a stage repeatable: its run folder remembers the configuration and, once it is done, the result.

Running a finished stage again costs nothing; running an interrupted one resumes it, elsewhere and on other hardware,
too; running another configuration in the same folder is refused, because its checkpoints would not fit.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn

from tessera.atomic_write import atomic_write
from tessera.config import from_plain, to_plain
from tessera.errors import UserError
from tessera.model_folder import ModelFolder
from tessera.plain_yaml import read_yaml, write_yaml

CONFIG_FILE = "config.yaml"
RESULT_FILE = "finished.json"

# Where and with what a run is computed, not what: what is read is compared by its hashes.
_MAY_CHANGE = frozenset(
    {"config.run_dir", "config.out", "config.shards", "config.init_from"}
    | {f"config.data.{name}" for name in ("path", "cache_dir", "cache_gib")}
    | {
        f"config.trainer.{name}"
        for name in (
            "device",
            "strategy",
            "accumulate",
            "checkpoint_activations",
            "compile",
            "num_workers",
            "log_every_steps",
            "validate_every_steps",
            "checkpoint_every_seconds",
            "checkpoint_every_steps",
            "wandb_project",
        )
    }
)


def begin(run_dir: Path, config: Any, *, inputs: dict[str, str]) -> dict[str, Any] | None:
    """Claims a run folder for a configuration.

    Args:
        run_dir: made if absent.
        config: the stage's dataclass.
        inputs: hashes of what the stage reads (corpus, tokenizer, dVAE ...); a change of input is another run.

    Returns:
        The stored result if this very run has finished, else None.

    Raises:
        UserError: if the folder holds a run of another configuration. Folders, hardware, and how often something is
            saved or shown may have changed.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    resolved = {"config": to_plain(config), "inputs": inputs}
    path = run_dir / CONFIG_FILE
    begun = None
    if path.exists():
        begun = read_yaml(path)
        # Settings that there were none of when it began have their defaults.
        begun["config"] = to_plain(from_plain(type(config), begun["config"], source=str(path)))
        difference = _first_difference(begun, resolved, "")
        if difference is not None:
            raise UserError(
                f"{run_dir} holds another run: {difference}; choose another run_dir or delete that folder to start over"
            )
    result = run_dir / RESULT_FILE
    if result.exists():
        return json.loads(result.read_text())
    if begun != resolved:
        write_yaml(path, resolved)
    return None


def finish(run_dir: Path, result: dict[str, Any]) -> None:
    """Stores the result of a run that is done."""
    with atomic_write(run_dir / RESULT_FILE) as temporary:
        temporary.write_text(json.dumps(result, indent=1))


def weights_to_start_from(init_from: str, part: str, *, tokenizer_sha256: str | None = None) -> ModelFolder:
    """Opens the model folder whose weights a stage starts from.

    Args:
        init_from: the folder.
        part: what is taken from it.
        tokenizer_sha256: of the text tokenizer that will be trained with; None where the part reads no text.

    Raises:
        UserError: if the folder has no such part, or one that was trained with another tokenizer.
    """
    folder = ModelFolder.open(init_from, parts=[part])
    trained_with = folder.requires(part).get("tokenizer")
    if tokenizer_sha256 is not None and trained_with != tokenizer_sha256:
        raise UserError(
            f"init_from={init_from}: its {part} was trained with another text tokenizer, whose ids mean other words: "
            "copy that folder's tokenizer.model into the new model folder first, or train from the start"
        )
    return folder


def start_from(model: nn.Module, folder: ModelFolder, part: str) -> None:
    """Loads a part's weights into a model of the same sizes."""
    model.load_state_dict(folder.tensors(part))


def _first_difference(old: Any, new: Any, key: str) -> str | None:
    if key in _MAY_CHANGE:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        for name in (*old, *(name for name in new if name not in old)):
            found = _first_difference(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
            if found is not None:
                return found
        return None
    return None if old == new else f"{key} was {old!r} and is now {new!r}"
