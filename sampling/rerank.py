"""`tessera rerank`: order any images by how well they fit a caption.

tessera rerank my-model "a red star left of a blue ring" *.png
"""

import json
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dvae.model import load as load_vae
from sampling.arguments import SCORER_CHOICES, add_device_argument
from sampling.likelihood import likelihood_ratio
from sampling.runner import drawn_size
from scorer.api import Scorer, combine_ranks, rank
from scorer.model import load as load_scorer
from tessera.data.captions import clean_caption
from tessera.data.images import ImageError, fit_to, open_image
from tessera.errors import UserError, run_command
from tessera.model_folder import ModelFolder
from tessera.one_line_parser import OneLineParser
from tessera.precision import resolve_device
from tessera.text_tokenizer import TextTokenizer
from transformer.model import load as load_prior

_AT_ONCE = 64  # images decoded, encoded and scored together


class RankedImage(NamedTuple):
    """One image file and its scores."""

    path: str
    scores: dict[str, float]
    """clip, likelihood (nats) and combined, as far as they were computed; higher is better."""


class RejectedImage(NamedTuple):
    """One file that could not be scored."""

    path: str
    reason: str


class ImageRanker:
    """Scores images against captions with parts of a model folder; only the parts that a scorer needs are loaded.

    Args:
        folder: the model folder.
        scorer: "clip", "likelihood" or "combined"; "auto" takes clip where the folder has a scorer.
        device: where to compute.

    Raises:
        UserError: a part that the scorer needs is missing, or two of them are for images of different sizes.
    """

    def __init__(self, folder: ModelFolder, *, scorer: str = "auto", device: torch.device | str = "cpu") -> None:
        if scorer == "auto":
            scorer = "clip" if folder.has("scorer") else "likelihood"
        if scorer not in ("clip", "likelihood", "combined"):
            raise UserError(f"scorer is {scorer!r}, expected auto, clip, likelihood or combined")
        self.scorer_name = scorer
        self.device = torch.device(device)
        self.tokenizer = TextTokenizer(folder.tokenizer_proto())
        self.prior = load_prior(folder, device=device) if scorer in ("likelihood", "combined") else None
        self.vae = load_vae(folder, device=device) if self.prior is not None else None
        if self.prior is not None and self.vae is not None:
            self.image_size = drawn_size(self.prior, self.vae)
        self.scorer: Scorer | None = None
        if scorer in ("clip", "combined"):
            trained = load_scorer(folder, device=device, image_size=self.image_size if scorer == "combined" else None)
            self.image_size = trained.model.config.image_size
            self.scorer = trained

    @torch.inference_mode()
    def score(self, images: Tensor, caption: str) -> dict[str, Tensor]:
        """Score images uint8 [N, 3, H, W] of `image_size` against one caption: float [N] by scorer."""
        scores: dict[str, Tensor] = {}
        if self.scorer is not None:
            scores["clip"] = self.scorer.score(images, [caption] * len(images)).float().cpu()
        if self.prior is not None and self.vae is not None:
            codes = self.vae.encode(images.to(self.device).float() / 255).flatten(1)  # [N, I]
            text_ids = self.tokenizer.encode_batch([caption], text_len=self.prior.layout.text_len)
            scores["likelihood"] = likelihood_ratio(self.prior, codes, text_ids.expand(len(images), -1)).cpu()
        return scores

    def rank_files(self, paths: Sequence[str], caption: str) -> tuple[list[RankedImage], list[RejectedImage]]:
        """Score image files, a few at a time.

        Args:
            paths: image files; each is cropped to the model's aspect and resized.
            caption: any text; cleaned like a training caption.

        Returns:
            The readable files, best first (equal scores in the order given, scores that are not numbers last), and the
            others with their reasons.
        """
        caption = clean_caption(caption)
        readable: list[str] = []
        rejects: list[RejectedImage] = []
        parts: list[dict[str, Tensor]] = []
        waiting: list[np.ndarray] = []
        for place, path in enumerate(paths):
            try:
                waiting.append(fit_to(open_image(path), self.image_size))  # uint8 [H, W, 3]
                readable.append(path)
            except ImageError as error:
                rejects.append(RejectedImage(path, str(error)))
            if waiting and (len(waiting) == _AT_ONCE or place + 1 == len(paths)):
                parts.append(self.score(torch.from_numpy(np.stack(waiting)).permute(0, 3, 1, 2), caption))
                waiting = []
        if not readable:
            return [], rejects
        scores = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if self.scorer_name == "combined":
            scores["combined"] = combine_ranks([scores["clip"], scores["likelihood"]])
        order = [int(index) for index in rank(scores[self.scorer_name])]
        ranked = [
            RankedImage(readable[index], {name: float(values[index]) for name, values in scores.items()})
            for index in order
        ]
        return ranked, rejects


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    arguments = _parser().parse_intermixed_args(list(argv))
    device = resolve_device(arguments.device)
    ranker = ImageRanker(ModelFolder.open(arguments.model), scorer=arguments.scorer, device=device)
    ranked, rejects = ranker.rank_files(arguments.images, arguments.caption)
    if arguments.json:
        for place, image in enumerate(ranked):
            scores = {name: value if math.isfinite(value) else None for name, value in image.scores.items()}
            line = {"rank": place, "path": image.path, "scorer": ranker.scorer_name, "scores": scores}
            print(json.dumps(line, ensure_ascii=False))
        for reject in rejects:
            print(json.dumps({"rank": None, "path": reject.path, "error": reject.reason}, ensure_ascii=False))
    elif ranked:
        names = list(ranked[0].scores)
        print(f"{'rank':>4}  " + "  ".join(f"{name:>10}" for name in names) + "  image")
        for place, image in enumerate(ranked):
            columns = "  ".join(f"{image.scores[name]:>10.3f}" for name in names)
            print(f"{place + 1:>4}  {columns}  {image.path}")
    for reject in rejects:
        print(f"skipped {reject.path}: {reject.reason}", file=sys.stderr)
    if not ranked:
        raise UserError(f"no image can be read; the first of {len(rejects)}: {rejects[0].path}: {rejects[0].reason}")
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="tessera rerank",
        description="Order images by how well they fit a caption, best first. Unreadable files are named and skipped.",
    )
    parser.add_argument("model", metavar="MODEL", help="a model folder, as `tessera fit` writes it")
    parser.add_argument("caption", metavar="CAPTION", help="the text, in quotes")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="PNG, JPEG, WEBP, BMP, GIF or TIFF files")
    parser.add_argument(
        "--scorer",
        default="auto",
        choices=[choice for choice in SCORER_CHOICES if choice != "none"],
        help="clip (the model's scorer part), likelihood (of the prior, in nats), combined (of the two ranks) "
        "(default: auto, clip where the model has it)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per image on stdout, best first, rank 0 is the best"
    )
    add_device_argument(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main, sys.argv[1:]))
