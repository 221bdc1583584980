"""The sampler on one GPU: a prior of 343 million parameters against the time that reading its weights takes.

python -m benchmarks.sampling_gpu [--quick] [--sections SECTION ...] [--minutes 8.5] [--out FILE] [--dry]

24 layers of 1,024 channels and 16 heads, 32 text ids, 16 x 16 and 32 x 32 codes out of 16,384, random weights in bf16
unless a row says otherwise, guidance 3, in these sections:

    correctness     CUDA graphs against the loop without them, logits against the prior's in fp32
    launches        kernels, and launches by the host, for each token
    latency         one image, against the floor bytes of weights / bandwidth of a large copy in the same run
    throughput      images per second, cache and memory of a batch of 64
    deterministic   the same codes alone and in company
    price           what that costs
    peers           a Llama of the same shape in transformers 5, eager and under torch.compile
    compiled        what torch.compile would make of a step; only where --sections asks for it

On an H200 seven to eight minutes are expected (it has not been run there yet), three of them for peers, which compile;
compiled takes another three. Nothing new is begun after --minutes. Results are written after every measurement: a run
that is stopped keeps what it has. --dry takes tiny shapes and a CPU, and keeps nothing.

It needs omegaconf beside torch and triton; without transformers the peers are left out. Wheels of both for a machine
without a network: pip wheel --no-deps omegaconf antlr4-python3-runtime==4.9.3, and pip download of transformers with
huggingface-hub, tokenizers, regex, safetensors, typer and tqdm.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch

from benchmarks.record import write_results
from benchmarks.sampling_gpu_checks import correctness, deterministic
from benchmarks.sampling_gpu_contestants import Shape, has_transformers
from benchmarks.sampling_gpu_sections import (
    PATTERNS,
    GpuBench,
    Scale,
    compiled,
    latency,
    launches,
    peers,
    price,
    throughput,
)
from tessera.errors import UserError, run_command

CLAIM = "one GPU draws images in at most twice the time that reading the weights for every token takes"

Section = Literal["correctness", "launches", "latency", "throughput", "deterministic", "price", "peers", "compiled"]

_SECTIONS: tuple[Section, ...] = get_args(Section)
_USUAL: tuple[Section, ...] = _SECTIONS[:-1]
_QUICK: tuple[Section, ...] = ("correctness", "launches", "latency", "throughput")
_WORK: dict[Section, Callable[[GpuBench, Scale], None]] = {
    "correctness": correctness,
    "launches": launches,
    "latency": latency,
    "throughput": throughput,
    "deterministic": deterministic,
    "price": price,
    "peers": peers,
    "compiled": compiled,
}

FULL = Scale(Shape(), grids=(16, 32), batch=64, rounds=5, eager_rounds=2, prompts=50, minutes=8.5)
QUICK = FULL._replace(grids=(16,), rounds=3, eager_rounds=1, prompts=16, minutes=4.5)
DRY = Scale(
    Shape(text_len=4, text_ids=20, codes=64, dim=64, depth=4, heads=1),
    grids=(4, 5),
    batch=3,
    rounds=2,
    eager_rounds=1,
    prompts=5,
    minutes=9.0,
)


def main(argv: Sequence[str]) -> int:
    """Measures on the GPU; or runs the logic on the CPU and keeps nothing."""
    arguments = _parser().parse_args(argv)
    if arguments.dry:
        with tempfile.TemporaryDirectory() as scratch:
            return _run(DRY, torch.device("cpu"), arguments, out=Path(scratch) / "dry.json")
    if not torch.cuda.is_available():
        print("sampling_gpu measures nothing: torch sees no CUDA GPU; --dry runs its logic on the CPU")
        return 0
    return _run(QUICK if arguments.quick else FULL, torch.device("cuda"), arguments, out=arguments.out)


def _run(scale: Scale, device: torch.device, arguments: argparse.Namespace, *, out: Path) -> int:
    sections = arguments.sections or (_SECTIONS if arguments.dry else _QUICK if arguments.quick else _USUAL)
    minutes = scale.minutes if arguments.minutes is None else arguments.minutes
    if minutes <= 0:
        raise UserError(f"--minutes must be above 0; got {minutes:g}")
    bench = GpuBench(device, claim=CLAIM, out=out, rounds=scale.rounds, minutes=minutes)
    bench.raw["shape"] = scale.shape._asdict()
    for section in _SECTIONS:
        if section in sections:
            bench.tries(section, partial(_WORK[section], bench, scale))
    if arguments.dry:
        _check_dry_run(bench, sections)
        print(f"a dry run on the CPU: {len(bench.rows)} rows, whose figures mean nothing; nothing was measured or kept")
        return 0
    write_results(out, claim=CLAIM, rows=bench.rows, raw=bench.raw)
    return 1 if bench.raw["failures"] else 0


def _check_dry_run(bench: GpuBench, sections: Sequence[Section]) -> None:
    """Fails where the benchmark's own logic is wrong."""
    failures, skipped = bench.raw["failures"], bench.raw["skipped"]
    assert not failures and not skipped, f"the dry run failed at {failures} and did not get to {skipped}"
    stored = json.loads(bench.out.read_text())
    assert len(stored["rows"]) == len(bench.rows) > 0
    expected = {
        "correctness": ("graph", "logits"),
        "launches": ("launches",),
        "latency": ("latency",),
        "throughput": ("throughput",),
        "deterministic": ("mixes",),
        "price": ("price",),
        "peers": ("peers",) if has_transformers() else (),
        "compiled": ("compiled",),
    }
    for section in sections:
        for key in expected[section]:
            assert stored["raw"].get(key), f"section {section} stored no {key}"
    for row in bench.rows:
        assert row.value == row.value and (row.ratio is None or row.ratio > 0), f"no figure: {row}"
        # on a CPU rows are independent, and int8 and bf16 differ from fp32 by rounding alone
        is_check = "share of" in row.unit or "relative error" in row.name
        assert not is_check or row.holds in (True, None), f"a check failed: {row}; {stored['raw'].get('mixes')}"
    if "latency" in sections:
        cells = [cell for of_grid in stored["raw"]["latency"].values() for cell in of_grid.values()]
        assert len(cells) == len(DRY.grids) * len(PATTERNS)
        assert all(len(cell["samples"]["CUDA graph"]["seconds"]) == DRY.rounds for cell in cells)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling_gpu", description=CLAIM)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, 16 x 16 codes alone, at most 4.5 minutes")
    parser.add_argument("--dry", action="store_true", help="the logic on the CPU with tiny shapes; keeps no figures")
    parser.add_argument("--sections", nargs="+", choices=_SECTIONS, help="these; always in the order above")
    parser.add_argument("--minutes", type=float, help=f"begin nothing new after these; {FULL.minutes:g} by default")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sampling_gpu.json"), help="where to write")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
