"""What lies at a path, in plain values: a model, a run of a stage or fit, a checkpoint, token shards, a manifest."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch

from tessera.data.ingest import is_manifest
from tessera.data.manifest import MANIFEST_NAME, SPLITS, Manifest
from tessera.data.shards import TokenShards
from tessera.errors import UserError
from tessera.model_folder import FORMAT_VERSION, INDEX_FILE, PART_FILES, ModelFolder
from tessera.plain_yaml import read_yaml
from tessera.text_tokenizer import TextTokenizer
from tessera.training.metrics import METRICS_DIR, read_metrics
from tessera.training.stage import CONFIG_FILE, RESULT_FILE

_CHECKPOINTS_DIR = "checkpoints"
_SHARDS_FILE, _JOURNAL_FILE = "index.json", "journal.json"
# What `tessera fit` leaves in the folder that it goes on from.
_PLAN_FILE, _LEDGER_FILE, _TUNING_FILE = "plan.yaml", "seconds.json", "tuning.json"
_TRAINED_STAGES = ("dvae", "prior", "scorer")


def describe(path: Path) -> dict[str, Any]:
    """Describes whatever of ours lies at a path.

    Returns:
        What the function for its kind returns; `kind` says which one that was.

    Raises:
        UserError: if there is nothing, nothing of ours, or something damaged.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file():
        if path.suffix == ".ckpt":
            return describe_checkpoint(path)
        if is_manifest(path):
            return describe_manifest(path)
        raise UserError(f"{path} is neither a checkpoint (.ckpt) nor a manifest ({MANIFEST_NAME})")
    if (path / INDEX_FILE).is_file():
        return describe_model(ModelFolder.open(path))
    if (path / _PLAN_FILE).is_file():
        return describe_fit(path)
    if (path / METRICS_DIR).is_dir() or (path / _CHECKPOINTS_DIR).is_dir():
        return describe_run(path)
    if (path / _SHARDS_FILE).is_file() or (path / _JOURNAL_FILE).is_file():
        return describe_shards(path)
    if (path / MANIFEST_NAME).is_file():
        return describe_manifest(path / MANIFEST_NAME)
    inner = sorted(path.glob(f"*/{INDEX_FILE}"))
    hint = f"; did you mean {inner[0].parent}?" if inner else ""
    raise UserError(
        f"{path} is no model folder ({INDEX_FILE}), run folder ({_PLAN_FILE}, {METRICS_DIR}/ or {_CHECKPOINTS_DIR}/), "
        f"token shards ({_SHARDS_FILE}) or manifest ({MANIFEST_NAME}){hint}"
    )


def describe_model(folder: ModelFolder) -> dict[str, Any]:
    """Describes an opened model folder.

    Returns:
        `kind` "model", `path`, `format_version`, `sha256`, `bytes`, `parts` (for each: `parameters`, `bytes`, `sha256`,
        `requires`, `config`, `metadata`), `layout` of the prior's sequence or None, `tokenizer` (`pieces`, `sha256`) or
        None, and `sampling`, the default settings.
    """
    parts = {name: _describe_part(folder, name) for name in folder.parts}
    tokenizer = None
    if folder.has_tokenizer:
        pieces = TextTokenizer(folder.tokenizer_proto()).vocab_size
        tokenizer = {"pieces": pieces, "sha256": folder.tokenizer_sha256}
    return {
        "kind": "model",
        "path": str(folder.path),
        "format_version": FORMAT_VERSION,
        "sha256": folder.sha256,
        "bytes": sum(part["bytes"] for part in parts.values()),
        "parts": parts,
        "layout": parts["prior"]["config"].get("layout") if "prior" in parts else None,
        "tokenizer": tokenizer,
        "sampling": folder.sampling_defaults(),
    }


