"""Every shipped configuration of the sparse kernels, compiled for GPUs of compute capability 8.0 and 9.0.

python -m benchmarks.kernel_aot [--quick] [--out benchmarks/results/kernel_aot.json]

Needs no GPU: registers, spills, shared memory and instructions are read out of the machine code. Exit code 1 if a
kernel spills, takes more shared memory than there is, or lacks tensor core instructions or asynchronous copies.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.record import Row, write_results
from tessera.errors import UserError, run_command
from tessera.precision import usable_cores
from transformer.kernels.ahead_of_time import Build, compile_build, one_mask_each, problems, shipped

CLAIM = "every shipped configuration of the sparse kernels compiles without spilled registers"


def main(argv: Sequence[str]) -> int:
    """Compiles, checks and writes one row per kernel, all that was read under "raw"."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_aot", description=CLAIM)
    parser.add_argument("--quick", action="store_true", help="every configuration with one mask instead of up to five")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernel_aot.json"))
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET=1 replaces the compiler; unset it")
    builds = one_mask_each(shipped()) if arguments.quick else shipped()
    rows, raw, failures = [], {}, []
    wrong = 0
    with ProcessPoolExecutor(max_workers=usable_cores()) as pool:
        for build, compiled in zip(builds, pool.map(compile_build, builds), strict=True):
            name = name_of(build)
            found = problems(build, compiled)
            wrong += bool(found)
            failures += [f"{name} {problem}" for problem in found]
            rows.append(Row(name, compiled.registers, f"registers, {compiled.spills} spills", "", None, None))
            raw[name] = compiled._asdict()
    rows.append(
        Row("share of kernels with nothing wrong", 1 - wrong / len(builds), f"of {len(builds)} kernels", "", None, 1.0)
    )
    write_results(arguments.out, claim=CLAIM, rows=rows, raw=raw)
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def name_of(build: Build) -> str:
    """What identifies a kernel: architecture, kernel, format, head width, mask, block sizes."""
    mask, config = build.mask, build.config
    kind = f"conv {mask.conv_mode}" if mask.kind == "conv" else mask.kind
    return (
        f"sm_{build.capability[0]}{build.capability[1]} {build.kernel} {build.number_format} d{build.head_dim} "
        f"{f'group of {build.group}, ' if build.group > 1 else ''}{kind} "
        f"{mask.grid_height}x{mask.grid_width}, blocks {config.block_q}x{config.block_k}, {config.num_warps} warps, "
        f"{config.num_stages} stages"
    )


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
