"""The sections of benchmarks/sampling_gpu.py that time and count; what is known is stored at once."""

import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.attention_sections import Bench
from benchmarks.record import Row
from benchmarks.sampling_gpu_contestants import (
    Context,
    Entrant,
    Launches,
    Llama,
    Shape,
    Timed,
    build_prior,
    compilable,
    compiled_twin,
    eager_twin,
    has_transformers,
    in_turns,
    launches_of_llama,
    launches_of_ours,
    middle,
    num_parameters,
    ours,
    random_texts,
    without_graphs,
)
from sampling.settings import SamplingSettings
from transformer.decoder import Decoder
from transformer.frozen_linear import Storage
from transformer.masks import MaskKind

PATTERNS: dict[str, tuple[MaskKind, ...]] = {
    "full": ("full",),
    "row, column, row, conv": ("row", "column", "row", "conv"),
}
GOAL_OF_FLOOR = 0.5  # at most twice as long as it takes to read the weights
PUBLISHED_BYTES_PER_SECOND = 4.3e12  # of a large copy on an H200
FIXED_ROWS = 32  # of 16 images, in the deterministic mode
GUIDED = SamplingSettings(guidance=3.0)

_FILTERED = replace(GUIDED, top_k=2000, top_p=0.95)
_MIB = 2**20


class Scale(NamedTuple):
    """How much is done."""

    shape: Shape
    grids: tuple[int, ...]
    batch: int  # of throughput
    rounds: int
    eager_rounds: int
    prompts: int  # of the deterministic mode
    minutes: float


class GpuBench(Bench):
    """Like `Bench`; whoever reads its results later cannot run it again, so that whole tracebacks are kept."""

    def fails(self, what: str, error: BaseException) -> None:
        """Names what did not run, prints where it stopped and stores that."""
        super().fails(what, error)
        lines = "".join(traceback.format_exception(error)[-12:])
        print(lines, flush=True)
        self.stores([], "tracebacks", what, raw=lines.splitlines())


def latency(bench: Bench, scale: Scale) -> None:
    """One image with guidance: two rows."""
    for grid in scale.grids:
        for pattern in PATTERNS:
            what = f"latency, {codes_of(grid)}, {pattern} layers"
            bench.tries(what, partial(_latency, bench, scale, grid, pattern))


def _latency(bench: Bench, scale: Scale, grid: int, pattern: str) -> None:
    prior = build_prior(scale.shape, grid, PATTERNS[pattern], bench.device)
    plain, small = Decoder(prior, weights="bf16"), Decoder(prior, weights="int8")
    texts, tokens = random_texts(scale.shape, 1), grid * grid
    eager_rounds = scale.eager_rounds if grid == scale.grids[0] else 1  # of 10 seconds and more
    filtered = fitting([_FILTERED], scale)[0]
    samples = in_turns(
        {
            "CUDA graph": ours(plain, texts, GUIDED, rounds=scale.rounds),
            "CUDA graph, top-k and top-p": ours(plain, texts, filtered, rounds=scale.rounds),
            "int8, CUDA graph": ours(small, texts, GUIDED, rounds=scale.rounds),
            "eager": ours(eager_twin(plain), texts, GUIDED, rounds=eager_rounds, within=without_graphs),
        }
    )
    place = f"{num_parameters(prior) / 1e6:.0f} M, {codes_of(grid)}, {pattern} layers, batch 1, guided"
    seconds = {name: middle(drawn) for name, drawn in samples.items()}
    step = middle(samples["CUDA graph"], "step_seconds")
    rows = []
    for kind, bytes_per_second in (
        ("measured", bench.ceilings.bytes_per_second),
        ("published", PUBLISHED_BYTES_PER_SECOND),
    ):
        floor = plain.weight_bytes / bytes_per_second
        at = f"floor, weights at {bytes_per_second / 1e12:.3g} TB/s as {kind}"
        name, ratio = f"{place}, bf16, CUDA graph: seconds per image", tokens * floor / seconds["CUDA graph"]
        rows.append(Row(name, seconds["CUDA graph"], "s", f"{at}: {tokens * floor:.4g} s", ratio, GOAL_OF_FLOOR))
        name = f"{place}, bf16, CUDA graph: milliseconds per token"
        rows.append(Row(name, 1e3 * step, "ms", f"{at}: {1e3 * floor:.4g} ms", floor / step, GOAL_OF_FLOOR))
    name = f"{place}, bf16, CUDA graph: seconds to the first row of codes"
    rows.append(Row(name, middle(samples["CUDA graph"], "first_row_seconds"), "s", "", None, None))
    for name, other in (
        ("bf16, CUDA graph", "eager"),
        ("int8, CUDA graph", "CUDA graph"),
        ("CUDA graph, top-k and top-p", "CUDA graph"),
    ):
        own, peer = seconds[name.removeprefix("bf16, ")], seconds[other]
        against = f"bf16, {other}: {peer:.4g} s"
        goal = None if "top-k" in name else 1.0
        rows.append(Row(f"{place}, {name}: seconds per image", own, "s", against, peer / own, goal))
    raw = {"weight_bytes": [plain.weight_bytes, small.weight_bytes], "samples": _raw(samples)}
    bench.stores(rows, "latency", codes_of(grid), pattern, raw=raw)