def describe_run(path: Path) -> dict[str, Any]:
    """Describes the run folder of a stage; every checkpoint is read to see whether it is whole.

    Returns:
        `kind` "run", `path`, `finished`, `step` of the last record, `max_steps` or None, `seconds` of training or None,
        `checkpoints` (ascending; for each: `step`, `bytes`, `damage`, None if it is whole), `metrics` (the last value
        of everything logged), and `config` and `inputs` as they were when the run began.
    """
    from tessera.training.checkpoint import checkpoint_step, checkpoints, damage  # takes seconds to import

    files = [(file, damage(file)) for file in checkpoints(path / _CHECKPOINTS_DIR)]
    whole = [file for file, reason in files if reason is None]
    series = read_metrics(path)
    result = _read_json(path / RESULT_FILE)
    begun = read_yaml(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else {}
    return {
        "kind": "run",
        "path": str(path),
        "finished": (path / RESULT_FILE).is_file(),
        "step": max((values[-1][0] for values in series.values()), default=None),
        "max_steps": _at(begun, "config", "trainer", "max_steps"),
        "seconds": result.get("seconds") or (_training_seconds(whole[-1]) if whole else None),
        "checkpoints": [
            {"step": checkpoint_step(file), "bytes": file.stat().st_size, "damage": reason} for file, reason in files
        ],
        "metrics": {name: values[-1][1] for name, values in series.items()},
        **begun,
    }


def describe_fit(path: Path) -> dict[str, Any]:
    """Describes the run folder of a fit.

    Returns:
        `kind` "fit", `path`, `finished`, `request` as it was made, `minutes` planned, `seconds` spent or None, and
        `stages` in their order, for each: `state` ("not begun", "begun", "finished" or "taken over"), `done` and `of`,
        in `unit`s, where that is known.
    """
    content = read_yaml(path / _PLAN_FILE)
    plan, request = content.get("plan"), content.get("request")
    if not isinstance(plan, Mapping) or not isinstance(request, Mapping):
        raise UserError(f"{path / _PLAN_FILE} is damaged: it has no plan or no request")
    stages: dict[str, dict[str, Any]] = {}
    for name in _TRAINED_STAGES:
        stages[name] = _describe_stage(path / name, max_steps=_at(plan, name, "trainer", "max_steps"))
    if _at(plan, "origin") is not None and not _at(plan, "origin", "train_dvae"):
        stages["dvae"] = {"state": "taken over", "done": None, "of": None, "unit": "steps"}
    tuned = (path / _TUNING_FILE).is_file()
    return {
        "kind": "fit",
        "path": str(path),
        "finished": (path / RESULT_FILE).is_file(),
        "request": dict(request),
        "minutes": plan.get("minutes"),
        "seconds": _read_json(path / _LEDGER_FILE).get("total"),
        "stages": {
            "dvae": stages["dvae"],
            "encode": _describe_encoding(path / "shards"),
            "prior": stages["prior"],
            "scorer": stages["scorer"],
            "tuning": {"state": "finished" if tuned else "not begun", "done": None, "of": None, "unit": "trials"},
        },
    }


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """Describes one checkpoint file. Nothing in it is executed.

    Returns:
        `kind` "checkpoint", `path`, `bytes`, `damage` (None if it is whole), `format`, `step` and `seconds`, each None
        where it cannot be told, and `contents`, the bytes of tensors below each of its keys.
    """
    from tessera.training.checkpoint import FORMAT_KEY, damage

    content = _load(path)
    return {
        "kind": "checkpoint",
        "path": str(path),
        "bytes": path.stat().st_size,
        "damage": damage(path),
        "format": content.get(FORMAT_KEY),
        "step": content.get("global_step"),
        "seconds": _at(content, "callbacks", "ProgressClock", "seconds"),
        "contents": {str(key): _tensor_bytes(value) for key, value in content.items()},
    }


def describe_shards(path: Path) -> dict[str, Any]:
    """Describes token shards, finished or not.

    Returns:
        `kind` "shards", `path`, `complete` samples, `index`, which says how many there will be and what they were made
        with, and `bytes`.

    Raises:
        UserError: if they are damaged or of another format.
    """
    if (path / _SHARDS_FILE).is_file():
        index = _read_json(path / _SHARDS_FILE)
        complete = len(TokenShards(path))
    else:
        journal = _read_json(path / _JOURNAL_FILE)
        index, complete = journal.get("index", {}), journal.get("complete", 0)
    return {
        "kind": "shards",
        "path": str(path),
        "complete": complete,
        "index": index,
        "bytes": sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
    }


def describe_manifest(path: Path) -> dict[str, Any]:
    """Describes a manifest by its first line and its index; no image is opened.

    Returns:
        `kind` "manifest", `path`, `name` and `root` of the data, `seen`, `kept`, `rejected`, `duplicate`, `splits`
        (records in each), `reasons` of what was rejected and `notes` on what was changed, with their counts.
    """
    manifest = Manifest.read(path)
    header = manifest.header
    return {
        "kind": "manifest",
        "path": str(path),
        "name": header.name,
        "root": header.root,
        "seen": header.seen,
        "kept": header.kept,
        "rejected": header.rejected,
        "duplicate": header.duplicate,
        "splits": {split: len(manifest.of_split(split)) for split in SPLITS},
        "reasons": dict(header.reasons),
        "notes": dict(header.notes),
    }


def _describe_part(folder: ModelFolder, name: str) -> dict[str, Any]:
    file = folder.path / name / "model.safetensors"
    try:
        # The header alone: no tensor is read.
        with safetensors.safe_open(file, framework="pt") as tensors:
            parameters = sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise UserError(f"{file}: not a safetensors file ({error})") from error
    return {
        "parameters": parameters,
        "bytes": sum((folder.path / name / part_file).stat().st_size for part_file in PART_FILES),
        "sha256": folder.part_sha256(name),
        "requires": folder.requires(name),
        "config": folder.config(name),
        "metadata": folder.metadata(name),
    }


def _describe_stage(run_dir: Path, *, max_steps: int | None) -> dict[str, Any]:
    """How far the training of one stage of a fit is, by its newest checkpoint or its result."""
    result = _read_json(run_dir / RESULT_FILE)
    if result:
        state, done = "finished", result.get("steps")
    else:
        state = "begun" if (run_dir / CONFIG_FILE).is_file() else "not begun"
        names = sorted(file.stem for file in run_dir.glob(f"{_CHECKPOINTS_DIR}/step-*[0-9].ckpt"))
        done = int(names[-1].removeprefix("step-")) if names else 0
    return {"state": state, "done": done, "of": max_steps, "unit": "steps"}


def _describe_encoding(shards: Path) -> dict[str, Any]:
    journal, index = _read_json(shards / _JOURNAL_FILE), _read_json(shards / _SHARDS_FILE)
    done, of = index.get("num_samples"), index.get("num_samples")
    if journal:
        done, of = journal.get("complete"), _at(journal, "index", "num_samples")
    state = "finished" if index else "begun" if journal else "not begun"
    return {"state": state, "done": done, "of": of, "unit": "samples"}


def _training_seconds(checkpoint: Path) -> float | None:
    return _at(_load(checkpoint), "callbacks", "ProgressClock", "seconds")


def _load(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's content, its tensors left on the disk; empty where it cannot be read."""
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch raises a dozen types for damaged archives
        return {}
    return content if isinstance(content, dict) else {}


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(_tensor_bytes(item) for item in value.values())
    return sum(_tensor_bytes(item) for item in value) if isinstance(value, (list, tuple)) else 0


def _read_json(file: Path) -> dict[str, Any]:
    """What a JSON file says; empty if there is none."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from error
    return content if isinstance(content, dict) else {}


def _at(mapping: Any, *keys: str) -> Any:
    """The value below nested keys, or None."""
    for key in keys:
        mapping = mapping.get(key) if isinstance(mapping, Mapping) else None
    return mapping
