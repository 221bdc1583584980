"""Sampling from the prior and its training step on a CPU, against dalle-pytorch 1.6.6 and a Llama of transformers.

python -m benchmarks.sampling [--quick] [--out FILE] [--peer-python .venv-peers/bin/python] [--only SECTION ...]
python -m benchmarks.sampling --plot RESULTS.json docs/decode-cost.png
python -m benchmarks.sampling --table RESULTS.json

Random weights, equal shapes (256 channels, 4 layers, 4 heads of 64, 32 text ids, 16 x 16 codes out of 1,024), two
threads for everybody, fp32 unless a row says otherwise, temperature 1 among the most likely tenth, in these sections:

    generate   text ids to codes, batch 1, 8 and 64; dalle-pytorch as shipped, where its cache never reaches the model,
               and with that repaired; transformers' own generate
    guided     the same with guidance 3, which dalle-pytorch does not get right
    first      the first row of codes
    pixels     codes to pixels alone, which is no part of the times above, on either side
    train      forward and backward pass and a step of Adam, from cached codes
    positions  decode steps by position, and cache memory, for each mask kind on 32 x 32 codes

benchmarks/peers/install.sh installs the peers; without them ours is measured alone. Results are written after every
cell: a run that is stopped keeps what it has measured.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from benchmarks.record import write_results
from benchmarks.sampling_contestants import PEER_SIDES, SIDE_ISSUES, Section, Shape, cells
from benchmarks.sampling_positions import draw_positions, measure_positions
from benchmarks.sampling_rows import rows, table
from benchmarks.sampling_turns import Pace, Place, measure
from tessera.errors import UserError, run_command

CLAIM = (
    "on two CPU threads sampling is 40 times as fast as dalle-pytorch 1.6.6 as shipped, 3 times with its cache "
    "repaired, 1.5 times a Llama with a static cache; the cost of a token is flat in its position"
)
_SECTIONS = get_args(Section)
_THREADS = 2


class Scale(NamedTuple):
    """How much is done."""

    pace: Pace
    repeats: int
    """passes over all positions"""
    shape: Shape
    positions_grid: int
    largest_batch: int
    with_side_issues: bool


FULL = Scale(Pace(9, 3, 1.5), 9, Shape(), 32, 64, True)
QUICK = Scale(Pace(3, 1, 0.5), 3, Shape(), 32, 8, False)
DRY = Scale(
    Pace(2, 1, 0.02), 2, Shape(text_len=4, grid=4, text_ids=20, codes=16, dim=64, depth=1, heads=1), 4, 64, True
)


def main(argv: Sequence[str]) -> int:
    """Measures, or draws and prints what was measured; 1 if a contestant failed."""
    arguments = _parser().parse_args(argv)
    if arguments.plot or arguments.table:
        return _show(arguments)
    scale = DRY if arguments.dry else QUICK if arguments.quick else FULL
    peer_python = arguments.peer_python if arguments.peer_python.exists() else None
    if peer_python is None:
        print(f"no peers: {arguments.peer_python} is not there, benchmarks/peers/install.sh makes it", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(
            threads=arguments.threads, peer_python=peer_python, scratch=Path(scratch).absolute(), shape=scale.shape
        )
        out = Path(scratch) / "dry.json" if arguments.dry else arguments.out
        raw = _measure_all(scale, arguments.only or _SECTIONS, place, out)
        if arguments.dry and raw["positions"] is not None:
            draw_positions(raw["positions"]).save(Path(scratch) / "dry.png")
        write_results(out, claim=CLAIM, rows=list(rows(raw)), raw=raw)
    print(f"\n{table(raw)}")
    if arguments.dry:
        print("a dry run: its figures mean nothing, and nothing was kept")
    failed = [f"{name}, {who}: {why}" for name, cell in raw["cells"].items() for who, why in cell["left_out"].items()]
    if failed:
        print(f"{len(failed)} left out: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _measure_all(scale: Scale, sections: Sequence[str], place: Place, out: Path) -> dict[str, Any]:
    """What the rows are made of; written to `out` whenever there is more."""
    raw: dict[str, Any] = {
        "threads": place.threads,
        "shape": scale.shape._asdict(),
        "cells": {},
        "positions": None,
    }
    for cell in cells(scale.shape):
        if cell.section not in sections or cell.batch > scale.largest_batch:
            continue
        contestants = [
            each
            for each in cell.contestants
            if (place.peer_python is not None or each.side not in PEER_SIDES)
            and (scale.with_side_issues or each not in SIDE_ISSUES)
        ]
        print(f"{cell.name}: {len(contestants)} contestants", file=sys.stderr, flush=True)
        raw["cells"][cell.name] = measure(cell, contestants, place, scale.pace)
        write_results(out, claim=CLAIM, rows=list(rows(raw)), raw=raw, quiet=True)
    if "positions" in sections:
        print("decode steps by position", file=sys.stderr, flush=True)
        shape = scale.shape._replace(grid=scale.positions_grid)
        raw["positions"] = measure_positions(shape, threads=place.threads, repeats=scale.repeats)
    return raw


def _show(arguments: argparse.Namespace) -> int:
    """Draws or prints the results of an earlier run."""
    path = Path((arguments.plot or arguments.table)[0])
    if not path.is_file():
        raise UserError(f"there are no results in {path}: python -m benchmarks.sampling --out {path} makes them")
    raw = json.loads(path.read_text())["raw"]
    if arguments.table:
        print(table(raw))
        return 0
    if raw["positions"] is None:
        raise UserError(f"{path} was made without the section positions, which the picture shows")
    picture = Path(arguments.plot[1])
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_positions(raw["positions"]).save(picture)
    print(f"written to {picture}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=CLAIM)
    parser.add_argument("--quick", action="store_true", help="five minutes: short turns, batch 1 and 8, fewer rivals")
    parser.add_argument("--dry", action="store_true", help="two minutes: all of the logic, no figures that count")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sampling.json"), help="where to write")
    parser.add_argument(
        "--peer-python", type=Path, default=Path(".venv-peers/bin/python"), help="interpreter of the peers' environment"
    )
    parser.add_argument("--only", nargs="+", choices=_SECTIONS, help="these sections")
    parser.add_argument("--threads", type=int, default=_THREADS, help="of each process")
    parser.add_argument("--plot", nargs=2, metavar=("RESULTS", "PICTURE"), help="draw cost and memory by mask kind")
    parser.add_argument("--table", nargs=1, metavar="RESULTS", help="print the table of docs/sampling.md")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
