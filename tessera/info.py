"""`tessera info PATH`: what is in a model folder, or how far a run folder has come."""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors

from tessera.config import to_plain
from tessera.errors import UserError, run_command
from tessera.model_folder import FORMAT_VERSION, INDEX_FILE, PART_FILES, ModelFolder, short_sha256
from tessera.one_line_parser import OneLineParser
from tessera.plain_yaml import read_yaml
from tessera.text_tokenizer import TextTokenizer
from tessera.training.metrics import METRICS_DIR, read_metrics
from tessera.training.stage import CONFIG_FILE, RESULT_FILE


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a description of a model folder or of a run folder, as text or as JSON."""
    parser = OneLineParser(prog="tessera info", description="Describes a model folder or the run folder of a stage.")
    parser.add_argument("path", type=Path, help="a model folder or a stage's run folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of text")
    arguments = parser.parse_args(argv)
    path: Path = arguments.path
    if not (path / INDEX_FILE).is_file() and _is_run(path):
        description = describe_run(path)
    else:
        description = describe_model(ModelFolder.open(path))
    if arguments.json:
        print(json.dumps(_finite(description), ensure_ascii=False))
    else:
        print("\n".join(_model_lines(description) if description["kind"] == "model" else _run_lines(description)))
    return 0


def describe_model(folder: ModelFolder) -> dict[str, Any]:
    """Describes an opened model folder in plain values.

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
    """Describes a run folder in plain values.

    Returns:
        `kind` "run", `path`, `finished`, `step` of the last record, `checkpoints` (steps, ascending), `metrics` (the
        last value of everything logged), and `config` and `inputs` as they were when the run began.
    """
    series = read_metrics(path)
    return {
        "kind": "run",
        "path": str(path),
        "finished": (path / RESULT_FILE).is_file(),
        "step": max((values[-1][0] for values in series.values()), default=None),
        "checkpoints": sorted(
            int(file.stem.removeprefix("step-")) for file in path.glob("checkpoints/step-*[0-9].ckpt")
        ),
        "metrics": {name: values[-1][1] for name, values in series.items()},
        **(read_yaml(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else {}),
    }


def _is_run(path: Path) -> bool:
    return (path / METRICS_DIR).is_dir() or (path / "checkpoints").is_dir()


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


def _model_lines(model: Mapping[str, Any]) -> Iterator[str]:
    yield f"model folder {model['path']}"
    yield f"  sha256 {short_sha256(model['sha256'])}, format {model['format_version']}, {_size(model['bytes'])}"
    for name, part in model["parts"].items():
        yield (
            f"  {name:<9} {_count(part['parameters'])} parameters, {_size(part['bytes'])}, "
            f"sha256 {short_sha256(part['sha256'])}"
        )
    layout = model["layout"]
    if layout:
        height, width = layout.get("grid_height"), layout.get("grid_width")
        yield f"  image     grid {height} x {width} (rows x columns), {layout.get('codebook_size')} codes"
        yield f"  text      {layout.get('text_len')} positions, {layout.get('text_vocab_size')} pieces"
    elif model["tokenizer"]:
        yield f"  text      {model['tokenizer']['pieces']} pieces"
    if model["sampling"]:
        yield f"  sampling  {_pairs(model['sampling'])}"
    for name, part in model["parts"].items():
        for key, value in _flat(part["metadata"]):
            yield f"  {name}: {key} = {_value(value)}"


def _run_lines(run: Mapping[str, Any]) -> Iterator[str]:
    yield f"run folder {run['path']}, {'finished' if run['finished'] else 'not finished'}"
    steps = run["checkpoints"]
    yield f"  checkpoints at steps {', '.join(str(step) for step in steps)}" if steps else "  no checkpoints"
    if run["step"] is not None:
        yield f"  last record at step {run['step']}"
    for key, value in run["metrics"].items():
        yield f"    {key} = {_value(value)}"
    for section in ("config", "inputs"):
        if run.get(section):
            yield f"  {section}"
            for key, value in _flat(run[section]):
                yield f"    {key}: {_value(value)}"


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, prefix=f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _finite(value: Any) -> Any:
    """Plain values for JSON, which has no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else to_plain(value)


def _pairs(mapping: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_value(value)}" for key, value in mapping.items())


def _value(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} bytes"


if __name__ == "__main__":
    raise SystemExit(run_command(main, sys.argv[1:]))
