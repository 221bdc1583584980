"""From prompts to ranked images: the model folder as one object that is called.

    pipe = Pipeline.load("my-model")
    images = pipe("a red star left of a blue ring", n=4, best_of=32, seed=7)

Legend: B images, I image tokens, h w code grid, H W image.
"""

import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import numpy as np
import torch

from dvae.model import DiscreteVAE
from dvae.model import load as load_vae
from sampling.editing import Seam
from sampling.generated_image import GeneratedImage, PartialImage, ScorerName
from sampling.image_edit import EditOptions, ImageSource, MaskSource, make_edit, read_init
from sampling.outpainting import Margins, draw_canvas, new_canvas, parse_margins, plan_windows
from sampling.request import Request
from sampling.runner import PruneShares, RequestRunner, drawn_size
from sampling.settings import SamplingSettings, SettingsOverrides, override
from scorer.api import Scorer
from scorer.model import load as load_scorer
from tessera.config import from_plain
from tessera.data.captions import clean_caption
from tessera.errors import UserError
from tessera.model_folder import ModelFolder
from tessera.precision import Precision, resolve_device, resolve_precision
from tessera.text_tokenizer import TextTokenizer
from transformer.frozen_linear import Storage
from transformer.model import Prior
from transformer.model import load as load_prior

ScorerChoice = Literal["auto", "clip", "likelihood", "context", "combined"] | None


class CallOptions(SettingsOverrides, total=False):
    """The keyword arguments of a call; see `Pipeline.stream`."""

    n: int
    best_of: int | None
    seed: int | Sequence[int]
    scorer: ScorerChoice
    init: ImageSource | None
    mask: MaskSource | None
    keep_rows: int | None
    keep: float | None
    seam: Seam
    prune_keep: float
    prune_after: float
    on_progress: Callable[[int, int], None] | None
    on_warning: Callable[[str], None]


