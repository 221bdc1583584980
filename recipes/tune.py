"""Sampling settings chosen by trial: temperature and guidance on a coarse grid, then closely around its best.

On scenes a trial's value is what the parser says about prompts of seen pairs; elsewhere it is how well the scorer finds
the caption that an image was drawn for among the others. The prompts on scenes are ones that no evaluation uses;
elsewhere they are captions of the validation split.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from recipes.accuracy import TUNING_SEED, best, judge_prompts, single
from sampling.pipeline import Pipeline
from scorer.api import Embedder
from scorer.model import TrainedScorer
from tessera.data.config import DataConfig
from tessera.data.corpus import Corpus
from tessera.data.scenes import sample_prompts
from tessera.errors import UserError

# Good for most models; the filter cuts the tail of a large codebook, where a small model's errors live.
DEFAULT_SETTINGS = {"temperature": 0.9, "guidance": 2.0, "min_p": 0.02}

_COARSE_TEMPERATURES = (0.3, 0.6, 0.9)
_COARSE_GUIDANCES = (1.0, 2.0, 3.0)
_TEMPERATURE_STEP, _GUIDANCE_STEP = 0.15, 0.5
_CANDIDATES = 4
_MOST_PROMPTS, _LEAST_PROMPTS = 96, 6
# Fewer captions than this say nothing about settings that would hold for others.
_LEAST_CAPTIONS = 24
# Differences below are noise: of settings this close, the one that changes the model's distribution least is taken.
_TIE = 0.01


class Trial(NamedTuple):
    """One pair of settings and what it was worth, in [0, 1]."""

    temperature: float
    guidance: float
    value: float
    prompts: int


class Tuned(NamedTuple):
    """What was chosen, how, and all that was tried."""

    settings: dict[str, float]
    how: str
    trials: list[Trial]


def tune(model: Path, data: DataConfig, *, seconds: float, device: str = "auto") -> Tuned:
    """Chooses temperature and guidance for a model folder; writes nothing.

    Args:
        model: with dvae, prior and preferably scorer.
        data: the corpus that it was trained on.
        seconds: about how long this may take.
        device: where to compute.
    """
    deadline = time.monotonic() + seconds
    pipeline = Pipeline.load(model, device=device)
    if data.path == "scenes":
        prompts = sample_prompts(_MOST_PROMPTS, seed=TUNING_SEED, pairs="seen")

        def value(temperature: float, guidance: float, count: int) -> float:
            judged = judge_prompts(
                pipeline,
                [("seen", prompt) for prompt in prompts[:count]],
                candidates=_CANDIDATES,
                seed=TUNING_SEED,
                temperature=temperature,
                guidance=guidance,
            )
            # one picture should be right, and so should the best of several, which needs them to differ
            return float(np.mean([(single(result) + best(result)) / 2 for result in judged]))

        measured_by = f"parser accuracy of single images and best of {_CANDIDATES} on validation prompts of seen pairs"
        most = _MOST_PROMPTS
    else:
        captions = _captions(data)
        scorer = pipeline.scorer
        if not isinstance(scorer, TrainedScorer) or len(captions) < _LEAST_CAPTIONS:
            return Tuned(dict(DEFAULT_SETTINGS), "defaults: too few captions or no scorer to tune with", [])

        def value(temperature: float, guidance: float, count: int) -> float:
            return caption_found(pipeline, scorer, captions[:count], temperature=temperature, guidance=guidance)

        measured_by = "how well the scorer finds the caption of an image drawn for it (mean reciprocal rank)"
        most = min(_MOST_PROMPTS, len(captions))
    trials = search(value, most_prompts=most, deadline=deadline)
    if not trials:
        return Tuned(dict(DEFAULT_SETTINGS), "defaults: no time to tune", [])
    chosen = choose(trials)
    settings = {"temperature": chosen.temperature, "guidance": chosen.guidance}
    how = f"{len(trials)} settings tried; {measured_by}: {chosen.value:.1%} over {chosen.prompts} prompts"
    return Tuned(settings, how, trials)


def search(
    value: Callable[[float, float, int], float],
    *,
    most_prompts: int,
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[Trial]:
    """Tries settings until the deadline: a coarse grid with few prompts, then the surroundings of its best with more.

    Args:
        value: of (temperature, guidance, number of prompts), in [0, 1].
        most_prompts: the most that a trial may use.
        deadline: on `clock`.
        clock: seconds.

    Returns:
        The trials of the last pass that was begun with time to finish; of the coarse one if there was no other.
    """
    began = clock()
    least = min(_LEAST_PROMPTS, most_prompts)
    value(_COARSE_TEMPERATURES[1], _COARSE_GUIDANCES[1], least)  # to learn what a prompt costs
    seconds_per_prompt = max((clock() - began) / least, 1e-9)
    coarse_pairs = [(t, g) for g in _COARSE_GUIDANCES for t in _COARSE_TEMPERATURES]

    def affordable(pairs: int, share: float) -> int:
        return min(most_prompts, int(share * (deadline - clock()) / (pairs * seconds_per_prompt)))

    def run(pairs: Iterable[tuple[float, float]], count: int) -> list[Trial]:
        trials: list[Trial] = []
        for temperature, guidance in pairs:
            if trials and clock() > deadline:
                break
            trials.append(Trial(temperature, guidance, value(temperature, guidance, count), count))
        return trials

    if affordable(len(coarse_pairs), 1.0) < least:
        return []
    began = clock()
    coarse = run(coarse_pairs, max(least, affordable(len(coarse_pairs), 0.4)))
    # more prompts at a time cost less each than the few at first
    seconds_per_prompt = max((clock() - began) / sum(trial.prompts for trial in coarse), 1e-9)
    fine_pairs = around(choose(coarse))
    count = affordable(len(fine_pairs), 0.9)
    if count < max(least, coarse[0].prompts // 2):
        return coarse
    return run(fine_pairs, count)


def around(trial: Trial) -> list[tuple[float, float]]:
    """The settings of a trial and their neighbors, the trial's own first."""
    pairs = [(trial.temperature, trial.guidance)]
    for guidance_steps in (0, -1, 1):
        for temperature_steps in (0, -1, 1):
            temperature = round(trial.temperature + temperature_steps * _TEMPERATURE_STEP, 2)
            guidance = round(trial.guidance + guidance_steps * _GUIDANCE_STEP, 2)
            if temperature > 0 and guidance >= 1 and (temperature, guidance) not in pairs:
                pairs.append((temperature, guidance))
    return pairs


