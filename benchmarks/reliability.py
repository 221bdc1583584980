"""What survives: kills, damaged checkpoints, damaged pictures, hostile archives. Counts, not times.

python -m benchmarks.reliability [--quick] [--sections kills checkpoints images tars] [--out FILE]
"""

import argparse
import importlib
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.record import Row, write_results
from tessera.errors import run_command

CLAIM = "a crash loses nothing but time, damage is found, and no file that is read can write or run anything"
SECTIONS = ("kills", "checkpoints", "images", "tars")


def main(argv: Sequence[str]) -> int:
    """Runs the sections in turn and writes after each; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=CLAIM)
    parser.add_argument("--quick", action="store_true", help="about a tenth of everything, within five minutes")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="these; always in this order")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reliability.json"), help="where to write")
    arguments = parser.parse_args(argv)
    rows: list[Row] = []
    raw: dict[str, Any] = {}
    for name in [name for name in SECTIONS if name in arguments.sections]:
        began = time.monotonic()
        # In a process of its own: sections fork, which needs one that has computed nothing, and compare memory.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
            found, details = pool.submit(_measure, name, quick=arguments.quick).result()
        rows += found
        raw[name] = details | {"seconds": round(time.monotonic() - began, 1)}
        write_results(arguments.out, claim=CLAIM, rows=rows, raw=raw, quiet=True)
    write_results(arguments.out, claim=CLAIM, rows=rows, raw=raw)
    return 0 if all(row.holds is not False for row in rows) else 1


def _measure(name: str, *, quick: bool) -> tuple[list[Row], dict[str, Any]]:
    return importlib.import_module(f"benchmarks.reliability_{name}").measure(quick=quick)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
