"""The sections of benchmarks/attention.py: what is checked and timed for a cell, and stored as soon as it is known."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from benchmarks.attention_cells import LARGEST_ERROR_RATIO, Case, Cell, Timing, against, decode_rows, speed_rows
from benchmarks.attention_contestants import Contestant, decoders
from benchmarks.attention_measures import (
    Passes,
    Stopwatch,
    errors,
    median,
    module_errors,
    passes,
    relative_error,
    training_cost,
)
from benchmarks.record import Row, write_results
from transformer.cache_layout import CacheLayout
from transformer.kernels import reference
from transformer.kernels.launch_config import KernelName, LaunchConfig, candidates
from transformer.masks import AttentionMask

# B batch, H heads, N positions, D head width.

Section = Literal["forward", "backward"]

_CHECKED_HEADS = 2  # of the first batch entry: the reference takes N x N numbers for each
_TOLERANCES = {torch.bfloat16: 2e-2, torch.float32: 1e-3}  # relative errors of whoever may be timed
_STEPS_PER_GRAPH = 20
_GIB = 2**30

T = TypeVar("T")
_Launch = Callable[[LaunchConfig | None], Sequence[Tensor]]


class Bench:
    """What has been measured so far, and where it goes.

    Args:
        device: where everything runs; nothing is measured on a CPU.
        claim: of the results file.
        out: results file.
        rounds: samples of each time.
        minutes: nothing new is begun after these.
    """

    def __init__(self, device: torch.device, *, claim: str, out: Path, rounds: int, minutes: float) -> None:
        self.device, self.claim, self.out, self.rounds = device, claim, out, rounds
        self.is_dry = device.type == "cpu"
        self.began = time.monotonic()
        self.deadline = self.began + 60 * minutes
        self.rows: list[Row] = []
        self.raw: dict[str, Any] = {"failures": {}, "skipped": []}
        self.stopwatch = Stopwatch(device)
        self.ceilings = self.stopwatch.ceilings()
        self.stores([], "ceilings", raw=self.ceilings._asdict())

    def tries(self, what: str, work: Callable[[], T]) -> T | None:
        """Does something if there is time left; says so either way, and names it where it fails."""
        now = time.monotonic()
        is_over = now >= self.deadline
        print(f"[{now - self.began:4.0f} s] {'no time left for ' if is_over else ''}{what}", flush=True)
        if is_over:
            self.raw["skipped"].append(what)
            return None
        try:
            return work()
        except Exception as error:
            self.fails(what, error)
            return None
        finally:
            torch._dynamo.reset()  # compiled variants of FlexAttention
            if not self.is_dry:
                torch.cuda.empty_cache()

    def fails(self, what: str, error: BaseException) -> None:
        """Names what did not run, with the first line of the reason."""
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        self.raw["failures"][what] = reason = f"{type(error).__name__}: {first}"
        print(f"    {what} is left out: {reason}", flush=True)

    def stores(self, rows: Iterable[Row], *keys: str, raw: Any) -> None:
        """Adds rows and what they were computed from, under nested keys, and writes the file."""
        place = self.raw
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = raw
        self.rows += rows
        write_results(self.out, claim=self.claim, rows=self.rows, raw=self.raw, quiet=True)


def correctness(bench: Bench, cases: Sequence[Case], layer: Cell) -> None:
    """Errors of outputs and gradients next to those of SDPA's math backend; equal bits; compiled and recomputed."""
    repeatable = []
    for case in cases:
        found = bench.tries(f"correctness of {case.name}", partial(errors, case, bench.device))
        if found is None:
            continue
        repeatable.append(found.is_repeatable)
        ratios = [theirs / ours if ours else math.inf for ours, theirs in zip(found.ours, found.math, strict=True)]
        worst = min(range(len(ratios)), key=lambda place: -math.inf if math.isnan(ratios[place]) else ratios[place])
        name = f"{case.name}: largest error of the {Passes._fields[worst].replace('_', ' ')}"
        dtype = str(case.dtype).removeprefix("torch.")
        peer = f"torch {torch.__version__} SDPA math in {dtype}: {found.math[worst]:.3g}"
        row = Row(name, found.ours[worst], "", peer, ratios[worst], 1 / LARGEST_ERROR_RATIO)
        bench.stores([row], "errors", case.name, raw=found._asdict())
    if repeatable:
        name = "outputs and gradients of the same bits when run again on memory full of NaN"
        share = sum(repeatable) / len(repeatable)
        bench.stores([Row(name, share, f"share of {len(repeatable)} cases", "", None, 1.0)], "repeatable", raw=share)
    what = "a layer under torch.compile and checkpointing"
    for how, error in (bench.tries(what, partial(module_errors, layer, bench.device)) or {}).items():
        holds = float(error <= _TOLERANCES[layer.dtype])
        row = Row(f"a layer around ours, {how}: agrees with eager", holds, "", "", None, 1.0)
        bench.stores([row], "layer", how, raw=error)