class Pipeline(RequestRunner):
    """A prior, a dVAE, a text tokenizer and, if there is one, a scorer.

    Args:
        prior: in evaluation mode, on its device.
        vae: decodes the prior's codes; on the same device.
        tokenizer: the one that the prior was trained with.
        scorer: ranks images for a text; None leaves the likelihood ratio.
        settings: sampling settings where a call gives none.
        default_scorer: what scorer="auto" means; None takes clip where there is one, else the likelihood.
        model_sha256: of the model folder, kept with every image.
        precision: of the dVAE, and of the prior where it is not decoding.
        weights: how the prior's matrices are stored for decoding; see `transformer.decoder.Decoder`.
        deterministic: on GPUs, whether images shall not depend on what is drawn beside them; on CPUs they never do.
            Each forward then has the same number of rows, however few are needed.
        knows_empty_caption: whether the prior was trained with empty captions, without which guidance cannot work.

    Example:
        >>> pipe = Pipeline.load("my-model")
        >>> images = pipe("a red star", n=2, best_of=4, seed=7)
        >>> [image.rank for image in images]
        [0, 1]
        >>> best = images[0]
        >>> best.image.dtype, best.codes.ndim, best.settings.temperature > 0, "likelihood" in best.scores
        (dtype('uint8'), 2, True, True)
        >>> again = pipe("a red star", n=1, seed=7, scorer=None, init=best.image, keep_rows=2)[0]
        >>> bool((again.codes[:2] == pipe.encode(best.image)[:2]).all())  # the first two rows of codes are kept
        True
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
        weights: Storage = "fp32",
        deterministic: bool = False,
        knows_empty_caption: bool = True,
    ) -> None:
        super().__init__(
            prior=prior,
            vae=vae,
            tokenizer=tokenizer,
            scorer=scorer,
            model_sha256=model_sha256,
            precision=precision or Precision("fp32", "the models as they were given"),
            weights=weights,
            deterministic=deterministic,
        )
        self.settings = settings or SamplingSettings()
        self.default_scorer: ScorerName = default_scorer or ("likelihood" if scorer is None else "clip")
        self.knows_empty_caption = knows_empty_caption

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str = "auto",
        precision: str = "auto",
        deterministic: bool = False,
    ) -> "Pipeline":
        """Load a model folder.

        Args:
            path: the folder that `tessera fit` wrote.
            device: "auto", "cpu", "cuda", ...
            precision: "auto", "bf16" or "fp32"; "int8" stores the prior's weights in 8 bits for decoding, for the
                lowest latency of single images, and leaves all else as "auto" has it.
            deterministic: see the class.

        Returns:
            A pipeline with the folder's own sampling defaults.

        Raises:
            UserError: the folder or a part of it is missing, damaged or does not fit the rest.
        """
        chosen_device = resolve_device(device)
        if chosen_device.type == "mps":
            raise UserError("sampling needs 64-bit floating point, which device mps does not have: use cpu")
        chosen_precision = resolve_precision("auto" if precision == "int8" else precision, chosen_device)
        folder = ModelFolder.open(Path(path))
        prior = load_prior(folder, device=chosen_device)
        vae = load_vae(folder, device=chosen_device)
        scorer = None
        if folder.has("scorer"):  # one that cannot read what the prior draws would show it only after the drawing
            scorer = load_scorer(folder, device=chosen_device, image_size=drawn_size(prior, vae))
        defaults = folder.sampling_defaults()
        default_scorer = defaults.pop("scorer", None)
        names = [name for name in get_args(ScorerName) if name != "context"]  # which only edits have
        if default_scorer not in (None, *names):
            raise UserError(f"{folder.path}: sampling default scorer={default_scorer!r}, expected {', '.join(names)}")
        return cls(
            prior=prior,
            vae=vae,
            tokenizer=TextTokenizer(folder.tokenizer_proto()),
            scorer=scorer,
            settings=from_plain(SamplingSettings, defaults, source=f"{folder.path}: sampling defaults"),
            default_scorer=default_scorer,
            model_sha256=folder.sha256,
            precision=chosen_precision,
            weights="int8" if precision == "int8" else chosen_precision.name,
            deterministic=deterministic,
            knows_empty_caption=folder.metadata("prior").get("condition_dropout") != 0,
        )

    def __call__(self, prompt: str | Sequence[str], **options: Unpack[CallOptions]) -> list[GeneratedImage]:
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

    def stream(self, prompt: str | Sequence[str], **options: Unpack[CallOptions]) -> Iterator[list[GeneratedImage]]:
        """Make images and yield those of one prompt as soon as they are ranked.

        An image depends on its prompt, seed, image index, settings and edit alone: more candidates or other prompts
        beside it change nothing (on GPUs up to rounding, unless the pipeline is deterministic).

        Args:
            prompt: one prompt, or several; "" draws unconditionally.
            **options:

                - n: images to return per prompt, >= 1 (default 1).
                - best_of: candidates to draw per prompt, of which the n best are returned; >= n, None is n. They are
                  drawn as many at a time as fit the memory.
                - seed: from 0 to 2^63 - 1 (default 0); or one per prompt.
                - guidance, guidance_schedule, guidance_power, guidance_threshold, temperature, top_k, top_p, min_p: see
                  `SamplingSettings`; None takes the model's default.
                - scorer: "clip"; "likelihood"; "context", how likely the kept codes of an edit are after the drawn
                  ones; "combined" (of the ranks by all of these); "auto" (the default: the model's choice, and for
                  edits combined); or None: no ranking, images come in the order of their index.
                - init, mask, keep_rows, keep, seam: edit an image; see `EditOptions`.
                - prune_keep, prune_after: go on with this share of the candidates after this share of the image, by
                  the likelihood so far among those drawn together (defaults 1, all, and 0.5).
                - on_progress: called with image tokens drawn so far and in all.
                - on_warning: called with one line where something does not fit (default `warnings.warn`).

        Yields:
            For each prompt n images, best first. Ctrl-C yields the best of those that were finished for the prompts
            begun, and is raised again by the next step.

        Raises:
            UserError: an argument is out of range, or the model has no such scorer.
        """
        return self._finished(self._events(prompt, None, options))

    def watch(
        self, prompt: str | Sequence[str], *, every: int, **options: Unpack[CallOptions]
    ) -> Iterator[PartialImage | GeneratedImage]:
        """Make images and show them while they grow.

        Args:
            prompt: one prompt, or several.
            every: show partial images after every so many tokens, >= 1.
            **options: as for `stream`.

        Yields:
            Partial images of the first n candidates of a prompt, then its n best images, finished. Who stops iterating
            (and closes the iterator, as leaving a `for` loop's scope does) cancels the rest within one token.

        Raises:
            UserError: see `stream`.
        """
        if not isinstance(every, Integral) or every < 1:
            raise UserError(f"every is {every!r}, expected a whole number of tokens, at least 1")
        return self._flat(self._events(prompt, every, options))

    def grid(
        self,
        prompt: str,
        *,
        axes: Mapping[str, Sequence[Any]],
        seed: int = 0,
        scorer: ScorerChoice = "auto",
        on_progress: Callable[[int, int], None] | None = None,
        on_warning: Callable[[str], None] = warnings.warn,
        **settings: Unpack[SettingsOverrides],
    ) -> list[GeneratedImage]:
        """One image for each combination of settings, all in one batch, with the same random numbers.

        Args:
            prompt: what to draw.
            axes: setting -> values, such as {"guidance": [1, 2, 4], "temperature": [0.8, 1]}.
            seed: from 0 to 2^63 - 1.
            scorer: what scores the images; see `stream`.
            on_progress: see `stream`.
            on_warning: see `stream`.
            **settings: for all images.

        Returns:
            The images in the order of `itertools.product`: the last axis changes fastest.

        Raises:
            UserError: an axis is no setting, or has no values or one out of range.
        """
        if not axes or not all(isinstance(values, Sequence) and values for values in axes.values()):
            raise UserError("a grid needs at least one setting, and a list with at least one value of each")
        for name in axes:
            if settings.get(name) is not None:
                raise UserError(f"{name} is an axis of the grid and given beside it: expected one of both")
        combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        cleaned = self._cleaned(prompt, on_warning)
        requests = [
            Request(
                prompt=cleaned,
                seed=seed,
                settings=override(override(self.settings, settings), combination),  # type: ignore[arg-type]
            )
            for combination in combinations
        ]
        return [image for images in self.run(requests, scorer, on_progress, on_warning) for image in images]

    def outpaint(
        self,
        prompt: str,
        *,
        init: ImageSource,
        margins: Margins | str,
        n: int = 1,
        best_of: int | None = None,
        seed: int = 0,
        step: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        on_warning: Callable[[str], None] = warnings.warn,
        **settings: Unpack[SettingsOverrides],
    ) -> list[GeneratedImage]:
        """Extend an image beyond the size that the model draws, by a window that slides over a larger canvas.

        Args:
            prompt: what to draw.
            init: the given image.
            margins: cells (of `vae.downsampling` pixels) to add on each side, also as text: "right=4,bottom=2".
            n: images to return, >= 1, by index.
            best_of: candidates in all, a multiple of n; None is n. Each image draws its share of them in each window,
                and goes on with the one that makes the known codes of the window most likely.
            seed: from 0 to 2^63 - 1.
            step: new rows or columns per window; see `sampling.outpainting.plan_windows`.
            on_progress: called with image tokens of windows done and in all.
            on_warning: see `stream`.
            **settings: see `stream`.

        Returns:
            n images with larger codes and pixels.

        Raises:
            UserError: an argument is out of range, or the image cannot be used.
        """
        layout, vae = self.prior.layout, self.vae
        grid = (layout.grid_height, layout.grid_width)
        if isinstance(margins, str):
            margins = parse_margins(margins)
        if not isinstance(margins, Margins) or not all(isinstance(cells, Integral) for cells in margins):
            raise UserError(
                f"margins are {margins!r}, expected text such as 'right=4,bottom=2', or Margins of integers"
            )
        request = Request(
            prompt=self._cleaned(prompt, on_warning),
            seed=seed,
            n=n,
            num_candidates=n if best_of is None else best_of,
            settings=override(self.settings, settings),
        )
        per_image = request.num_candidates // n
        if per_image * n != request.num_candidates:
            raise UserError(f"best_of is {best_of}, expected a multiple of n = {n}: each image has as many candidates")
        self._warn_of_guidance([request], on_warning)
        windows = plan_windows(grid, margins, step=step)
        given = read_init(vae, drawn_size(self.prior, vae), init, on_warning)
        num_tokens = request.num_candidates * layout.image_len  # of one window

        def tell(num_windows: int) -> None:
            if on_progress is not None:
                on_progress(num_windows * num_tokens, len(windows) * num_tokens)

        drawn = draw_canvas(
            self.decoder,
            new_canvas(given.codes.expand(n, -1, -1), margins),
            windows,
            self.text_ids([request.prompt])[0],
            settings=request.settings,
            seed=seed,
            num_candidates=per_image,
            max_rows=self.max_rows,
            on_window=tell,
        )
        pixels = self.decode(drawn.codes)  # uint8 [n, 3, H', W']
        return [
            GeneratedImage(
                image=pixels[index].permute(1, 2, 0).contiguous().numpy(),
                codes=drawn.codes[index].numpy(),
                prompt=request.prompt,
                seed=seed,
                image_index=index,
                rank=index,
                candidates=per_image,
                scorer=None if per_image == 1 else "context",
                scores={"context": float(drawn.context_log_likelihood[index])},
                settings=request.settings,
                model_sha256=self.model_sha256,
                precision=self.decoder.weights,
                edit={
                    "kind": "outpaint",
                    "init_sha256": given.sha256,
                    "margins": margins._asdict(),
                    "step": step,
                    "candidates": per_image,
                },
            )
            for index in range(n)
        ]

    def run(
        self,
        requests: Sequence[Request],
        scorer: ScorerChoice = "auto",
        on_progress: Callable[[int, int], None] | None = None,
        on_warning: Callable[[str], None] = warnings.warn,
    ) -> Iterator[list[GeneratedImage]]:
        """Make images for requests of any kind, mixed in one batch; yields as `stream` does.

        Args:
            requests: what to draw.
            scorer: see `stream`.
            on_progress: see `stream`.
            on_warning: see `stream`.

        Raises:
            UserError: the model has no such scorer, or cannot rank by it.
        """
        scorer_name = self._scorer_name(scorer, requests)
        if scorer_name is None and any(request.num_candidates > request.n for request in requests):
            raise UserError("a request has more candidates than images, which needs a scorer to choose by, got none")
        self._warn_of_guidance(requests, on_warning)
        return self._finished(self.events(requests, scorer=scorer_name, on_progress=on_progress))

    @torch.inference_mode()
    def encode(self, image: np.ndarray) -> np.ndarray:
        """The codes int64 [h, w] of an image uint8 [H, W, 3]."""
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].to(self.device).float() / 255
        return self.vae.encode(pixels)[0].cpu().numpy()

    def _events(
        self, prompt: str | Sequence[str], every: int | None, options: CallOptions
    ) -> Iterator[PartialImage | list[GeneratedImage]]:
        """Check what the user asks for, at once, and begin to draw when the iterator is asked."""
        given: dict[str, Any] = dict(options)
        n, best_of, seed = given.pop("n", 1), given.pop("best_of", None), given.pop("seed", 0)
        choice, on_progress = given.pop("scorer", "auto"), given.pop("on_progress", None)
        on_warning = given.pop("on_warning", warnings.warn)
        pruning = PruneShares(given.pop("prune_keep", 1.0), given.pop("prune_after", 0.5))
        edit_options = EditOptions(**{name: given.pop(name) for name in EditOptions._fields if name in given})
        settings = override(self.settings, given)  # type: ignore[arg-type]
        if not isinstance(prompt, str | Iterable):
            raise UserError(f"prompt is {prompt!r}, expected text, or a list of texts")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = list(seed) if isinstance(seed, Iterable) else [seed] * len(prompts)
        if len(seeds) != len(prompts):
            raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts, expected one seed, or one per prompt")
        if not all(isinstance(share, Real) for share in pruning) or not (
            0 < pruning.keep <= 1 and 0 < pruning.after < 1
        ):
            raise UserError(
                f"prune_keep is {pruning.keep!r}, prune_after {pruning.after!r}, expected shares in (0, 1] and (0, 1)"
            )
        asked = Request(prompt="", seed=0, n=n, num_candidates=n if best_of is None else best_of, settings=settings)
        if math.ceil(pruning.keep * asked.num_candidates) < n:
            raise UserError(
                f"prune_keep {pruning.keep} leaves {math.ceil(pruning.keep * asked.num_candidates)} of "
                f"{asked.num_candidates} candidates, expected at least n = {n}"
            )
        edit = None
        if edit_options.is_asked:
            edit = make_edit(self.vae, drawn_size(self.prior, self.vae), edit_options, on_warning)
        requests = [
            Request(
                prompt=self._cleaned(text, on_warning),
                seed=own_seed,
                n=n,
                num_candidates=asked.num_candidates,
                settings=settings,
                edit=edit,
            )
            for text, own_seed in zip(prompts, seeds, strict=True)
        ]
        scorer_name = self._scorer_name(choice, requests)
        if scorer_name is None and asked.num_candidates > n:
            raise UserError(f"best_of {asked.num_candidates} of n {n} needs a scorer to choose by, got none")
        self._warn_of_guidance(requests, on_warning)
        return self.events(requests, scorer=scorer_name, every=every, on_progress=on_progress, pruning=pruning)

    @staticmethod
    def _finished(events: Iterator[PartialImage | list[GeneratedImage]]) -> Iterator[list[GeneratedImage]]:
        return (event for event in events if isinstance(event, list))

    @staticmethod
    def _flat(
        events: Iterator[PartialImage | list[GeneratedImage]],
    ) -> Iterator[PartialImage | GeneratedImage]:
        for event in events:
            if isinstance(event, PartialImage):
                yield event
            else:
                yield from event

    def _scorer_name(self, choice: ScorerChoice, requests: Sequence[Request]) -> ScorerName | None:
        if choice not in (None, "auto", *get_args(ScorerName)):
            raise UserError(f"scorer is {choice!r}, expected auto, {', '.join(get_args(ScorerName))} or None")
        are_edits = bool(requests) and all(request.edit is not None for request in requests)
        if choice == "context" and not are_edits:
            raise UserError("scorer context asks how well kept codes fit the drawn ones: it needs an init image")
        if choice == "auto" and are_edits:
            return "combined"
        name = self.default_scorer if choice == "auto" else choice
        if name in ("clip", "combined") and self.scorer is None:
            if choice == "auto":
                return "likelihood"
            if name == "clip" or not are_edits:
                raise UserError(
                    f"scorer {name} needs a scorer part, which the model does not have: "
                    "train one with `tessera train-scorer`, or choose likelihood"
                )
        return name

    def _warn_of_guidance(self, requests: Sequence[Request], on_warning: Callable[[str], None]) -> None:
        if not self.knows_empty_caption and any(request.settings.guided for request in requests):
            on_warning(
                "guidance compares with the empty caption, which this prior never saw: it was trained with "
                "condition_dropout 0. Expect worse images than with guidance 1"
            )

    def _cleaned(self, text: str, on_warning: Callable[[str], None]) -> str:
        """The prompt as training captions are cleaned; tells if it is too long."""
        if not isinstance(text, str):
            raise UserError(f"a prompt is {text!r}, expected text")
        cleaned = clean_caption(text)
        text_len = self.prior.layout.text_len
        num_tokens = len(self.tokenizer.encode(cleaned))
        if num_tokens > text_len:
            shown = cleaned if len(cleaned) <= 60 else cleaned[:57] + "..."
            on_warning(
                f"the prompt has {num_tokens} tokens, the model reads {text_len}: "
                f"the last {num_tokens - text_len} are ignored ({shown!r})"
            )
        return cleaned
