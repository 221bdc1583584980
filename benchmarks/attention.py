"""The sparse attention kernels on one GPU against PyTorch's dense attention and FlexAttention, side by side in one run.

python -m benchmarks.attention [--quick] [--only CELL ...] [--sections SECTION ...] [--minutes 9] [--out FILE] [--dry]

Medians of 50 rounds in turns, the L2 cache flushed before each sample; masks and block lists are built beforehand.
Whatever does not run is named and left out. Results are written after every cell: a run that is stopped keeps what it
has measured. --dry takes tiny shapes, a CPU and Triton's interpreter, and keeps nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch

from benchmarks.attention_cells import (
    GOALS,
    Ceilings,
    Cell,
    Goals,
    Group,
    Timing,
    cases,
    decode_cells,
    dispatch_cells,
    speed_cells,
    speed_rows,
)
from benchmarks.attention_contestants import contestants, dispatched, is_flash_installed, wrong_contestant
from benchmarks.attention_sections import Bench, Section, correctness, decode, memory, speed, tune, tune_decode
from benchmarks.record import write_results
from tessera.errors import UserError, run_command

CLAIM = "the sparse attention kernels beat dense attention and FlexAttention on DALL-E's masks, at like errors"

SectionName = Literal["correctness", "forward", "backward", "decode", "memory", "dispatch", "tune"]

_SECTIONS = get_args(SectionName)
_COMPILING: tuple[SectionName, ...] = ("correctness", "forward", "backward", "tune")
_PRIOR_HEADS = 16  # of 64 channels: about 300 million parameters in 24 layers
_RECOMPILATIONS = 64  # of FlexAttention in one cell: every variant counts
_AHEAD_SHARE = 0.3  # of the time, after which compiling ahead is given up


class Scale(NamedTuple):
    """How much is done."""

    rounds: int
    minutes: float
    depth: int  # of the prior whose memory is measured
    steps: int  # of its training
    candidates: int | None  # launch configurations of each kernel; None takes all


FULL = Scale(50, 9.0, 24, 5, None)
QUICK = FULL._replace(rounds=15, minutes=4.5, depth=6)
DRY = Scale(1, 9.0, 2, 1, 2)


def main(argv: Sequence[str]) -> int:
    """Measures on the GPU; or runs the logic on the CPU and keeps nothing."""
    arguments = _parser().parse_args(argv)
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if arguments.dry:
        if not is_interpreted:  # Triton reads it when kernels are defined
            print("dry run: starting again under TRITON_INTERPRET=1 and without GPUs", flush=True)
            environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
            os.execve(sys.executable, [sys.executable, "-m", "benchmarks.attention", *argv], environment)
        with tempfile.TemporaryDirectory() as scratch:
            return _run(DRY, torch.device("cpu"), arguments, out=Path(scratch) / "dry.json")
    if not torch.cuda.is_available():
        print("attention measures nothing: torch sees no CUDA GPU; --dry runs its logic on the CPU")
        return 0
    if is_interpreted:
        raise UserError("attention measures nothing under TRITON_INTERPRET=1; unset it, or take --dry")
    return _run(QUICK if arguments.quick else FULL, torch.device("cuda"), arguments, out=arguments.out)


def _run(scale: Scale, device: torch.device, arguments: argparse.Namespace, *, out: Path) -> int:
    is_dry = device.type == "cpu"
    rounds, minutes = arguments.rounds or scale.rounds, arguments.minutes or scale.minutes
    torch._dynamo.config.recompile_limit = _RECOMPILATIONS
    every = [cell.name for cell in speed_cells() + decode_cells() + dispatch_cells()]
    if arguments.only and not any(name.startswith(tuple(arguments.only)) for name in every):
        raise UserError(f"no cell begins with {' or '.join(arguments.only)}; there are {', '.join(every)}")
    cells = _chosen(speed_cells(dry=is_dry), arguments.only)
    sections: list[SectionName] = [section for section in _SECTIONS if section in arguments.sections]
    bench = Bench(device, claim=CLAIM, out=out, rounds=rounds, minutes=minutes)
    bench.raw["seed"] = torch.seed()
    bench.raw["FLASH backend of FlexAttention"] = "installed" if is_flash_installed() else "not installed"
    compiling = [section for section in sections if section in _COMPILING]
    if arguments.ahead and compiling:
        some = cells[:1] if is_dry else cells
        bench.tries(f"compiling in {len(some)} processes", partial(_compile_ahead, bench, some, compiling))
    if "correctness" in sections:
        correctness(bench, _chosen(cases(dry=is_dry), arguments.only), speed_cells(dry=is_dry)[0])
    tuning_seconds = 60 * arguments.autotune
    timed: list[Section] = [section for section in get_args(Section) if section in sections]
    for cell in cells if timed else []:
        entered = contestants(cell, device, tune_flex=tuning_seconds > 0)
        entered += [wrong_contestant(cell)] if is_dry else []
        work = partial(speed, bench, cell, entered, timed, tuning_seconds=tuning_seconds)
        tuning_seconds -= bench.tries(f"{cell.name}: {' and '.join(timed)}", work) or 0.0
    for cell in _chosen(decode_cells(dry=is_dry), arguments.only) if "decode" in sections else []:
        bench.tries(cell.name, partial(decode, bench, cell))
    if "memory" in sections:
        cell = speed_cells(dry=is_dry)[0]
        cell = cell._replace(heads=min(cell.heads, _PRIOR_HEADS))
        train = partial(memory, bench, cell, depth=scale.depth, steps=scale.steps)
        bench.tries("memory of a training step", train)
    for cell in _chosen(dispatch_cells(dry=is_dry), arguments.only) if "dispatch" in sections else []:
        entered, both = dispatched(cell, device), get_args(Section)
        bench.tries(f"dispatch of {cell.name}", partial(speed, bench, cell, entered, both, tuning_seconds=0))
    few = slice(0, 1 if is_dry else None)
    for cell in cells[few] if "tune" in sections else []:
        bench.tries(f"tune {cell.name}", partial(tune, bench, cell, limit=scale.candidates))
    for cell in _chosen(decode_cells(dry=is_dry), arguments.only)[few] if "tune" in sections else []:
        bench.tries(f"tune {cell.name}", partial(tune_decode, bench, cell, limit=scale.candidates))
    if is_dry:
        _check_dry_run(bench, cells, sections)
        print(f"a dry run on the CPU: {len(bench.rows)} rows, whose figures mean nothing; nothing was measured or kept")
        return 0
    write_results(out, claim=CLAIM, rows=bench.rows, raw=bench.raw)
    return 0


def _chosen(named: Iterable, only: Sequence[str]) -> list:
    """Cells or cases whose name begins with one of these; all without any."""
    return [one for one in named if not only or one.name.startswith(tuple(only))]


def _compile_ahead(bench: Bench, cells: Sequence[Cell], sections: Sequence[SectionName]) -> None:
    """Runs every cell once in a process of its own, all at a time, for what they leave in the compilers' caches."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "benchmarks.attention", "--no-ahead", "--rounds", "1", "--sections", *sections]
        command += ["--dry"] if bench.is_dry else []
        # every process would start a pool of its own with as many workers as there are cores
        environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
        processes = {
            cell.name: subprocess.Popen(
                [*command, "--only", cell.name, "--out", f"{scratch}/{cell.name}.json"],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for cell in cells
        }
        latest = bench.began + _AHEAD_SHARE * (bench.deadline - bench.began)
        try:
            for name, process in processes.items():
                code = process.wait(timeout=max(0.0, latest - time.monotonic()))
                if code != 0:
                    bench.fails(f"compiling {name} ahead", RuntimeError(f"exit code {code}"))
        except subprocess.TimeoutExpired as error:
            bench.fails("compiling ahead", error)
        finally:
            for process in processes.values():
                process.kill()
                process.wait()


def _check_dry_run(bench: Bench, cells: Sequence[Cell], sections: Sequence[SectionName]) -> None:
    """Fails where the benchmark's own logic is wrong."""
    failures = bench.raw["failures"]
    assert not bench.raw["skipped"], f"the dry run did not get to {bench.raw['skipped']}"
    expected = (", wrong, ", "SDPA cudnn", "SDPA efficient")  # the two exist on GPUs only; so do gradients of Flex
    odd = [
        what
        for what in failures
        if not any(name in what for name in expected) and not ("Flex" in what and what.endswith("backward"))
    ]
    assert not odd, f"left out: {odd}"
    for section in ("forward", "backward"):
        for cell in cells if section in sections else []:
            reason = failures.get(f"{cell.name}, wrong, {section}", "")
            assert "wrong output" in reason, f"the check of {cell.name} let a wrong {section} pass: {reason}"
            samples = bench.raw["samples"][cell.name][section]
            assert {"ours", "SDPA flash", "SDPA masked"} <= samples.keys(), f"{cell.name}, {section}: {samples.keys()}"
            assert all(len(values) == bench.rounds for values in samples.values())
    stored = json.loads(bench.out.read_text())
    assert len(stored["rows"]) == len(bench.rows) and stored["raw"]["samples" if "forward" in sections else "seed"]
    # invented times, of which every ratio is known: what took part as number n takes n times as long as ours
    timings = [Timing(group, group, 10.0 * number) for number, group in enumerate(get_args(Group), start=1)]
    for cell in speed_cells():
        goals = GOALS.get(cell.name, Goals())
        wanted = {
            False: [goals.sdpa, None, goals.flex, goals.flex_column_major, goals.best_flex, None, None, goals.floor],
            True: [goals.sdpa_training, None, None, None, goals.best_flex_training, None, None, None],
        }
        for training, of_rows in wanted.items():
            rows = list(speed_rows(cell, timings, Ceilings(8e14, 4e12), training=training))
            assert [row.ratio and round(row.ratio) for row in rows] == [2, 3, 4, 5, 4, 7, 8, None], rows
            assert [row.goal for row in rows] == of_rows and rows[-1].value > 0, rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=CLAIM)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, a smaller prior, at most 4.5 minutes")
    parser.add_argument("--dry", action="store_true", help="the logic on the CPU with tiny shapes; keeps no figures")
    parser.add_argument("--only", nargs="+", default=[], metavar="CELL", help="cells whose names begin so: T64-G32-row")
    parser.add_argument(
        "--sections", nargs="+", choices=_SECTIONS, default=_SECTIONS, help="these; always in this order"
    )
    parser.add_argument("--minutes", type=float, help=f"begin nothing new after these; {FULL.minutes:g} by default")
    parser.add_argument("--rounds", type=int, help=f"samples of each time; {FULL.rounds} by default")
    parser.add_argument(
        "--autotune", type=float, default=0.0, metavar="MINUTES", help="let FlexAttention search for so long in all"
    )
    parser.add_argument(
        "--no-ahead", dest="ahead", action="store_false", help="compile one after the other, in this process"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention.json"), help="where to write")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
