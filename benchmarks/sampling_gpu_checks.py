"""What benchmarks/sampling_gpu.py checks: CUDA graphs, the logits of every storage, and images alone and in company."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.attention_measures import relative_error
from benchmarks.attention_sections import Bench
from benchmarks.record import Row
from benchmarks.sampling_gpu_contestants import build_prior, eager_twin, random_texts, without_graphs
from benchmarks.sampling_gpu_sections import FIXED_ROWS, GUIDED, Scale, fitting
from sampling.decode import Sampled, sample_codes
from sampling.settings import SamplingSettings
from sampling.step import Forced
from transformer.decoder import Decoder
from transformer.frozen_linear import Storage
from transformer.masks import MaskKind
from transformer.model import Prior

# B images, I image tokens, K codebook size.

_ALL_KINDS: tuple[MaskKind, ...] = ("row", "column", "full", "conv")
_MIXED = (
    GUIDED,
    SamplingSettings(temperature=0.9, top_k=1000),
    SamplingSettings(guidance=5.0, guidance_schedule="power-cosine", top_p=0.9),
    SamplingSettings(guidance=2.0, temperature=1.1, min_p=0.01),
)
_MIX_SIZES = (2, 3, 8, 16)
_CHECKED_IMAGES = 4
_TOLERANCES: dict[Storage, float] = {"fp32": 1e-3, "bf16": 5e-2, "int8": 1e-1}  # relative errors of logits


def correctness(bench: Bench, scale: Scale) -> None:
    """Codes of graphs and of the loop without them, logits of every storage, and the promise of the fixed rows."""
    prior = build_prior(scale.shape, scale.grids[0], _ALL_KINDS, bench.device)
    for storage in ("bf16", "fp32"):
        what = f"graphs against the eager loop, {storage}"
        bench.tries(what, partial(_graphs_equal_eager, bench, scale, prior, storage))
    bench.tries("logits of all storages", partial(_logits, bench, scale, prior))


def _graphs_equal_eager(bench: Bench, scale: Scale, prior: Prior, storage: Storage) -> None:
    decoder = Decoder(prior, weights=storage)
    twin = eager_twin(decoder)
    texts = random_texts(scale.shape, _CHECKED_IMAGES)
    given = torch.randint(scale.shape.codes, (_CHECKED_IMAGES, decoder.layout.image_len))
    forced = Forced(given, torch.rand(given.shape) < 0.3)
    shares, other_seed = [], []
    # the second batch of a kind is loaded into the buffers of the first
    mixed = fitting(_MIXED, scale)
    for settings, seed, kept in ((GUIDED, 1, None), (GUIDED, 2, None), (mixed, 3, None), (mixed, 4, forced)):
        by_graph = _sample(decoder, texts, settings, seed, forced=kept)
        with without_graphs():
            shares.append(_share_of_equal(by_graph, _sample(twin, texts, settings, seed, forced=kept)))
        other_seed.append(_share_of_equal(by_graph, _sample(decoder, texts, settings, seed + 9, forced=kept)))
    assert max(other_seed) < 1, "another seed gave the same codes: the comparison says nothing"
    share, unit = sum(shares) / len(shares), f"share of {len(shares) * given.numel()} codes"
    row = Row(f"{storage}: a CUDA graph draws what the eager loop draws", share, unit, "", None, 1.0)
    bench.stores([row], "graph", storage, raw={"equal": shares, "with another seed": other_seed})


def _logits(bench: Bench, scale: Scale, prior: Prior) -> None:
    """Teacher-forced logits of the prior in fp32, of prefill with all codes, and of one step after the other."""
    layout, device = prior.layout, bench.device
    texts = random_texts(scale.shape, 2).to(device)
    codes = torch.randint(layout.codebook_size, (2, layout.image_len), device=device)
    with torch.inference_mode():
        right = prior(texts, codes).image_logits.float()  # [B, I, K]
    found: dict[str, Tensor] = {}
    for storage, tolerance in _TOLERANCES.items():
        decoder = Decoder(prior, weights=storage)
        found[storage] = _step_by_step(decoder, texts, codes)
        prefilled = decoder.prefill(texts, decoder.new_cache(2), codes[:, :-1])
        against = "int8" if storage == "int8" else "fp32"
        peer, known = ("bf16", found["bf16"]) if against == "int8" else ("Prior in fp32", right)
        for how, logits in (("step by step", found[storage]), ("prefilled", prefilled)):
            error = relative_error(logits, known)
            agree = float((logits.argmax(dim=2) == known.argmax(dim=2)).float().mean())
            name = f"{storage}: relative error of logits {how}, against {peer}"
            row = Row(name, error, "", f"tolerance: {tolerance:g}", tolerance / max(error, 1e-12), 1.0)
            bench.stores([row], "logits", storage, how, raw={"error": error, "same most likely code": agree})


def _step_by_step(decoder: Decoder, texts: Tensor, codes: Tensor) -> Tensor:
    """Logits [B, I, K] of codes int64 [B, I] that are fed one after the other."""
    cache = decoder.new_cache(len(texts))
    logits = [decoder.prefill(texts, cache)[:, -1]]
    logits += [decoder.decode(codes[:, position], position, cache) for position in range(codes.shape[1] - 1)]
    return torch.stack(logits, dim=1)


def deterministic(bench: Bench, scale: Scale) -> None:
    """The same images alone and in random company."""
    prior = build_prior(scale.shape, scale.grids[0], _ALL_KINDS, bench.device)
    for storage in ("bf16", "int8", "fp32"):
        what = f"prompts alone and mixed, {storage}"
        bench.tries(what, partial(_alone_and_mixed, bench, scale, prior, storage, row_independent=True))
    what = "the same without the deterministic mode"
    bench.tries(what, partial(_alone_and_mixed, bench, scale, prior, "bf16", row_independent=False))


def _alone_and_mixed(bench: Bench, scale: Scale, prior: Prior, storage: Storage, *, row_independent: bool) -> None:
    # what GPUs are meant to compute in gets all of them
    prompts = scale.prompts if storage == "bf16" and row_independent else min(scale.prompts, max(_MIX_SIZES))
    decoder = Decoder(prior, weights=storage, row_independent=row_independent)
    texts = random_texts(scale.shape, prompts)
    seeds = torch.randint(2**40, (prompts,))

    def draw(images: Sequence[int]) -> Sampled:
        settings = [_MIXED[image % len(_MIXED)] for image in images]
        index = torch.tensor(images)
        return sample_codes(
            decoder,
            texts[index],
            settings=fitting(settings, scale),
            seeds=seeds[index],
            image_index=index % 3,
            max_rows=FIXED_ROWS,
        )

    # those of one kind after the other, so that few graphs are captured
    alone = {image: draw([image]) for image in sorted(range(prompts), key=lambda image: image % len(_MIXED))}
    drawn, different = 0, []
    for size in _MIX_SIZES:
        for images in torch.randperm(prompts).split(size):
            mixed = draw(images.tolist())
            drawn += len(images)
            for row, image in enumerate(images.tolist()):
                equal = torch.equal(mixed.codes[row], alone[image].codes[0])
                if not equal or bool(mixed.log_likelihood[row] != alone[image].log_likelihood[0]):
                    different.append({"image": image, "beside": images.tolist(), "same codes": equal})
    mode = "deterministic mode" if row_independent else "without it"
    goal = 1.0 if row_independent else None
    sizes = ", ".join(map(str, _MIX_SIZES))
    name = f"{mode}, {storage}: images with the same codes and likelihood alone and in mixes of {sizes}"
    row = Row(name, 1 - len(different) / drawn, f"share of {drawn} images", "", None, goal)
    bench.stores([row], "mixes", f"{storage}, {mode}", raw={"drawn": drawn, "different": different})


def _sample(
    decoder: Decoder,
    texts: Tensor,
    settings: SamplingSettings | Sequence[SamplingSettings],
    seed: int,
    *,
    forced: Forced | None = None,
) -> Sampled:
    seeds, index = torch.full((len(texts),), seed), torch.arange(len(texts))
    return sample_codes(decoder, texts, settings=settings, seeds=seeds, image_index=index, forced=forced)


def _share_of_equal(one: Sampled, other: Sampled) -> float:
    """How many codes are the same; 0 where the codes are and their likelihoods are not."""
    share = float((one.codes == other.codes).float().mean())
    return 0.0 if share == 1 and not torch.equal(one.log_likelihood, other.log_likelihood) else share
