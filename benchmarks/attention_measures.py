"""How benchmarks/attention.py measures: time in turns, this machine's ceilings, errors, peak memory of a training step.

Time on a GPU is what events say of the kernels alone: a spinning kernel ahead of them gives the host time to queue
everything, and another write of twice the L2 cache leaves nothing of the inputs there.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from benchmarks.attention_cells import Case, Ceilings, Cell
from benchmarks.attention_contestants import Attend
from transformer.kernels import ops, reference

# B batch, H query heads, Hkv key-value heads, N positions, D head width.

Work = Callable[[], object]

_WARM_UPS = 3
_FIRST_SPIN, _LONGEST_SPIN = 500_000, 32_000_000  # cycles, a quarter and 16 milliseconds
_PRODUCT_SIDE, _COPY_BYTES = 8192, 2**30
_CPU_FLUSH_BYTES = 2**20


class Stopwatch:
    """Times pieces of work on one device, in turns.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        cached = torch.cuda.get_device_properties(device).L2_cache_size if self.on_gpu else _CPU_FLUSH_BYTES
        self.flush_bytes = 2 * cached
        self._flush = torch.empty(self.flush_bytes, dtype=torch.int8, device=device)
        self._spins: dict[str, int] = {}

    def in_turns(self, works: Mapping[str, Work], *, rounds: int, hide_host: bool = True) -> dict[str, list[float]]:
        """Microseconds of every piece of work in every round.

        Args:
            works: name -> work; whatever it compiles, it has compiled.
            rounds: samples of each, taken in turns, so that what disturbs one disturbs all.
            hide_host: leave out the host's time to queue the work; False leaves it in and the caches as they are.
        """
        for work in works.values():
            for _ in range(_WARM_UPS if self.on_gpu else 0):
                work()
        samples: dict[str, list[float]] = {name: [] for name in works}
        self._spins = {}
        for _ in range(rounds):
            for name, work in works.items():
                samples[name].append(round(self._sample(name, work, hide_host), 3))
        return samples

    def _sample(self, name: str, work: Work, hide_host: bool) -> float:
        if not self.on_gpu:
            self._flush.zero_()
            began = time.perf_counter()
            work()
            return 1e6 * (time.perf_counter() - began)
        torch.cuda.synchronize(self.device)
        if not hide_host:
            return self._events_around(work)[0]
        while True:
            spin = self._spins.setdefault(name, _FIRST_SPIN)
            torch.cuda._sleep(spin)  # torch has no public kernel that waits
            self._flush.zero_()
            microseconds, was_queued_ahead = self._events_around(work)
            if was_queued_ahead or spin >= _LONGEST_SPIN:
                return microseconds
            self._spins[name] = 2 * spin  # the GPU had nothing to do while the host was still queueing

    def _events_around(self, work: Work) -> tuple[float, bool]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        was_queued_ahead = not start.query()
        end.synchronize()
        return 1e3 * start.elapsed_time(end), was_queued_ahead

    def ceilings(self) -> Ceilings:
        """What a large bf16 matrix product and a large copy reach here, median of ten."""
        side, dtype = (_PRODUCT_SIDE, torch.bfloat16) if self.on_gpu else (64, torch.float32)
        left, right = torch.randn(2, side, side, device=self.device, dtype=dtype).unbind(0)
        source = torch.empty(_COPY_BYTES if self.on_gpu else 2**16, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        works: dict[str, Work] = {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}
        product, copy = (median(values) / 1e6 for values in self.in_turns(works, rounds=10).values())
        return Ceilings(2 * side**3 / product, 2 * source.numel() / copy)

    def graph(self, steps: Sequence[Work]) -> Work:
        """All steps as one CUDA graph; on a CPU one after the other."""
        if not self.on_gpu:
            return lambda: [step() for step in steps]
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for step in steps[:2]:
                step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for step in steps:
                step()
        return graph.replay


def median(values: Sequence[float]) -> float:
    """The middle value; with an even number of them the mean of the two."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def relative_error(found: Tensor, right: Tensor) -> float:
    """The norm of the difference over the norm of what is right; NaN stays NaN."""
    return float((found.double() - right.double()).norm() / right.double().norm())


class Passes(NamedTuple):
    """The output and the gradients of queries, keys and values, each [B, H or Hkv, N, D]."""

    output: Tensor
    query_gradient: Tensor
    key_gradient: Tensor
    value_gradient: Tensor


def passes(attend: Attend, query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor) -> Passes:
    """Forward and backward pass."""
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    output = attend(*leaves)
    return Passes(output.detach(), *torch.autograd.grad(output, leaves, grad_output))


class Errors(NamedTuple):
    """Of the output and the three gradients, in the order of `Passes`; and whether a second run gave the same bits.

    Attributes:
        ours: largest absolute errors.
        ours_relative: relative errors.
        math: largest absolute errors of SDPA's math backend that computes in the dtype of its inputs.
        math_relative: relative errors of that.
        math_in_float32: largest absolute errors of it as it is by default: in float32, rounded at the end.
        is_repeatable: whether a run on memory full of NaN gave the same bits.
    """

    ours: list[float]
    ours_relative: list[float]
    math: list[float]
    math_relative: list[float]
    math_in_float32: list[float]
    is_repeatable: bool


def errors(case: Case, device: torch.device) -> Errors:
    """Compares ours and SDPA's math backend with the fp64 reference on fresh random inputs."""
    shapes = [(1, heads, case.length, case.head_dim) for heads in (case.heads, case.key_heads, case.key_heads)]
    inputs = [torch.randn(*shape, device=device, dtype=case.dtype) for shape in (*shapes, shapes[0])]
    dense = case.mask.dense(case.length).to(device)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.sparse_attention(query, key, value, case.mask)

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return reference.attention(query, key, value, case.mask)

    def math(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (tensor.repeat_interleave(case.heads // case.key_heads, dim=1) for tensor in (key, value))
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=dense)

    right = passes(exact, *(tensor.double() for tensor in inputs))
    in_float32, first = passes(math, *inputs), passes(ours, *inputs)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        in_dtype = passes(math, *inputs)
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
    poison_freed_memory(first)
    second = passes(ours, *inputs)
    return Errors(
        _each(_largest, first, right),
        _each(relative_error, first, right),
        _each(_largest, in_dtype, right),
        _each(relative_error, in_dtype, right),
        _each(_largest, in_float32, right),
        all(torch.equal(one, other) for one, other in zip(first, second, strict=True)),
    )


def poison_freed_memory(like: Sequence[Tensor]) -> None:
    """Leaves NaN in the memory that tensors of these sizes will be allocated in next."""
    if like[0].device.type == "cuda":
        torch.cuda.empty_cache()
    held = [torch.full_like(tensor, torch.nan) for tensor in like for _ in range(4)]
    held += [tensor.new_full(tensor.shape[:3], torch.nan, dtype=torch.float32) for tensor in like for _ in range(4)]
    del held


def _each(error: Callable[[Tensor, Tensor], float], found: Passes, right: Passes) -> list[float]:
    return [error(one, other) for one, other in zip(found, right, strict=True)]


def _largest(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).abs().max())


def module_errors(cell: Cell, device: torch.device) -> dict[str, float]:
    """How far a layer around ours, compiled or recomputed in the backward pass, is from itself run eagerly.

    Returns:
        "compiled" and "checkpointed" -> the largest relative error of its output and gradients.
    """
    heads, width = 2, 2 * cell.head_dim
    x, grad, *weights = (
        torch.randn(shape, device=device, dtype=cell.dtype) / shape[-1] ** 0.5
        for shape in ((1, cell.mask.seq_len, width), (1, cell.mask.seq_len, width), (3 * width, width), (width, width))
    )

    def layer(x: Tensor, inward: Tensor, outward: Tensor) -> Tensor:
        query, key, value = F.linear(x, inward).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.linear(ops.sparse_attention(query, key, value, cell.mask).transpose(1, 2).flatten(2), outward)

    def results(run: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *weights)]
        output = run(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    runs = {
        # not with Inductor on a CPU, whose C++ compiler would take most of a dry run
        "compiled": torch.compile(layer, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager"),
        "checkpointed": lambda *leaves: checkpoint(layer, *leaves, use_reentrant=False),
    }
    right = results(layer)
    return {
        name: max(relative_error(one, other) for one, other in zip(results(run), right, strict=True))
        for name, run in runs.items()
    }


class TrainingCost(NamedTuple):
    """The most memory that training steps of a prior held, and the time of every step after the first."""

    parameters: int
    peak_bytes: int
    microseconds: list[float]


def training_cost(
    cell: Cell, backend: Literal["triton", "sdpa"], device: torch.device, *, depth: int, steps: int
) -> TrainingCost:
    """Trains a prior as wide as all heads of a cell with AdamW, in bf16 on a GPU, on random tokens."""
    from transformer.model import Prior, PriorConfig, SequenceLayout

    mask, on_gpu = cell.mask, device.type == "cuda"
    layout = SequenceLayout(text_len=mask.text_len, grid_height=mask.grid_height, grid_width=mask.grid_width)
    config = PriorConfig(
        layout=layout,
        dim=cell.heads * cell.head_dim,
        heads=cell.heads,
        depth=depth,
        attention=("row", "column", "row", "row", "conv"),
        kernel_size=mask.kernel_size,
    )
    prior = Prior(config, attention_backend=backend).to(device)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-4)
    text_ids = torch.randint(layout.num_text_ids, (cell.batch, layout.text_len), device=device)  # [B, T]
    codes = torch.randint(layout.codebook_size, (cell.batch, layout.image_len), device=device)  # [B, I]

    def step() -> float:
        began = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on_gpu):
            logits = prior(text_ids, codes).image_logits
        F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten()).backward()
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize(device)
        return 1e6 * (time.perf_counter() - began)

    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    microseconds = [step() for _ in range(steps + 1)][1:]
    parameters = sum(parameter.numel() for parameter in prior.parameters())
    return TrainingCost(parameters, torch.cuda.max_memory_allocated(device) if on_gpu else 0, microseconds)
