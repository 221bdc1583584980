"""Requests in, ranked images out: candidates are drawn in batches that fit the memory, decoded, scored and ranked.

Legend: B images, I image tokens, T text tokens, h w code grid, H W image.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dvae.model import DiscreteVAE
from dvae.pixels import to_uint8
from sampling.candidates import Candidate, Candidates
from sampling.decode import Pruning, Sampled, rows_that_fit, sample_steps
from sampling.editing import Known, forced_codes
from sampling.generated_image import GeneratedImage, PartialImage, ScorerName
from sampling.image_edit import ImageEdit
from sampling.likelihood import likelihood_ratio
from sampling.request import Request
from sampling.step import Forced
from scorer.api import Scorer
from tessera.errors import UserError
from tessera.precision import Precision, autocast
from tessera.text_tokenizer import TextTokenizer
from transformer.decoder import Decoder
from transformer.frozen_linear import Storage
from transformer.model import Prior

_AT_ONCE = 64  # images per dVAE and scorer forward; the dVAE takes one where images must not depend on each other
_PARTIAL_GRAY = 200  # of rows that are not there yet


class PruneShares(NamedTuple):
    """Of each request's candidates, how many go on after how much of the image."""

    keep: float = 1.0
    """In (0, 1]; 1 finishes all."""
    after: float = 0.5
    """In (0, 1)."""


FINISH_ALL = PruneShares()


class _Chunk(NamedTuple):
    """Candidates of one request that are drawn together with others."""

    place: int  # of the request
    image_index: range


def score_names(request: Request, scorer: ScorerName | None, *, has_scorer: bool) -> list[str]:
    """What is known of each candidate of a request, whatever is drawn beside it.

    Args:
        request: what was asked for.
        scorer: what ranks its candidates.
        has_scorer: whether the model has a scorer part.
    """
    names = ["clip"] if has_scorer and scorer in ("clip", "combined") else []
    if request.settings.guided or scorer in ("likelihood", "combined"):
        names.append("likelihood")  # with guidance it costs nothing: keep it whatever ranks
    if request.edit is not None:
        names.append("context")
    return names


def drawn_size(prior: Prior, vae: DiscreteVAE) -> tuple[int, int]:
    """(height, width) in pixels of the images that a dVAE makes of a prior's codes."""
    return prior.layout.grid_height * vae.downsampling, prior.layout.grid_width * vae.downsampling


