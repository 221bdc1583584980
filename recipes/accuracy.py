"""How often pictures show what their prompt says: the scenes benchmark's parser over many prompts and candidates.

The judge sees pixels only. A *candidate* is one of several pictures drawn for the same prompt; the scorer's pick among
them is what best-of-N would have returned.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dvae.model import DiscreteVAE
from dvae.reconstruct import reconstruct
from sampling.generated_image import GeneratedImage
from sampling.pipeline import Pipeline
from tessera.data.scenes import PROMPT_CLASSES, Pairs, Prompt, SceneSpec, render, sample_prompts, sample_scene
from tessera.data.scenes_parser import satisfies
from tessera.data.shards import batches
from tessera.errors import UserError
from tessera.precision import Precision, usable_cores

# N candidates, H W pixels.

SPLITS: tuple[Pairs, ...] = ("seen", "unseen")
# Settings are tuned on prompts of this seed, which no evaluation uses by default.
TUNING_SEED = 31_337

# Fewer pictures are read sooner than worker processes start.
_WORTH_PROCESSES = 600
_PROMPTS_AT_ONCE = 24


def refuse_tuning_seed(seed: int) -> None:
    """Raises UserError for the seed of the tuning prompts: figures on them would flatter the settings tuned on them."""
    if seed == TUNING_SEED:
        raise UserError(f"--seed {TUNING_SEED} draws the prompts that sampling settings are tuned on: take another")


class Judged(NamedTuple):
    """One prompt, what was drawn for it, and the parser's verdicts."""

    prompt: Prompt
    pairs: Pairs
    images: list[GeneratedImage]
    """N candidates, the scorer's pick first."""
    satisfied: NDArray[np.bool_]
    """[N], in the same order."""


Judge = Callable[[Sequence[NDArray[np.uint8]], Sequence[SceneSpec]], NDArray[np.bool_]]


