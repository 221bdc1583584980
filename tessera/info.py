"""`tessera info PATH`: what a model, run, checkpoint, token shards or manifest is, and whether it is whole."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tessera.config import to_plain
from tessera.descriptions import describe
from tessera.errors import run_command
from tessera.model_folder import short_sha256
from tessera.one_line_parser import OneLineParser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a description of what lies at a path, as text or as JSON."""
    parser = OneLineParser(
        prog="tessera info",
        description="Describes a model folder, the run folder of a stage or of a fit, a checkpoint, token shards or a "
        "manifest.",
    )
    parser.add_argument("path", type=Path, help="a folder or file of one of these kinds")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of text")
    arguments = parser.parse_args(argv)
    description = describe(arguments.path)
    if arguments.json:
        print(json.dumps(_finite(description), ensure_ascii=False))
    else:
        print("\n".join(_LINES[description["kind"]](description)))
    return 0


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
    for checkpoint in run["checkpoints"]:
        state = "whole" if checkpoint["damage"] is None else f"damaged, {checkpoint['damage']}"
        yield f"  checkpoint of step {checkpoint['step']:,}: {_size(checkpoint['bytes'])}, {state}"
    if not run["checkpoints"]:
        yield "  no checkpoints"
    if run["step"] is not None:
        yield f"  last record at step {run['step']:,}{_of(run['max_steps'])}"
    if run["seconds"] is not None:
        yield f"  {run['seconds']:,.0f} s of training"
    for key, value in run["metrics"].items():
        yield f"    {key} = {_value(value)}"
    for section in ("config", "inputs"):
        if run.get(section):
            yield f"  {section}"
            for key, value in _flat(run[section]):
                yield f"    {key}: {_value(value)}"


def _fit_lines(fit: Mapping[str, Any]) -> Iterator[str]:
    yield f"run folder of a fit {fit['path']}, {'finished' if fit['finished'] else 'not finished'}"
    spent = "" if fit["seconds"] is None else f", {fit['seconds'] / 60:,.1f} of them spent"
    yield f"  {_value(fit['minutes'])} minutes{spent}"
    for name, stage in fit["stages"].items():
        done = "" if not stage["done"] else f", {stage['done']:,}{_of(stage['of'])} {stage['unit']}"
        yield f"  {name:<9} {stage['state']}{done}"
    yield "  request"
    for key, value in fit["request"].items():
        yield f"    {key}: {_value(value)}"


def _checkpoint_lines(checkpoint: Mapping[str, Any]) -> Iterator[str]:
    state = "whole" if checkpoint["damage"] is None else f"damaged, {checkpoint['damage']}"
    yield f"checkpoint {checkpoint['path']}, {_size(checkpoint['bytes'])}, {state}"
    if checkpoint["format"] is not None:
        yield f"  format {checkpoint['format']}"
    if checkpoint["step"] is not None:
        yield f"  after step {checkpoint['step']:,}"
    if checkpoint["seconds"] is not None:
        yield f"  after {checkpoint['seconds']:,.0f} s of training"
    for key, num_bytes in checkpoint["contents"].items():
        yield f"    {key}: {_size(num_bytes)} of tensors"


def _shards_lines(shards: Mapping[str, Any]) -> Iterator[str]:
    index = shards["index"]
    is_complete = shards["complete"] == index.get("num_samples")
    yield f"token shards {shards['path']}, {'complete' if is_complete else 'unfinished'}, {_size(shards['bytes'])}"
    yield f"  {shards['complete']:,}{'' if is_complete else _of(index.get('num_samples'))} samples"
    for key, value in index.items():
        yield f"    {key}: {_value(value)}"


def _manifest_lines(manifest: Mapping[str, Any]) -> Iterator[str]:
    yield f"manifest {manifest['path']} of {manifest['name']}, images in {manifest['root']}"
    counts = (f"{name} {manifest[name]:,}" for name in ("kept", "rejected", "duplicate"))
    yield f"  seen {manifest['seen']:,} = {' + '.join(counts)}"
    for split, count in manifest["splits"].items():
        yield f"  {split}: {count:,}"
    for title, name in (("rejected", "reasons"), ("noted", "notes")):
        if manifest[name]:
            yield f"  {title}"
            for reason, count in manifest[name].items():
                yield f"    {count:,} x {reason}"


_LINES: dict[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "model": _model_lines,
    "run": _run_lines,
    "fit": _fit_lines,
    "checkpoint": _checkpoint_lines,
    "shards": _shards_lines,
    "manifest": _manifest_lines,
}


def _of(number: int | None) -> str:
    return "" if number is None else f" of {number:,}"


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