def choose(trials: Sequence[Trial]) -> Trial:
    """The trial of the highest value; of those within the noise the least guidance, then the temperature nearest 1."""
    highest = max(trial.value for trial in trials)
    close = [trial for trial in trials if trial.value >= highest - _TIE]
    return min(close, key=lambda trial: (trial.guidance, abs(1 - trial.temperature)))


def caption_found(
    pipeline: Pipeline, scorer: Embedder, captions: Sequence[str], *, temperature: float, guidance: float
) -> float:
    """Mean reciprocal rank of the caption that an image was drawn for, among all captions, by the scorer's space."""
    settings = {"temperature": temperature, "guidance": guidance}
    images = pipeline(list(captions), seed=TUNING_SEED, scorer=None, on_warning=lambda _: None, **settings)
    pixels = torch.from_numpy(np.stack([image.image for image in images])).permute(0, 3, 1, 2).contiguous()
    cosine = scorer.embed_images(pixels) @ scorer.embed_texts(captions).T  # [images, captions]
    ranks = (cosine > cosine.diagonal()[:, None]).sum(dim=1) + 1
    return float((1 / ranks.double()).mean())


def _captions(data: DataConfig) -> list[str]:
    """Different captions of the validation split, and of the training split where it has too few."""
    texts: list[str] = []
    for split in ("validation", "train"):
        try:
            corpus: Corpus = data.open(split)  # type: ignore[arg-type]
        except UserError:
            continue
        texts += [corpus.captions(index)[0] for index in range(min(len(corpus), 4 * _MOST_PROMPTS))]
        if len(set(texts)) >= _MOST_PROMPTS:
            break
    return [text for text in dict.fromkeys(texts) if text][:_MOST_PROMPTS]
