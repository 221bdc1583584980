"""Who takes part in benchmarks/sampling_gpu.py, ours in variants and a Llama of the same shape, and how both are timed.

On a GPU time is what events say, the host's work included: whoever makes the GPU wait pays for it.
"""

import copy
import importlib.util
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.attention_measures import median
from sampling.decode import sample_steps
from sampling.graph import StepOnDevice
from sampling.settings import SamplingSettings
from transformer.cache import KVCache
from transformer.decoder import Decoder
from transformer.masks import MaskKind
from transformer.model import Prior, PriorConfig, SequenceLayout

# B images, T text tokens, I image tokens.

_RANDOM_STD = 0.02
_WARM_UP_STEPS = 3
_PROFILED_STEPS = 6

Context = Callable[[], AbstractContextManager[Any]]
Moment = Any  # an event on the GPU, or seconds of the host's clock


class Shape(NamedTuple):
    """Sizes of a prior; as given, 343 million parameters."""

    text_len: int = 32
    text_ids: int = 512
    codes: int = 16384
    dim: int = 1024
    depth: int = 24
    heads: int = 16


class Timed(NamedTuple):
    """Seconds of drawing one batch."""

    seconds: float
    """from text ids to codes"""
    first_row_seconds: float | None = None
    """until the first row of codes is known"""
    step_seconds: float | None = None
    """of each step behind the first; of several micro-batches those of the first one count"""


class Entrant(NamedTuple):
    """One way to draw a batch."""

    draw: Callable[[int], Timed]
    """for a seed"""
    warm_up: Callable[[], object]
    """compiles and captures whatever there is to"""
    rounds: int
    """how often it is timed"""


def build_prior(shape: Shape, grid: int, attention: tuple[MaskKind, ...], device: torch.device) -> Prior:
    """A prior in fp32 with random weights none of which is zero.

    Args:
        shape: sizes.
        grid: rows and columns of codes.
        attention: mask kinds, repeated over the layers.
        device: where it is made.
    """
    torch.manual_seed(0)
    layout = SequenceLayout(
        text_len=shape.text_len,
        grid_height=grid,
        grid_width=grid,
        text_vocab_size=shape.text_ids,
        codebook_size=shape.codes,
    )
    config = PriorConfig(layout=layout, dim=shape.dim, depth=shape.depth, heads=shape.heads, attention=attention)
    with device:
        prior = Prior(config)
    for parameter in prior.parameters():
        if not parameter.any():  # heads and projections begin at zero, and zeros are multiplied faster
            nn.init.normal_(parameter, std=_RANDOM_STD)
    return prior.eval().requires_grad_(False)


def num_parameters(model: nn.Module) -> int:
    """Numbers that a model learns."""
    return sum(parameter.numel() for parameter in model.parameters())


