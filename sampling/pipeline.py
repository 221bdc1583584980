"""From prompts to ranked images: the model folder as one object that is called.

    pipeline = Pipeline.load("my-model")
    best = pipeline("a red star left of a blue ring", n=4, best_of=32, seed=7)

Legend: B images, I image tokens, h w code grid, H W image.
"""

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dvae.model import DiscreteVAE
from dvae.model import load as load_vae
from dvae.pixels import to_uint8
from sampling.bf16_weights import use_bf16_weights
from sampling.decode import Sampled, SamplingSettings, Step, rows_that_fit, sample_codes
from sampling.generated_image import GeneratedImage, ScorerName
from sampling.likelihood import likelihood_ratio
from sampling.random_stream import check_seed
from scorer.api import Scorer, combine_ranks, rank
from scorer.model import load as load_scorer
from tessera.config import from_plain
from tessera.data.captions import clean_caption
from tessera.errors import UserError
from tessera.model_folder import ModelFolder
from tessera.precision import Precision, autocast, resolve_device, resolve_precision
from tessera.text_tokenizer import TextTokenizer
from transformer.model import Prior
from transformer.model import load as load_prior

ScorerChoice = Literal["auto", "clip", "likelihood", "combined"] | None

_AT_ONCE = 64  # images per dVAE and scorer forward


class _Job(NamedTuple):
    """One prompt of a call."""

    prompt: str
    seed: int


def drawn_size(prior: Prior, vae: DiscreteVAE) -> tuple[int, int]:
    """(height, width) in pixels of the images that a dVAE makes of a prior's codes."""
    return prior.layout.grid_height * vae.downsampling, prior.layout.grid_width * vae.downsampling