def throughput(bench: Bench, scale: Scale) -> None:
    """Many images with guidance."""
    for grid in scale.grids:
        seconds: dict[str, float] = {}
        for pattern in PATTERNS:
            what = f"throughput, {codes_of(grid)}, {pattern} layers"
            bench.tries(what, partial(_throughput, bench, scale, grid, pattern, seconds))


def _throughput(bench: Bench, scale: Scale, grid: int, pattern: str, known: dict[str, float]) -> None:
    on_gpu = bench.device.type == "cuda"
    prior = build_prior(scale.shape, grid, PATTERNS[pattern], bench.device)
    decoder = Decoder(prior, weights="bf16")
    texts, rows = random_texts(scale.shape, scale.batch), 2 * scale.batch
    del prior
    held = torch.cuda.memory_allocated(bench.device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    samples = in_turns({"CUDA graph": ours(decoder, texts, GUIDED, rounds=scale.eager_rounds + 1, max_rows=rows)})
    peak = torch.cuda.max_memory_allocated(bench.device) - held if on_gpu else 0
    known[pattern] = seconds = middle(samples["CUDA graph"])
    place = f"{codes_of(grid)}, {pattern} layers, batch {scale.batch}, guided, bf16"
    full = known.get("full") if pattern != "full" else None
    against, ratio = (f"full layers: {scale.batch / full:.4g} images/s", full / seconds) if full else ("", None)
    cached = rows * decoder.cache_bytes_per_row / _MIB
    bench.stores(
        [
            Row(f"{place}: images per second", scale.batch / seconds, "images/s", against, ratio, None),
            Row(f"{place}: cache", cached, "MiB", "", None, None),
            Row(f"{place}: most memory held beside the weights", peak / _MIB, "MiB", "", None, None),
        ],
        "throughput",
        codes_of(grid),
        pattern,
        raw=_raw(samples),
    )


def price(bench: Bench, scale: Scale) -> None:
    """Of the deterministic mode, in which a batch has not as many rows as it needs but always the same number."""
    prior = build_prior(scale.shape, scale.grids[0], PATTERNS["full"], bench.device)
    free, fixed = Decoder(prior, weights="bf16"), Decoder(prior, weights="bf16", row_independent=True)
    entrants: dict[str, Entrant] = {}
    for images in (1, 16):
        texts = random_texts(scale.shape, images)
        entrants[f"batch {images}, without"] = ours(free, texts, GUIDED, rounds=scale.rounds)
        for max_rows in (2, FIXED_ROWS):
            name = f"batch {images}, always batches of {max_rows // 2}"
            entrants[name] = ours(fixed, texts, GUIDED, rounds=scale.eager_rounds, max_rows=max_rows)
    if not bench.is_dry:  # on a CPU the mode is always on and costs no rows
        entrants["batch 1, always as many rows as fit"] = ours(fixed, random_texts(scale.shape, 1), GUIDED, rounds=1)
    samples = in_turns(entrants)
    rows = []
    for name, drawn in samples.items():
        batch, _, mode = name.partition(", ")
        if mode != "without":
            plain = middle(samples[f"{batch}, without"])
            against = f"without: {plain:.4g} s"
            row_name = f"deterministic mode, {codes_of(scale.grids[0])}, {batch}, {mode}"
            rows.append(Row(row_name, middle(drawn), "s", against, plain / middle(drawn), None))
    bench.stores(rows, "price", raw=_raw(samples))


def peers(bench: Bench, scale: Scale) -> None:
    """Against a Llama of the same shape: its generate as it is, and with a static cache under torch.compile."""
    if not has_transformers():
        return
    cells = [(grid, images) for grid in scale.grids for images in (1, scale.batch)]
    for grid, images in cells[:-1]:  # many large images tell nothing that the others do not
        bench.tries(f"peers, {codes_of(grid)}, batch {images}", partial(_peers, bench, scale, grid, images))


def _peers(bench: Bench, scale: Scale, grid: int, images: int) -> None:
    decoder = Decoder(build_prior(scale.shape, grid, PATTERNS["full"], bench.device), weights="bf16")
    llama = Llama(scale.shape, grid, bench.device)
    entrants = {"ours": ours(decoder, random_texts(scale.shape, images), GUIDED, rounds=scale.rounds)}
    theirs = {"static cache, torch.compile": llama.entrant(images, compiled=True, rounds=scale.rounds)}
    if grid == scale.grids[0]:  # a larger image takes it half a minute
        theirs["dynamic cache, eager"] = llama.entrant(images, compiled=False, rounds=scale.eager_rounds)
    place = f"{num_parameters(llama.model) / 1e6:.0f} M, {codes_of(grid)}, batch {images} of two rows, bf16"
    for peer, entrant in theirs.items():  # one by one: whoever fails leaves the other's figures alone
        both = entrants | {peer: entrant}
        bench.tries(f"peers, {place}, {peer}", partial(_peer, bench, place, images, llama.name, peer, both))


def _peer(bench: Bench, place: str, images: int, title: str, peer: str, entrants: dict[str, Entrant]) -> None:
    samples = in_turns(entrants)
    own, other = middle(samples["ours"]), middle(samples[peer])
    unit = "s" if images == 1 else "images/s"
    values = (own, other) if images == 1 else (images / own, images / other)
    row = Row(f"{place}: CUDA graph", values[0], unit, f"{title}, {peer}: {values[1]:.4g} {unit}", other / own, 1.0)
    bench.stores([row], "peers", place, peer, raw=_raw(samples))


def launches(bench: Bench, scale: Scale) -> None:
    """What a token of one guided image asks of the host and of the GPU."""
    prior = build_prior(scale.shape, scale.grids[0], PATTERNS["full"], bench.device)
    decoder, small = (Decoder(prior, weights=storage) for storage in ("bf16", "int8"))
    del prior
    texts = random_texts(scale.shape, 1)
    found: dict[str, Launches] = {}

    def count(name: str, who: Decoder, within: Context = nullcontext) -> None:
        found[name] = launches_of_ours(who, texts, GUIDED, within=within)

    bench.tries("launches, CUDA graph", partial(count, "CUDA graph", decoder))
    bench.tries("launches, int8, CUDA graph", partial(count, "int8, CUDA graph", small))
    bench.tries("launches, eager", partial(count, "eager", eager_twin(decoder), without_graphs))
    if has_transformers():

        def count_peer() -> None:
            llama = Llama(scale.shape, scale.grids[0], bench.device)
            found[f"{llama.name}, dynamic cache, eager"] = launches_of_llama(llama)

        bench.tries("launches of transformers", count_peer)
    for name, each in found.items():
        place = f"one token of one guided image, full layers, {name}"
        rows = [
            Row(f"{place}: launches by the host", each.calls, "", "", None, None),
            Row(f"{place}: kernels", each.kernels, "", "", None, None),
            Row(f"{place}: time in kernels", each.microseconds / 1000, "ms", "", None, None),
        ]
        bench.stores(rows, "launches", name, raw=each._asdict())
        for kernel, (number, micros) in list(each.by_name.items())[:10]:
            print(f"    {number:6.1f} x {micros:8.1f} us in all  {kernel[:80]}  ({name})", flush=True)


def compiled(bench: Bench, scale: Scale) -> None:
    """What Inductor would make of a step: the same CUDA graph around compiled kernels."""
    for images in (1, scale.batch):
        for storage in ("bf16", "int8") if images == 1 else ("bf16",):
            what = f"compiled step, batch {images}, {storage}"
            bench.tries(what, partial(_compiled, bench, scale, images, storage))


def _compiled(bench: Bench, scale: Scale, images: int, storage: Storage) -> None:
    grid = scale.grids[0]
    decoder = Decoder(build_prior(scale.shape, grid, PATTERNS["full"], bench.device), weights=storage)
    texts = random_texts(scale.shape, images)
    samples = in_turns(
        {
            "as it is": ours(decoder, texts, GUIDED, rounds=scale.rounds),
            "compiled": ours(compiled_twin(decoder), texts, GUIDED, rounds=scale.rounds, within=compilable),
        }
    )
    own, other = middle(samples["as it is"]), middle(samples["compiled"])
    name = f"{codes_of(grid)}, full layers, batch {images}, guided, {storage}, CUDA graph: seconds"
    against = f"the same under torch.compile: {other:.4g} s"
    row = Row(name, own, "s", against, other / own, None)
    bench.stores([row], "compiled", f"{images}, {storage}", raw=_raw(samples))


def fitting(settings: Sequence[SamplingSettings], scale: Scale) -> list[SamplingSettings]:
    """Settings whose top-k filters a codebook of the scale's size, too."""
    return [replace(each, top_k=min(each.top_k, scale.shape.codes // 4)) for each in settings]


def codes_of(grid: int) -> str:
    """A grid, for people."""
    return f"{grid}x{grid} codes"


def _raw(samples: dict[str, list[Timed]]) -> dict[str, Any]:
    """Every sample, each kind of time in a list of its own."""
    return {
        name: {field: [getattr(sample, field) for sample in drawn] for field in Timed._fields}
        for name, drawn in samples.items()
    }
