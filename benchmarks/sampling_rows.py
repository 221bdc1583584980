"""What benchmarks/sampling.py makes of its measurements: rows with goals, and the table of docs/sampling.md."""

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from benchmarks.record import Row
from benchmarks.sampling_contestants import (
    LLAMA,
    OURS,
    OURS_BF16,
    OURS_INT8,
    OURS_PIXELS,
    PEER_PIXELS,
    REPAIRED,
    SHIPPED,
    Cell,
    Contestant,
    Shape,
    cells,
)
from benchmarks.sampling_positions import quarters
from benchmarks.sampling_turns import median_ratio

Raw = Mapping[str, Any]
"""threads, shape, "cells": name -> what `measure` returns, "positions": what `measure_positions` returns."""

_FLAT = 0.9  # of the first quarter's time over the last one's, for a mask whose reach does not grow
_MEBI = 2**20


def rows(raw: Raw) -> Iterator[Row]:
    """All rows of a run, as far as it has come."""
    for cell in cells(Shape(**raw["shape"])):
        if cell.name in raw["cells"]:
            found = raw["cells"][cell.name]["contestants"]
            yield from _time_rows(cell, found, threads=raw["threads"])
            if cell.section == "generate":
                yield from _memory_rows(cell, found)
    if raw["positions"] is not None:
        yield from _position_rows(raw["positions"], threads=raw["threads"])


def _time_rows(cell: Cell, found: Mapping[str, Any], *, threads: int) -> Iterator[Row]:
    place, shown = f"{cell.name}, {threads} threads", set()
    for ours, other, goal in cell.versus:
        if ours.name not in found or other.name not in found:
            continue
        shown.add(ours.name)
        name = f"{place}, {ours.variant}"
        against = f"{_title(found, other)}: {_value(cell, found, other):.4g}"
        ratio = median_ratio(found[other.name], found[ours.name])
        yield Row(name, _value(cell, found, ours), cell.unit, against, ratio, goal)
    for contestant in cell.contestants:
        if contestant.side == "ours" and contestant.name in found and contestant.name not in shown:
            name = f"{place}, {contestant.variant}"
            yield Row(name, _value(cell, found, contestant), cell.unit, "", None, None)


def _memory_rows(cell: Cell, found: Mapping[str, Any]) -> Iterator[Row]:
    peaks = {name: one["peak_bytes"] for name, one in found.items()}
    if not peaks.get(OURS.name):
        return
    ours = peaks[OURS.name]
    for peer in (REPAIRED, LLAMA):
        if peaks.get(peer.name):
            against = f"{_title(found, peer)}: {peaks[peer.name] / _MEBI:.4g}"
            name = f"{cell.name}: peak memory over the imports, {OURS.variant}"
            yield Row(name, ours / _MEBI, "MiB", against, peaks[peer.name] / ours, None)


def _position_rows(positions: Mapping[str, Any], *, threads: int) -> Iterator[Row]:
    grid, kinds = positions["grid"], positions["kinds"]
    place = f"{grid}x{grid} codes, batch {positions['batch']}"
    for kind, found in kinds.items():
        first, last = quarters(found["microseconds"])
        name = f"{place}, {threads} threads, {kind} layers: last quarter of decode steps over the first"
        against = f"first: {first / 1000:.4g} ms, last: {last / 1000:.4g} ms"
        yield Row(name, last / first, "", against, first / last, None if kind == "full" else _FLAT)
    whole = kinds["full"]["cache_bytes"]
    for kind, found in kinds.items():
        if kind == "full":
            continue
        against, size = f"full layers: {whole / 1024:.4g}", found["cache_bytes"]
        yield Row(
            f"{grid}x{grid} codes, {kind} layers: cache of one image", size / 1024, "KiB", against, whole / size, None
        )


def table(raw: Raw) -> str:
    """The figures of sampling as a table in Markdown."""
    shape = Shape(**raw["shape"])
    of_batch = {cell.batch: cell for cell in cells(shape) if cell.section == "generate"}
    one_image, *several = of_batch
    (first,) = (cell for cell in cells(shape) if cell.section == "first")
    head = [
        "",
        f"first {shape.grid} codes, s",
        f"image at batch {one_image}, s",
        *(f"images/s at batch {batch}" for batch in several),
        f"peak memory at batch {', '.join(map(str, of_batch))}, MiB",
    ]
    body = []
    for contestant in (OURS, OURS_BF16, OURS_INT8, LLAMA, REPAIRED, SHIPPED):
        measured = {batch: _of(raw, cell, contestant) for batch, cell in of_batch.items()}
        seconds = {batch: median(found["seconds"]) for batch, found in measured.items() if found}
        if not seconds:
            continue
        early = _of(raw, first, contestant)
        peaks = {batch: found["peak_bytes"] for batch, found in measured.items() if found and found["peak_bytes"]}
        row = [
            f"{next(found['version'] for found in measured.values() if found)}, {contestant.variant}",
            # who shows nothing before the end shows its first codes then
            _figure(median(early["seconds"])) if early else f"all: {_figure(seconds.get(one_image))}",
            _figure(seconds.get(one_image)),
            *(_figure(batch / seconds[batch] if batch in seconds else None) for batch in several),
            " / ".join(f"{peaks[batch] / _MEBI:.0f}" if batch in peaks else "-" for batch in of_batch),
        ]
        body.append(f"| {' | '.join(row)} |")
    above = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"] if body else []
    return "\n".join([*above, *body, "", *_pixel_lines(raw, shape)])


def _pixel_lines(raw: Raw, shape: Shape) -> Iterator[str]:
    """What comes on top of the table's times for pixels."""
    for cell in cells(shape):
        ours, peer = _of(raw, cell, OURS_PIXELS), _of(raw, cell, PEER_PIXELS)
        if ours:
            theirs = f", {_title_of(peer, PEER_PIXELS)} {1e3 * median(peer['seconds']):.3g} ms" if peer else ""
            yield f"{cell.name}: ours {1e3 * median(ours['seconds']):.3g} ms{theirs}."


def _of(raw: Raw, cell: Cell, contestant: Contestant) -> Mapping[str, Any] | None:
    return raw["cells"].get(cell.name, {"contestants": {}})["contestants"].get(contestant.name)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _title(found: Mapping[str, Any], contestant: Contestant) -> str:
    return _title_of(found[contestant.name], contestant)


def _title_of(one: Mapping[str, Any], contestant: Contestant) -> str:
    return f"{one['version']}, {contestant.variant}"


def _value(cell: Cell, found: Mapping[str, Any], contestant: Contestant) -> float:
    seconds = median(found[contestant.name]["seconds"])
    return {"s": seconds, "ms": 1000 * seconds, "images/s": cell.batch / seconds}[cell.unit]