@contextmanager
def judge(num_pictures: int) -> Iterator[Judge]:
    """Gives a function from pictures uint8 [H, W, 3] and their specs to verdicts, spread over the cores if it pays."""
    if num_pictures < _WORTH_PROCESSES or usable_cores() < 2:
        yield lambda pictures, specs: _verdicts(map(satisfies, pictures, specs))
        return
    # spawned, not forked: a copy of a process that runs torch's threads may hang
    with ProcessPoolExecutor(usable_cores(), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda pictures, specs: _spread(pool, pictures, specs)


def judge_prompts(
    pipeline: Pipeline,
    prompts: Sequence[tuple[Pairs, Prompt]],
    *,
    candidates: int,
    seed: int,
    deadline: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> list[Judged]:
    """Draws candidates for prompts and judges each.

    Args:
        pipeline: the model.
        prompts: with the split that they belong to.
        candidates: N, pictures per prompt.
        seed: of the first prompt's drawing; each later prompt has the next one, for the same random numbers would be
            lucky or unlucky for all of them.
        deadline: `time.monotonic()` by which it ends, unless the first prompts take longer; None for none.
        on_progress: called with (prompts judged, prompts in all).
        settings: sampling settings in place of the model's own.

    Returns:
        One entry per prompt that there was time for, in their order.
    """
    scorer = "clip" if pipeline.scorer is not None else "likelihood"
    results: list[Judged] = []
    texts = [prompt.text for _, prompt in prompts]
    seeds = range(seed, seed + len(prompts))
    drawn = pipeline.stream(texts, n=candidates, seed=seeds, scorer=scorer, on_warning=lambda _: None, **settings)
    with judge(len(prompts) * candidates) as verdicts:
        for span in batches(len(prompts), _PROMPTS_AT_ONCE):
            began = time.monotonic()
            part = [prompts[index] for index in span]
            images = [next(drawn) for _ in part]
            flat, specs = [], []
            for (_, prompt), candidates_ in zip(part, images, strict=True):
                flat.extend(image.image for image in candidates_)
                specs.extend([prompt.spec] * len(candidates_))
            satisfied = verdicts(flat, specs).reshape(len(part), candidates)
            for (pairs, prompt), candidates_, row in zip(part, images, satisfied, strict=True):
                results.append(Judged(prompt, pairs, candidates_, row))
            if on_progress is not None:
                on_progress(span.stop, len(prompts))
            now = time.monotonic()
            if deadline is not None and now + (now - began) > deadline:
                break  # the next ones take as long
    return results


def interleaved_prompts(count: int, *, seed: int) -> list[tuple[Pairs, Prompt]]:
    """`count` prompts of each split, in turns: any beginning of the list holds about as many of one as of the other."""
    seen, unseen = (sample_prompts(count, seed=seed, pairs=pairs) for pairs in SPLITS)
    prompts: list[tuple[Pairs, Prompt]] = []
    for span in batches(count, _PROMPTS_AT_ONCE):
        prompts.extend(("seen", seen[index]) for index in span)
        prompts.extend(("unseen", unseen[index]) for index in span)
    return prompts


def tally(results: Sequence[Judged], share: Callable[[Judged], float]) -> dict[str, dict[str, float]]:
    """Averages `share` over prompts: split -> "all" and each prompt class -> mean in [0, 1]; empty cells are absent."""
    table: dict[str, dict[str, float]] = {}
    for pairs in SPLITS:
        of_split = [result for result in results if result.pairs == pairs]
        cells = {"all": of_split}
        for name in PROMPT_CLASSES:
            cells[name] = [result for result in of_split if result.prompt.spec.prompt_class == name]
        table[pairs] = {name: round(sum(map(share, cell)) / len(cell), 4) for name, cell in cells.items() if cell}
    return table


def single(result: Judged) -> float:
    """What one candidate achieves: the mean over all of them, which is less noisy than the first one's verdict."""
    return float(result.satisfied.mean())


def best(result: Judged) -> float:
    """What the scorer's pick achieves."""
    return float(result.satisfied[0])


def oracle(result: Judged) -> float:
    """What a perfect scorer would achieve: whether any candidate satisfies the prompt."""
    return float(result.satisfied.any())


def fresh_scenes(
    count: int, *, seed: int, pairs: Pairs, image_size: tuple[int, int]
) -> tuple[NDArray[np.uint8], list[SceneSpec]]:
    """Ground-truth renders that no model was trained on: images uint8 [count, H, W, 3] and what they show."""
    scenes = [sample_scene(seed, index, pairs=pairs, stream="prompts", image_size=image_size) for index in range(count)]
    return np.stack([render(scene, image_size) for _, scene in scenes]), [spec for spec, _ in scenes]


def judge_reconstructions(
    vae: DiscreteVAE, *, seed: int, image_size: tuple[int, int], precision: Precision, count: int
) -> dict[str, float]:
    """Parser accuracy on fresh renders, and on what the dVAE makes of them: `count` of seen, as many of unseen pairs.

    Returns:
        renders, reconstructions, reconstructions_seen and reconstructions_unseen, each in [0, 1].
    """
    figures: dict[str, float] = {}
    renders = []
    with judge(4 * count) as verdicts:
        for pairs in SPLITS:
            images, specs = fresh_scenes(count, seed=seed, pairs=pairs, image_size=image_size)
            renders.append(float(verdicts(list(images), specs).mean()))
            remade = reconstruct(vae, images, precision=precision).images
            figures[f"reconstructions_{pairs}"] = round(float(verdicts(list(remade), specs).mean()), 4)
    both = (figures["reconstructions_seen"] + figures["reconstructions_unseen"]) / 2
    return {"renders": round(sum(renders) / 2, 4), "reconstructions": round(both, 4), **figures}


def _verdicts(found: Iterable[bool]) -> NDArray[np.bool_]:
    return np.array(list(found), dtype=bool)


def _spread(pool: Executor, pictures: Sequence[NDArray[np.uint8]], specs: Sequence[SceneSpec]) -> NDArray[np.bool_]:
    return _verdicts(pool.map(satisfies, pictures, specs, chunksize=16))