class Pipeline:
    """A prior, a dVAE, a text tokenizer and, if there is one, a scorer.

    Args:
        prior: in evaluation mode, on its device.
        vae: decodes the prior's codes; on the same device.
        tokenizer: the one that the prior was trained with.
        scorer: ranks images for a text; None leaves the likelihood ratio.
        settings: sampling settings where a call gives none.
        default_scorer: what scorer="auto" means; None takes clip where there is one, else the likelihood.
        model_sha256: of the model folder, kept with every image.
        precision: of the dVAE; the prior's is that of its weights.
    """

    def __init__(
        self,
        *,
        prior: Prior,
        vae: DiscreteVAE,
        tokenizer: TextTokenizer,
        scorer: Scorer | None = None,
        settings: SamplingSettings | None = None,
        default_scorer: ScorerName | None = None,
        model_sha256: str = "",
        precision: Precision | None = None,
    ) -> None:
        self.prior = prior
        self.vae = vae
        self.tokenizer = tokenizer
        self.scorer = scorer
        self.settings = settings or SamplingSettings()
        self.default_scorer: ScorerName = default_scorer or ("likelihood" if scorer is None else "clip")
        self.model_sha256 = model_sha256
        self.device = next(prior.parameters()).device
        self.precision = precision or Precision("fp32", "the models as they were given")
        self.max_rows = rows_that_fit(prior)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str = "auto", precision: str = "auto") -> "Pipeline":
        """Load a model folder.

        Args:
            path: the folder that `tessera fit` wrote.
            device: "auto", "cpu", "cuda", ...
            precision: "auto", "bf16" or "fp32".

        Returns:
            A pipeline with the folder's own sampling defaults.

        Raises:
            UserError: the folder or a part of it is missing, damaged or does not fit the rest.
        """
        chosen_device = resolve_device(device)
        chosen_precision = resolve_precision(precision, chosen_device)
        folder = ModelFolder.open(Path(path))
        prior = load_prior(folder, device=chosen_device)
        vae = load_vae(folder, device=chosen_device)
        scorer = None
        if folder.has("scorer"):  # one that cannot read what the prior draws would show it only after the drawing
            scorer = load_scorer(folder, device=chosen_device, image_size=drawn_size(prior, vae))
        if chosen_precision.name == "bf16":
            use_bf16_weights(prior)
        defaults = folder.sampling_defaults()
        default_scorer = defaults.pop("scorer", None)
        if default_scorer not in (None, *get_args(ScorerName)):
            raise UserError(
                f"{folder.path}: sampling default scorer={default_scorer!r}, expected {', '.join(get_args(ScorerName))}"
            )
        return cls(
            prior=prior,
            vae=vae,
            tokenizer=TextTokenizer(folder.tokenizer_proto()),
            scorer=scorer,
            settings=from_plain(SamplingSettings, defaults, source=f"{folder.path}: sampling defaults"),
            default_scorer=default_scorer,
            model_sha256=folder.sha256,
            precision=chosen_precision,
        )

    def __call__(self, prompt: str | Sequence[str], **options: Any) -> list[GeneratedImage]:
        """Make images; see `stream` for the options.

        Args:
            prompt: one prompt, or several.
            **options: the keyword arguments of `stream`.

        Returns:
            n images per prompt, prompt by prompt in the order given, best first.

        Raises:
            UserError: see `stream`.
        """
        return [image for images in self.stream(prompt, **options) for image in images]

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        n: int = 1,
        best_of: int | None = None,
        seed: int | Sequence[int] = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance: float | None = None,
        scorer: ScorerChoice = "auto",
        on_progress: Callable[[int, int], None] | None = None,
        on_warning: Callable[[str], None] = warnings.warn,
    ) -> Iterator[list[GeneratedImage]]:
        """Make images and yield those of one prompt as soon as they are ranked.

        An image depends on its prompt, seed, image index and settings alone: more candidates or other prompts beside it
        change nothing (in bf16, and on GPUs, up to rounding).

        Args:
            prompt: one prompt, or several; "" draws unconditionally.
            n: images to return per prompt, >= 1.
            best_of: candidates to draw per prompt, of which the n best are returned; >= n, None is n.
            seed: from 0 to 2^63 - 1; or one per prompt.
            temperature: see `SamplingSettings`; None here and below takes the model's default.
            top_k: see `SamplingSettings`.
            top_p: see `SamplingSettings`.
            min_p: see `SamplingSettings`.
            guidance: see `SamplingSettings`.
            scorer: "clip", "likelihood", "combined" (of the two ranks), "auto" (the model's default), or None: no
                ranking, images come in the order of their index.
            on_progress: called with image tokens drawn so far and in all.
            on_warning: called with one line where a prompt does not fit.

        Yields:
            For each prompt n images, best first.

        Raises:
            UserError: an argument is out of range, or the model has no such scorer.
        """
        settings = self._settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, guidance=guidance)
        num_candidates = n if best_of is None else best_of
        if n < 1:
            raise UserError(f"n is {n}, expected at least 1")
        if num_candidates < n:
            raise UserError(f"best_of is {num_candidates}, expected at least n = {n}: it counts all candidates")
        scorer_name = self._scorer_name(scorer)
        if scorer_name is None and num_candidates > n:
            raise UserError(f"best_of {num_candidates} of n {n} needs a scorer to choose by, got none")
        jobs = self._jobs(prompt, seed, on_warning)
        return self._run(jobs, n, num_candidates, settings, scorer_name, on_progress)

    def text_ids(self, prompts: Sequence[str]) -> Tensor:
        """Token ids int64 [len(prompts), T] of prompts, cut to the prior's text length."""
        return self.tokenizer.encode_batch(prompts, text_len=self.prior.layout.text_len)

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Images uint8 [B, 3, H, W] on the CPU from codes int64 [B, I]."""
        layout = self.prior.layout
        grids = codes.reshape(-1, layout.grid_height, layout.grid_width)  # [B, h, w]
        images = []
        for part in grids.split(_AT_ONCE):
            with autocast(self.precision, self.device):
                pixels = self.vae.decode(part.to(self.device))
            images.append(to_uint8(pixels).permute(0, 3, 1, 2).contiguous().cpu())
        return torch.cat(images)

    def _run(
        self,
        jobs: Sequence[_Job],
        n: int,
        num_candidates: int,
        settings: SamplingSettings,
        scorer_name: ScorerName | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> Iterator[list[GeneratedImage]]:
        image_len = self.prior.layout.image_len
        total_tokens = len(jobs) * num_candidates * image_len
        # As many prompts at a time as fill one forward.
        images_per_forward = max(1, self.max_rows // (2 if settings.guided else 1))
        jobs_at_once = max(1, images_per_forward // num_candidates)
        for first in range(0, len(jobs), jobs_at_once):
            group = jobs[first : first + jobs_at_once]
            tokens_before = first * num_candidates * image_len

            def report(step: Step, tokens_before: int = tokens_before) -> None:
                if on_progress is not None:
                    done = step.rows.start * image_len + len(step.rows) * (step.position + 1)
                    on_progress(tokens_before + done, total_tokens)

            text_ids = self.text_ids([job.prompt for job in group]).repeat_interleave(num_candidates, dim=0)  # [B, T]
            sampled = sample_codes(
                self.prior,
                text_ids,
                settings=settings,
                seeds=torch.tensor([job.seed for job in group]).repeat_interleave(num_candidates),
                image_index=torch.arange(num_candidates).repeat(len(group)),
                max_rows=self.max_rows,
                on_step=report,
            )
            images = self.decode(sampled.codes)  # uint8 [B, 3, H, W]
            scores = self._scores(images, sampled, text_ids, [job.prompt for job in group], scorer_name)
            for place, job in enumerate(group):
                rows = slice(place * num_candidates, (place + 1) * num_candidates)
                own_scores = {name: values[rows] for name, values in scores.items()}
                yield self._rank(job, sampled.codes[rows], images[rows], own_scores, n, settings, scorer_name)

    def _scores(
        self, images: Tensor, sampled: Sampled, text_ids: Tensor, prompts: Sequence[str], scorer_name: ScorerName | None
    ) -> dict[str, Tensor]:
        """What is needed to rank the candidates of several prompts: float [B] by scorer."""
        scores: dict[str, Tensor] = {}
        if scorer_name in ("clip", "combined"):
            per_prompt = len(images) // len(prompts)
            scores["clip"] = self.score(images, [prompt for prompt in prompts for _ in range(per_prompt)])
        ratio = sampled.log_ratio  # with guidance it costs nothing: keep it whatever ranks
        if ratio is None and scorer_name in ("likelihood", "combined"):
            ratio = likelihood_ratio(self.prior, sampled.codes, text_ids)
        if ratio is not None:
            scores["likelihood"] = ratio.cpu()
        return scores

    def _rank(
        self,
        job: _Job,
        codes: Tensor,
        images: Tensor,
        scores: dict[str, Tensor],
        n: int,
        settings: SamplingSettings,
        scorer_name: ScorerName | None,
    ) -> list[GeneratedImage]:
        """The n best of the candidates of one prompt."""
        if scorer_name == "combined":
            scores["combined"] = combine_ranks([scores["clip"], scores["likelihood"]])
        order = list(range(len(codes))) if scorer_name is None else [int(i) for i in rank(scores[scorer_name])]
        layout = self.prior.layout
        grids = codes.reshape(-1, layout.grid_height, layout.grid_width).cpu()
        return [
            GeneratedImage(
                image=images[index].permute(1, 2, 0).contiguous().numpy(),
                codes=grids[index].numpy(),
                prompt=job.prompt,
                seed=job.seed,
                image_index=index,
                rank=place,
                candidates=len(codes),
                scorer=scorer_name,
                scores={name: float(values[index]) for name, values in scores.items()},
                settings=settings,
                model_sha256=self.model_sha256,
                precision=self.precision.name,
            )
            for place, index in enumerate(order[:n])
        ]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """How well images fit prompts by the learned scorer.

        Args:
            images: uint8 [B, 3, H, W].
            prompts: B texts, one per image.

        Returns:
            float32 [B] on the CPU, higher is better.

        Raises:
            UserError: the model has no scorer.
        """
        if self.scorer is None:
            raise UserError(
                "the model has no scorer part: train one with `tessera train-scorer`, or rank by likelihood"
            )
        parts = [
            self.scorer.score(images[start : start + _AT_ONCE], prompts[start : start + _AT_ONCE])
            for start in range(0, len(images), _AT_ONCE)
        ]
        return torch.cat(parts).float().cpu()

    def _settings(self, **overrides: float | None) -> SamplingSettings:
        given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
        return dataclasses.replace(self.settings, **given)

    def _scorer_name(self, choice: ScorerChoice) -> ScorerName | None:
        if choice not in (None, "auto", *get_args(ScorerName)):
            raise UserError(f"scorer is {choice!r}, expected auto, {', '.join(get_args(ScorerName))} or None")
        name = self.default_scorer if choice == "auto" else choice
        if name in ("clip", "combined") and self.scorer is None:
            if choice == "auto":
                return "likelihood"
            raise UserError(
                f"scorer {name} needs a scorer part, which the model does not have: "
                "train one with `tessera train-scorer`, or choose likelihood"
            )
        return name

    def _jobs(
        self, prompt: str | Sequence[str], seed: int | Sequence[int], on_warning: Callable[[str], None]
    ) -> list[_Job]:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts, expected one seed, or one per prompt")
        jobs = []
        for text, number in zip(prompts, seeds, strict=True):
            check_seed(number)
            cleaned = clean_caption(text)
            text_len = self.prior.layout.text_len
            num_tokens = len(self.tokenizer.encode(cleaned))
            if num_tokens > text_len:
                shown = cleaned if len(cleaned) <= 60 else cleaned[:57] + "..."
                on_warning(
                    f"the prompt has {num_tokens} tokens, the model reads {text_len}: "
                    f"the last {num_tokens - text_len} are ignored ({shown!r})"
                )
            jobs.append(_Job(cleaned, number))
        return jobs
