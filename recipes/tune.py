"""Sampling settings chosen by trial: all pairs of a grid with few prompts, then the better ones with more and more.

On scenes a trial's value is what the parser says about prompts of seen pairs; elsewhere it is how well the scorer finds
the caption that an image was drawn for among the others. The prompts on scenes are ones that no evaluation uses;
elsewhere they are captions of the validation split.
"""

import time
from collections.abc import Callable, Mapping, Sequence
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

_TEMPERATURES = (0.3, 0.5, 0.75, 1.0)
_GUIDANCES = (1.0, 1.5, 2.0, 3.0)
# How many settings are left in each round: verdicts on a few prompts are noisy, and a wrong first choice cost the demo
# a quarter of its accuracy, so that most prompts go to those that may be the best.
_ROUNDS = (16, 8, 4, 2)
_CANDIDATES = 4
_MOST_PROMPTS, _LEAST_PROMPTS = 160, 6
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


def tune(
    model: Path,
    data: DataConfig,
    *,
    seconds: float,
    device: str = "auto",
    defaults: Mapping[str, float] = DEFAULT_SETTINGS,
    whose: str = "defaults",
) -> Tuned:
    """Chooses temperature and guidance for a model folder; writes nothing.

    Args:
        model: with dvae, prior and preferably scorer.
        data: the corpus that it was trained on.
        seconds: about how long this may take.
        device: where to compute.
        defaults: the settings where there is nothing to tune with.
        whose: what to call those.
    """
    deadline = time.monotonic() + seconds
    pipeline = Pipeline.load(model, device=device)
    if data.path == "scenes":
        prompts = sample_prompts(_MOST_PROMPTS, seed=TUNING_SEED, pairs="seen")

        def value(temperature: float, guidance: float, span: range) -> float:
            judged = judge_prompts(
                pipeline,
                [("seen", prompt) for prompt in prompts[span.start : span.stop]],
                candidates=_CANDIDATES,
                seed=TUNING_SEED + span.start,
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
            return Tuned(dict(defaults), f"{whose}: too few captions or no scorer to tune with", [])

        def value(temperature: float, guidance: float, span: range) -> float:
            texts, seed = captions[span.start : span.stop], TUNING_SEED + span.start
            return caption_found(pipeline, scorer, texts, seed=seed, temperature=temperature, guidance=guidance)

        measured_by = "how well the scorer finds the caption of an image drawn for it (mean reciprocal rank)"
        most = min(_MOST_PROMPTS, len(captions))
    trials = search(value, most_prompts=most, deadline=deadline)
    if not trials:
        return Tuned(dict(defaults), f"{whose}: no time to tune", [])
    chosen = choose(trials)
    settings = {"temperature": chosen.temperature, "guidance": chosen.guidance}
    how = f"{len(trials)} settings tried; {measured_by}: {chosen.value:.1%} over {chosen.prompts} prompts"
    return Tuned(settings, how, trials)


def search(
    value: Callable[[float, float, range], float],
    *,
    most_prompts: int,
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[Trial]:
    """Tries settings until the deadline: in each round the better half (Jamieson and Talwalkar 2016, section 3).

    All settings of a round are tried with the same prompts, which are new ones in every round.

    Args:
        value: of (temperature, guidance, which prompts), in [0, 1].
        most_prompts: how many prompts there are.
        deadline: on `clock`.
        clock: seconds.

    Returns:
        A trial for every setting, with its mean value over all prompts that it was tried with; none without time.
    """
    began = clock()
    least = min(_LEAST_PROMPTS, most_prompts)
    value(_TEMPERATURES[2], _GUIDANCES[2], range(least))  # to learn what a prompt costs
    seconds_per_prompt = max((clock() - began) / least, 1e-9)
    trials = [Trial(temperature, guidance, 0.0, 0) for guidance in _GUIDANCES for temperature in _TEMPERATURES]
    first = 0
    for place, count in enumerate(_ROUNDS):
        left = deadline - clock()
        fitting = int(left / (len(_ROUNDS) - place) / (count * seconds_per_prompt))
        span = range(first, min(most_prompts, first + max(fitting, least if place == 0 else 0)))
        if not span or count * len(span) * seconds_per_prompt > left:
            break
        trials.sort(key=lambda trial: (trial.prompts, trial.value), reverse=True)
        began = clock()
        for rank, trial in enumerate(trials[:count]):
            total = trial.value * trial.prompts + value(trial.temperature, trial.guidance, span) * len(span)
            prompts = trial.prompts + len(span)
            trials[rank] = trial._replace(value=total / prompts, prompts=prompts)
        # more prompts at a time cost less each than the few at first
        seconds_per_prompt = max((clock() - began) / (count * len(span)), 1e-9)
        first = span.stop
    return [trial for trial in trials if trial.prompts]


def choose(trials: Sequence[Trial]) -> Trial:
    """The best of the trials with the most prompts; of those within the noise the one of least guidance, then the one
    whose temperature is nearest to 1."""
    most = max(trial.prompts for trial in trials)
    finalists = [trial for trial in trials if trial.prompts == most]
    highest = max(trial.value for trial in finalists)
    close = [trial for trial in finalists if trial.value >= highest - _TIE]
    return min(close, key=lambda trial: (trial.guidance, abs(1 - trial.temperature)))


def caption_found(
    pipeline: Pipeline, scorer: Embedder, captions: Sequence[str], *, seed: int, temperature: float, guidance: float
) -> float:
    """Mean reciprocal rank of the caption that an image was drawn for, among all captions, by the scorer's space."""
    settings = {"temperature": temperature, "guidance": guidance}
    seeds = range(seed, seed + len(captions))
    images = pipeline(list(captions), seed=seeds, scorer=None, on_warning=lambda _: None, **settings)
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