class RequestRunner:
    """The models of a pipeline at work.

    Args:
        prior: in evaluation mode, on its device.
        vae: decodes the prior's codes; on the same device.
        tokenizer: the one that the prior was trained with.
        scorer: ranks images for a text, if there is one.
        model_sha256: of the model folder, kept with every image.
        precision: of the dVAE, and of the prior where it is not decoding.
        weights: how the prior's matrices are stored for decoding; see `transformer.decoder.Decoder`.
        deterministic: see `sampling.pipeline.Pipeline`.

    Attributes:
        max_rows: most rows of one forward of the prior; guidance takes two for an image.
        speculate: whether an image that is decoded alone on a CPU may take several positions in one forward; its codes
            are the same, see `sampling.jacobi`.
    """

    def __init__(
        self,
        *,
        prior: Prior,
        vae: DiscreteVAE,
        tokenizer: TextTokenizer,
        scorer: Scorer | None,
        model_sha256: str,
        precision: Precision,
        weights: Storage,
        deterministic: bool,
    ) -> None:
        self.prior = prior
        self.vae = vae
        self.tokenizer = tokenizer
        self.scorer = scorer
        self.model_sha256 = model_sha256
        self.precision = precision
        self.device = next(prior.parameters()).device
        self.decoder = Decoder(prior, weights=weights, row_independent=deterministic or self.device.type == "cpu")
        self.max_rows = rows_that_fit(self.decoder)
        self.speculate = True

    def text_ids(self, prompts: Sequence[str]) -> Tensor:
        """Token ids int64 [len(prompts), T] of prompts, cut to the prior's text length."""
        return self.tokenizer.encode_batch(prompts, text_len=self.prior.layout.text_len)

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Images uint8 [B, 3, H, W] on the CPU from codes int64 [B, h, w] of any grid."""
        images = []
        for part in codes.split(1 if self.decoder.row_independent else _AT_ONCE):
            with autocast(self.precision, self.device):
                pixels = self.vae.decode(part.to(self.device))
            images.append(to_uint8(pixels).permute(0, 3, 1, 2).contiguous().cpu())
        return torch.cat(images)

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

    def events(
        self,
        requests: Sequence[Request],
        *,
        scorer: ScorerName | None,
        every: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        pruning: PruneShares = FINISH_ALL,
    ) -> Iterator[PartialImage | list[GeneratedImage]]:
        """Draw what is asked for, candidates of as many requests at a time as fit.

        Args:
            requests: of any kind.
            scorer: what ranks candidates; None leaves them in the order of their index.
            every: show partial images after every so many tokens; None shows none.
            on_progress: called with image tokens drawn so far and in all.
            pruning: when to give up weak candidates.

        Yields:
            Partial images of the first n candidates of a request; then, request by request, its n best images. Ctrl-C
            yields the best of those that were finished, and is raised again by the next step.
        """
        image_len = self.prior.layout.image_len
        total = sum(request.num_candidates for request in requests)
        collected = [Candidates(request) for request in requests]
        num_yielded = num_before = 0
        text_ids = self.text_ids([request.prompt for request in requests])  # [requests, T]
        interrupted = False
        for chunks in self._chunks(requests):
            places = [chunk.place for chunk in chunks for _ in chunk.image_index]
            image_index = [index for chunk in chunks for index in chunk.image_index]
            own = [requests[place] for place in places]
            num_tokens = [0] * len(own)
            steps = sample_steps(
                self.decoder,
                text_ids[places],
                settings=[request.settings for request in own],
                seeds=torch.tensor([request.seed for request in own]),
                image_index=torch.tensor(image_index),
                forced=self._forced(own, image_index),
                pruning=None if pruning.keep == 1 else Pruning(torch.tensor(places), pruning.after, pruning.keep),
                speculate=self.speculate,
                max_rows=self.max_rows,
            )
            try:
                while True:
                    try:
                        step = next(steps)
                    except StopIteration as end:
                        sampled: Sampled = end.value
                        break
                    for image in step.images:  # those known for a stretch begin later, in a micro-batch of their own
                        num_tokens[image] = step.position + 1
                    if on_progress is not None:
                        on_progress(num_before * image_len + sum(num_tokens), total * image_len)
                    if every is not None and (step.position + 1) % every == 0 and step.position + 1 < image_len:
                        yield from self._partial(own, image_index, step.images, step.codes, step.position + 1)
                scores = self._scores(sampled, own, text_ids[places], scorer)
            except KeyboardInterrupt:
                interrupted = True
                break
            num_before += len(own)
            if on_progress is not None and sum(num_tokens) < len(own) * image_len:  # some were given up
                on_progress(num_before * image_len, total * image_len)
            finished, codes = sampled.is_finished.cpu(), sampled.codes.cpu()
            for chunk in chunks:
                rows = torch.tensor([place == chunk.place for place in places])
                here = (rows & finished).nonzero()[:, 0]
                collected[chunk.place].add(
                    [image_index[row] for row in here.tolist()],
                    codes[here],
                    {
                        name: scores[name][here]
                        for name in score_names(requests[chunk.place], scorer, has_scorer=self.scorer is not None)
                    },
                    num_drawn=len(chunk.image_index),
                )
            while num_yielded < len(requests) and collected[num_yielded].is_complete:
                yield self._images(collected[num_yielded], scorer)
                num_yielded += 1
        if interrupted:
            for candidates in collected[num_yielded:]:
                if len(candidates):
                    yield self._images(candidates, scorer)
            raise KeyboardInterrupt

    def _chunks(self, requests: Sequence[Request]) -> Iterator[list[_Chunk]]:
        """Candidates of as many whole requests as fit one forward at a time; of one with more, as many as fit."""
        chunks: list[_Chunk] = []
        free = self.max_rows
        for place, request in enumerate(requests):
            rows = 2 if request.settings.guided else 1
            first = 0
            while first < request.num_candidates:
                if chunks and free < min(rows * (request.num_candidates - first), self.max_rows):
                    yield chunks
                    chunks, free = [], self.max_rows
                count = min(request.num_candidates - first, max(1, free // rows))
                chunks.append(_Chunk(place, range(first, first + count)))
                first, free = first + count, free - count * rows
        if chunks:
            yield chunks

    def _forced(self, requests: Sequence[Request], image_index: Sequence[int]) -> Forced | None:
        """The codes that edits keep; None where nothing is edited."""
        if all(request.edit is None for request in requests):
            return None
        layout = self.prior.layout
        grid = (layout.grid_height, layout.grid_width)
        nothing = Known(torch.zeros(grid, dtype=torch.int64), torch.zeros(grid, dtype=torch.bool))
        return forced_codes(
            [
                nothing if request.edit is None else request.edit.known(seed=request.seed, image_index=index)
                for request, index in zip(requests, image_index, strict=True)
            ]
        )

    def _pixels(self, codes: Tensor, edit: ImageEdit | None) -> Tensor:
        """Images uint8 [B, 3, H, W] of codes int64 [B, I]."""
        layout = self.prior.layout
        images = self.decode(codes.reshape(-1, layout.grid_height, layout.grid_width))
        return images if edit is None else edit.join(self.vae, images)

    def _scores(
        self, sampled: Sampled, requests: Sequence[Request], text_ids: Tensor, scorer: ScorerName | None
    ) -> dict[str, Tensor]:
        """What is needed to rank candidates: float [B] by scorer; where a request has no use for it, whatever."""
        scores: dict[str, Tensor] = {"context": sampled.context_log_likelihood.cpu()}
        if scorer in ("clip", "combined") and self.scorer is not None:
            images = [
                image[None] if request.edit is None else request.edit.join(self.vae, image[None])
                for image, request in zip(self._pixels(sampled.codes, None), requests, strict=True)
            ]
            scores["clip"] = self.score(torch.cat(images), [request.prompt for request in requests])
        ratio = sampled.log_ratio.to("cpu", copy=True)
        is_missing = ratio.isnan()
        if bool(is_missing.any()) and scorer in ("likelihood", "combined"):
            with autocast(self.precision, self.device):
                found = likelihood_ratio(self.prior, sampled.codes[is_missing], text_ids[is_missing])
            ratio[is_missing] = found.cpu()
        scores["likelihood"] = ratio
        return scores

    def _images(self, candidates: Candidates, scorer: ScorerName | None) -> list[GeneratedImage]:
        """The n best of the candidates of one request."""
        request, layout = candidates.request, self.prior.layout
        best = candidates.best(scorer)
        pixels = self._pixels(torch.stack([candidate.codes for candidate in best]), request.edit)

        def image(place: int, candidate: Candidate) -> GeneratedImage:
            return GeneratedImage(
                image=pixels[place].permute(1, 2, 0).contiguous().numpy(),
                codes=candidate.codes.reshape(layout.grid_height, layout.grid_width).numpy(),
                prompt=request.prompt,
                seed=request.seed,
                image_index=candidate.image_index,
                rank=place,
                candidates=len(candidates),
                scorer=scorer,
                scores=candidate.scores,
                settings=request.settings,
                model_sha256=self.model_sha256,
                precision=self.decoder.weights,
                edit=None if request.edit is None else request.edit.recipe(),
            )

        return [image(place, candidate) for place, candidate in enumerate(best)]

    def _partial(
        self,
        requests: Sequence[Request],
        image_index: Sequence[int],
        places: Sequence[int],
        codes: Tensor,
        num_tokens: int,
    ) -> Iterator[PartialImage]:
        """The rows so far of the first n candidates of each request."""
        layout = self.prior.layout
        num_rows = num_tokens // layout.grid_width
        height, width = drawn_size(self.prior, self.vae)
        for row, place in enumerate(places):
            request = requests[place]
            if image_index[place] >= request.n:
                continue
            image = np.full((height, width, 3), _PARTIAL_GRAY, dtype=np.uint8)
            grid = codes[row].reshape(layout.grid_height, layout.grid_width)[:num_rows]
            if num_rows:
                rows = self.decode(grid[None])[0].permute(1, 2, 0).numpy()
                image[: rows.shape[0]] = rows
            yield PartialImage(
                image=image,
                num_rows=num_rows * self.vae.downsampling,
                num_tokens=num_tokens,
                prompt=request.prompt,
                seed=request.seed,
                image_index=image_index[place],
            )