def random_texts(shape: Shape, count: int) -> Tensor:
    """Captions without padding, int64 [B, T]; the same in every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shape.text_ids, (count, shape.text_len), generator=generator)


def eager_twin(decoder: Decoder) -> Decoder:
    """A decoder with the same weights, of whose steps nothing is captured yet; to be run within `without_graphs`."""
    return copy.copy(decoder)


def without_graphs() -> AbstractContextManager[Any]:
    """A context in which no CUDA graph is captured: the loop runs the same step operation by operation."""
    return patch.object(StepOnDevice, "capture", lambda step: None)


def compiled_twin(decoder: Decoder) -> Decoder:
    """A decoder with the same weights whose steps Inductor compiles, within `compilable`; on a CPU none of this."""
    twin = copy.copy(decoder)
    if decoder.device.type == "cuda":
        decode = Decoder.decode.__wrapped__  # type: ignore[attr-defined]  # the loop is in inference mode already

        def step(codes: Tensor, position: Tensor, cache: KVCache) -> Tensor:
            return decode(twin, codes, position, cache)

        twin.decode = torch.compile(step, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
    return twin


def compilable() -> AbstractContextManager[Any]:
    """A context in which the compiler is not stopped by what the choice of a backend writes to the log."""
    return patch("transformer.attention.choose_decode_backend", lambda **options: "triton")


def ours(
    decoder: Decoder,
    texts: Tensor,
    settings: SamplingSettings,
    *,
    rounds: int,
    max_rows: int | None = None,
    within: Context = nullcontext,
) -> Entrant:
    """The decode loop for text ids int64 [B, T].

    Args:
        decoder: predicts the codes.
        texts: of the images.
        settings: of all images.
        rounds: how often it is timed.
        max_rows: most rows of one forward; None leaves that to the loop.
        within: makes a context for everything that is done.
    """

    def steps(seed: int) -> Any:
        seeds = torch.full((len(texts),), seed)
        index = torch.arange(len(texts))
        return sample_steps(decoder, texts, settings=settings, seeds=seeds, image_index=index, max_rows=max_rows)

    def warm_up() -> None:
        with within(), closing(steps(0)) as drawn:
            for _ in range(_WARM_UP_STEPS):
                next(drawn)

    def draw(seed: int) -> Timed:
        layout, device = decoder.layout, decoder.device
        marks: dict[int, Moment] = {}
        # the last position is drawn without a step behind it
        marked = (0, layout.grid_width - 1, layout.image_len - 2)
        _wait(device)
        began = _moment(device)
        with within():
            for step in steps(seed):
                if step.position in marked and step.position not in marks:
                    marks[step.position] = _moment(device)
        seconds = _seconds(began, _moment(device))
        first, row, last = (marks[position] for position in marked)
        return Timed(seconds, _seconds(began, row), _seconds(first, last) / (layout.image_len - 2))

    return Entrant(draw, warm_up, rounds)


class Llama:
    """The Llama of transformers with random weights in bf16, as deep and wide as our prior, and its own `generate`.

    Text ids, the pads of a prior and codes make one vocabulary. Its own guidance is two forwards for each step; here
    each image simply has two rows, as in ours, and its logits are not mixed.

    Args:
        shape: sizes.
        grid: rows and columns of codes.
        device: where it runs.
    """

    def __init__(self, shape: Shape, grid: int, device: torch.device) -> None:
        import transformers  # type: ignore[import-not-found]

        torch.manual_seed(0)
        self.name = f"transformers {transformers.__version__} Llama, torch {torch.__version__}"
        self.device, self.image_len = device, grid * grid
        self._shape, self._compile_config = shape, transformers.CompileConfig(mode="reduce-overhead")
        config = transformers.LlamaConfig(
            vocab_size=shape.text_ids + shape.text_len + shape.codes,
            hidden_size=shape.dim,
            intermediate_size=32 * math.ceil(shape.dim * PriorConfig.mlp_ratio / 32),
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            max_position_embeddings=shape.text_len + self.image_len,
            bos_token_id=None,
            eos_token_id=None,  # nothing ends an image early
        )
        with device:
            self.model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()

    def generate(self, images: int, *, compiled: bool, tokens: int | None = None) -> Tensor:
        """Draws so many ids, None for a whole image, for two rows of each image."""
        text = random_texts(self._shape, 2 * images).to(self.device)
        options: dict[str, Any] = {"cache_implementation": "dynamic", "disable_compile": True}
        if compiled:
            options = {"cache_implementation": "static"}
            if self.device.type == "cuda":
                options["compile_config"] = self._compile_config
        return self.model.generate(
            text,
            attention_mask=torch.ones_like(text),
            max_new_tokens=tokens or self.image_len,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            pad_token_id=0,
            **options,
        )

    def entrant(self, images: int, *, compiled: bool, rounds: int) -> Entrant:
        """Its generate with a static cache under torch.compile, or with the dynamic cache that it has by default."""
        generate = partial(self.generate, images, compiled=compiled)

        def draw(seed: int) -> Timed:
            torch.manual_seed(seed)
            _wait(self.device)
            began = _moment(self.device)
            generate()
            return Timed(_seconds(began, _moment(self.device)))

        # compiled for the size of the cache, that is for whole images
        return Entrant(draw, generate if compiled else partial(generate, tokens=_WARM_UP_STEPS), rounds)


def has_transformers() -> bool:
    """Whether the peer is installed; says so if not."""
    if importlib.util.find_spec("transformers") is not None:
        return True
    print("    transformers is not installed: its rows are left out", flush=True)
    return False


def in_turns(entrants: Mapping[str, Entrant]) -> dict[str, list[Timed]]:
    """Times everybody in turns, so that what disturbs one disturbs all; whoever has had its rounds sits out."""
    for name, entrant in entrants.items():
        began = time.perf_counter()
        entrant.warm_up()
        print(f"    {time.perf_counter() - began:8.1f} s to warm up {name}", flush=True)
    samples: dict[str, list[Timed]] = {name: [] for name in entrants}
    for number in range(max(entrant.rounds for entrant in entrants.values())):
        for name, entrant in entrants.items():
            if number < entrant.rounds:
                samples[name].append(entrant.draw(number + 1))
    for name, drawn in samples.items():
        print(f"    {middle(drawn):8.4f} s  {name}", flush=True)
    return samples


def middle(samples: Sequence[Timed], field: str = "seconds") -> float:
    """The median of one of the times."""
    return median([getattr(sample, field) for sample in samples])


class Launches(NamedTuple):
    """What one step asks of the GPU; on a CPU operators stand for kernels."""

    calls: float
    """of the host, to launch a kernel or a graph"""
    kernels: float
    """that run"""
    microseconds: float
    """in which they do"""
    by_name: dict[str, list[float]]
    """the longest ones: how many, and microseconds of all of them"""


def launches_of_ours(
    decoder: Decoder, texts: Tensor, settings: SamplingSettings, *, within: Context = nullcontext
) -> Launches:
    """Of one step, mean of a few in the middle of an image."""
    seeds, index = torch.zeros(len(texts), dtype=torch.int64), torch.arange(len(texts))
    drawn = sample_steps(decoder, texts, settings=settings, seeds=seeds, image_index=index)
    with within(), closing(drawn):
        for _ in range(decoder.layout.image_len // 2):
            next(drawn)
        return _launches(lambda: [next(drawn) for _ in range(_PROFILED_STEPS)], decoder.device, steps=_PROFILED_STEPS)


def launches_of_llama(llama: Llama) -> Launches:
    """Of one more token of one image, with the dynamic cache."""
    llama.generate(1, compiled=False, tokens=_WARM_UP_STEPS)
    few, many = (
        _launches(partial(llama.generate, 1, compiled=False, tokens=tokens), llama.device, steps=1)
        for tokens in (2, 2 + _PROFILED_STEPS)
    )

    def more(field: str) -> float:
        return (getattr(many, field) - getattr(few, field)) / _PROFILED_STEPS

    return Launches(more("calls"), more("kernels"), more("microseconds"), many.by_name)


def _launches(work: Callable[[], object], device: torch.device, *, steps: int) -> Launches:
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    _wait(device)
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        _wait(device)
    calls, counts, times = 0, Counter[str](), Counter[str]()
    for event in profiler.events() or []:
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device if on_gpu else event.name.startswith("aten::"):
            counts[event.name] += 1
            times[event.name] += event.time_range.elapsed_us()
        elif event.name.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch")):
            calls += 1
    kernels = sum(count for name, count in counts.items() if not name.startswith(("Memcpy", "Memset")))
    longest = {name[:100]: [counts[name] / steps, round(micros / steps, 2)] for name, micros in times.most_common(30)}
    return Launches(calls / steps, kernels / steps, sum(times.values()) / steps, longest)


def _moment(device: torch.device) -> Moment:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Moment, end: Moment) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