class _Entrant(NamedTuple):
    """A contestant and its queries, keys, values and gradient of the output, each [B, H, N, D]."""

    contestant: Contestant
    tensors: list[Tensor]

    def work(self, section: Section, device: torch.device) -> Callable[[], Sequence[Tensor]]:
        """What is timed; in the forward pass too tensors want gradients, as in training."""
        attend = self.contestant.attend
        if section == "backward":
            return lambda: passes(attend, *self.tensors)
        # FlexAttention on a CPU refuses tensors that want gradients
        leaves = [tensor.detach().requires_grad_(device.type == "cuda") for tensor in self.tensors[:3]]
        return lambda: [attend(*leaves)]


def speed(
    bench: Bench, cell: Cell, contestants: Sequence[Contestant], sections: Sequence[Section], *, tuning_seconds: float
) -> float:
    """Checks the contestants of a cell and times those that are right, against each other.

    Args:
        bench: receives the results.
        cell: the cell.
        contestants: who takes part.
        sections: what is timed.
        tuning_seconds: those that tune in their first call take part while this lasts.

    Returns:
        The seconds that tuning took.
    """
    drawn = [_random(bench, cell) for _ in range(4)]
    tensors: dict[Tensor | None, list[Tensor]] = {None: drawn}
    right: dict[AttentionMask, Passes] = {}
    able: dict[Section, dict[str, _Entrant]] = {section: {} for section in sections}
    tuned = 0.0
    for contestant in contestants:
        mask, order, name = contestant.mask, contestant.order, contestant.name
        if contestant.is_tuning and tuned >= tuning_seconds:
            bench.raw["skipped"].append(f"{cell.name}, {name}")
            continue
        if mask not in right:
            first = [tensor[:1, :_CHECKED_HEADS].double() for tensor in drawn]
            right[mask] = passes(partial(reference.attention, mask=mask), *first)
        if order not in tensors:
            tensors[order] = [tensor[:, :, order] for tensor in drawn]
        expected = [tensor if order is None else tensor[:, :, order] for tensor in right[mask]]
        entrant = _Entrant(contestant, tensors[order])
        began = time.monotonic()
        for section in sections:
            try:
                _check(entrant.work(section, bench.device)(), expected, cell.dtype)
                able[section][name] = entrant
            except Exception as error:
                bench.fails(f"{cell.name}, {name}, {section}", error)
        seconds = time.monotonic() - began
        tuned += seconds if contestant.is_tuning else 0.0
        bench.raw.setdefault("first_call_seconds", {})[f"{cell.name}, {name}"] = round(seconds, 2)
    for section, entrants in able.items():
        works = {name: entrant.work(section, bench.device) for name, entrant in entrants.items()}
        samples = bench.stopwatch.in_turns(works, rounds=bench.rounds)
        timings = [Timing(name, entrant.contestant.group, median(samples[name])) for name, entrant in entrants.items()]
        rows = speed_rows(cell, timings, bench.ceilings, training=section == "backward")
        bench.stores(rows, "samples", cell.name, section, raw=samples)
        print("".join(f"    {section} {timing.microseconds:8.1f} us  {timing.name}\n" for timing in timings), end="")
    return tuned


def decode(bench: Bench, cell: Cell) -> None:
    """Steps in the middle and at the end of an image, as CUDA graphs and one by one."""
    mask = cell.mask
    query, key, value = (_random(bench, cell) for _ in range(3))
    q, k, v = (tensor[:1, :_CHECKED_HEADS].double() for tensor in (query, key, value))
    cached_bytes = 1 if bench.is_dry else bench.stopwatch.flush_bytes
    for position in (mask.text_len + mask.image_len // 2, mask.seq_len - 1):
        works: dict[str, dict[str, Callable[[], object]]] = {"CUDA graph": {}, "eager": {}}
        calls = {}
        for decoder in decoders(query, key, value, position, mask, cached_bytes=cached_bytes):
            what = f"{cell.name}, position {position}, {decoder.name}"
            steps = decoder.steps * (1 if bench.is_dry else math.ceil(_STEPS_PER_GRAPH / len(decoder.steps)))
            calls[decoder.name] = len(steps)
            try:
                expected = reference.attention(q, k, v, decoder.mask)[:, :, position : position + 1]
                _check([steps[0](), steps[-1]()], [expected, expected], cell.dtype)
                works["eager"][decoder.name] = lambda steps=steps: [step() for step in steps]
                works["CUDA graph"][decoder.name] = bench.stopwatch.graph(steps)
            except Exception as error:
                bench.fails(what, error)
        for how, of_name in works.items():
            samples = bench.stopwatch.in_turns(of_name, rounds=bench.rounds, hide_host=how == "CUDA graph")
            each = {name: [round(value / calls[name], 3) for value in values] for name, values in samples.items()}
            medians = {name: median(values) for name, values in each.items()}
            rows = decode_rows(f"{cell.name}, position {position}, {how}", medians)
            bench.stores(rows, "samples", cell.name, f"position {position}, {how}", raw=each)


def memory(bench: Bench, cell: Cell, *, depth: int, steps: int) -> None:
    """Training steps of a prior with ours and with SDPA under dense masks."""
    ours, theirs = (
        training_cost(cell, backend, bench.device, depth=depth, steps=steps) for backend in ("triton", "sdpa")
    )
    shapes = f"batch {cell.batch}, {cell.name.rpartition('-')[0]}"
    name = f"training step of {ours.parameters / 1e6:.0f} M parameters, {shapes}"
    peak, dense = (cost.peak_bytes / _GIB for cost in (ours, theirs))
    sdpa = f"torch {torch.__version__} SDPA with the masks"
    ratio = dense / peak if peak else None
    rows = [
        Row(f"{name}: most memory held", peak, "GiB", f"{sdpa}: {dense:.3g} GiB", ratio, 1.0),
        against(f"{name}: time", median(ours.microseconds), "SDPA with the masks", median(theirs.microseconds), None),
    ]
    bench.stores(rows, "training", raw={"triton": ours._asdict(), "sdpa": theirs._asdict()})


def tune(bench: Bench, cell: Cell, *, limit: int | None) -> None:
    """Times the kernels of forward and backward pass under all candidates for their launch, or the first few."""
    from transformer.kernels import backward, forward

    query, key, value, grad = (_random(bench, cell) for _ in range(4))
    scale, mask = cell.head_dim**-0.5, cell.mask
    attended = forward.forward(query, key, value, mask, scale)
    back = partial(backward.backward, grad, query, key, value, *attended, mask, scale)
    runs: dict[KernelName, _Launch] = {
        "forward": lambda config: forward.forward(query, key, value, mask, scale, config=config),
        "query_gradient": lambda config: back(query_config=config),
        "key_value_gradient": lambda config: back(key_config=config),
    }
    for kernel, run in runs.items():
        bench.tries(f"tune {cell.name}, {kernel}", partial(_tune_kernel, bench, cell, kernel, run, limit=limit))


def tune_decode(bench: Bench, cell: Cell, *, limit: int | None) -> None:
    """Likewise, the kernel of single steps in the middle of an image."""
    from transformer.kernels import decode as kernels

    mask, scale = cell.mask, cell.head_dim**-0.5
    slots = CacheLayout(mask).num_slots
    query, key, value, keys, values = (_random(bench, cell, length=length) for length in (1, 1, 1, slots, slots))
    position = torch.tensor([mask.text_len + mask.image_len // 2], dtype=torch.int32, device=bench.device)
    step = partial(kernels.decode, query, key, value, keys, values, position, mask, scale)
    _tune_kernel(bench, cell, "decode", lambda config: [step(config=config)], limit=limit)


def _tune_kernel(bench: Bench, cell: Cell, kernel: KernelName, run: _Launch, *, limit: int | None) -> None:
    capability = (9, 0) if bench.is_dry else torch.cuda.get_device_capability(bench.device)
    right = run(None)
    works: dict[str, Callable[[], object]] = {"default": partial(run, None)}
    for config in candidates(kernel, head_dim=cell.head_dim, capability=capability)[:limit]:
        name = "x".join(map(str, config))
        try:
            _check(run(config), right, cell.dtype)
            works[name] = partial(run, config)
        except Exception as error:
            bench.fails(f"tune {cell.name}, {kernel}, {name}", error)
    samples = bench.stopwatch.in_turns(works, rounds=bench.rounds)
    medians = {name: median(values) for name, values in samples.items()}
    best = min(medians, key=medians.__getitem__)
    print(f"    best {best}: {medians[best]:.1f} us; default: {medians['default']:.1f} us", flush=True)
    timed = kernel if kernel == "forward" or kernel == "decode" else f"whole backward pass by its {kernel}"
    name = f"tune {cell.name}, {timed}: {best} (queries x keys x warps x stages)"
    ratio = medians["default"] / medians[best]
    default = f"launch_config: {medians['default']:.1f} us"
    bench.stores([Row(name, medians[best], "us", default, ratio, None)], "tune", cell.name, kernel, raw=samples)


def _random(bench: Bench, cell: Cell, *, length: int | None = None) -> Tensor:
    shape = (cell.batch, cell.heads, cell.mask.seq_len if length is None else length, cell.head_dim)
    return torch.randn(shape, device=bench.device, dtype=cell.dtype)


def _check(found: Sequence[Tensor], right: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Raises unless results are right; where the right ones are of the first heads, only those are compared."""
    for place, (one, other) in enumerate(zip(found, right, strict=False)):
        error = relative_error(one.detach()[: other.shape[0], : other.shape[1]], other)
        if not error <= _TOLERANCES[dtype]:
            raise ValueError(f"wrong {Passes._fields[place]}: relative error {error:.3g}")
