"""Trains the scorer and exports it into a model folder: `tessera train-scorer CONFIG.yaml key=value ...`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from scorer.batches import CaptionedBatches, Reconstruct
from scorer.lit import ScorerLit
from scorer.model import ClipScorer, ClipScorerConfig, TrainedScorer
from tessera.config import from_plain, load, to_plain
from tessera.data.config import DataConfig
from tessera.data.corpus import LazyImages, open_images
from tessera.data.order import SampleKey
from tessera.errors import UserError
from tessera.model_folder import INDEX_FILE, ModelFolder, write_part, write_tokenizer
from tessera.precision import resolve_device
from tessera.text_tokenizer import TextTokenizer
from tessera.training import stage
from tessera.training.optim import OptimizerConfig
from tessera.training.processes import first_goes_ahead, is_first, join, on_first
from tessera.training.run import TrainerConfig, run_training

# N images, H W pixels, M measured pairs.

_MEASURED_PAIRS = 500
_MEASURED_CHOICES, _CHOICES = 64, 16  # captions, and candidates for each
_VALIDATION_BATCHES = 4
_MOST_PATCHES = 144  # attention is quadratic in them: larger images are cut into larger patches


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run of the scorer."""

    data: DataConfig = DataConfig()
    """what to train on"""
    model: ClipScorerConfig = ClipScorerConfig()
    """sizes; image_size, text_len and text_vocab_size are taken from the data, and patches grow with large images"""
    optim: OptimizerConfig = OptimizerConfig(learning_rate=1e-2)
    """rates"""
    trainer: TrainerConfig = TrainerConfig(batch_size=32)
    """how long and on what"""
    num_captions: int = 2
    """captions of an image that the matching head learns from at a time"""
    contrastive_weight: float = 0.2
    """weight of the embeddings' loss beside the matching head's"""
    blind_share: float = 0.1
    """share of images, 0 to 1, hidden from the matching head, which so learns what is said without one"""
    reconstruction_share: float = 0.5
    """share of images, 0 to 1, seen as the dVAE reconstructs them, where such are given"""
    vocab_size: int = 4096
    """most pieces of a new text tokenizer, should the model folder have none; small corpora get fewer"""
    init_from: str | None = None
    """model folder whose scorer the training starts from; null begins with new weights"""
    out: str = "my-model"
    """model folder that receives the scorer part"""
    run_dir: str = "runs/scorer"
    """receives checkpoints and metrics; the same command resumes from it"""

    def __post_init__(self) -> None:
        for name in ("blind_share", "reconstruction_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie in [0, 1]; got {getattr(self, name)}")
        if self.num_captions < 1:
            raise UserError(f"num_captions must be at least 1; got {self.num_captions}")


class TrainedResult(NamedTuple):
    """What `train_scorer` returns.

    Attributes:
        scorer: the trained scorer, in evaluation mode.
        steps: optimizer steps in all.
        seconds: training time in all.
        metrics: see `measure`.
    """

    scorer: TrainedScorer
    steps: int
    seconds: float
    metrics: dict[str, float]


def train_scorer(
    images: NDArray[np.uint8] | LazyImages,
    captions: Sequence[tuple[str, ...]],
    tokenizer: TextTokenizer,
    *,
    config: TrainConfig,
    run_dir: Path,
    reconstruct: Reconstruct | None = None,
    validation: tuple[NDArray[np.uint8], Sequence[tuple[str, ...]]] | None = None,
) -> TrainedResult:
    """Trains on pairs in memory; resumes from the newest checkpoint in `run_dir`. Writes no model folder.

    Args:
        images: uint8 [N, H, W, 3], at least 2.
        captions: N tuples of at least one caption each; blank ones are legal.
        tokenizer: splits captions.
        config: sizes and rates; `data`, `out` and `run_dir` are not read.
        run_dir: receives checkpoints and metrics.
        reconstruct: gives rows of the images as a dVAE reconstructs them: what will be ranked looks so.
        validation: held-out images and captions to measure on; None measures on some of the training pairs.

    Raises:
        UserError: if there are fewer than 2 images, or reconstructions are asked of loader processes.
        KeyboardInterrupt: after saving, when the user interrupted; the same call resumes.
    """
    if reconstruct is not None and config.trainer.num_workers:
        raise UserError(
            f"reconstructions are made by the process that trains: trainer.num_workers must be 0; "
            f"got {config.trainer.num_workers}"
        )
    if config.trainer.accumulate > 1 or config.trainer.checkpoint_activations:
        raise UserError(
            "a scorer compares all images of a batch with one another, and is small: trainer.accumulate must be 1 and "
            "trainer.checkpoint_activations false"
        )
    if len(images) < 2:
        raise UserError(f"a scorer learns from differences: it needs at least 2 captioned images, got {len(images)}")
    begins_with = None
    if config.init_from is not None:
        begins_with = stage.weights_to_start_from(config.init_from, "scorer", tokenizer_sha256=tokenizer.sha256)
        model_config = _sizes_of(begins_with, images.shape[1:3])  # type: ignore[arg-type]
    else:
        model_config = fitted_config(config.model, images.shape[1:3], captions, tokenizer)  # type: ignore[arg-type]
    training = CaptionedBatches(
        images,
        captions,
        tokenizer,
        text_len=model_config.text_len,
        num_captions=config.num_captions,
        reconstruct=reconstruct,
        reconstruction_share=config.reconstruction_share,
    )
    held_images, held_captions = validation or (images, captions)
    held_images, held_captions = np.asarray(held_images[:_MEASURED_PAIRS]), held_captions[:_MEASURED_PAIRS]
    torch.manual_seed(config.trainer.seed)
    model = ClipScorer(model_config)
    if begins_with is not None:
        stage.start_from(model, begins_with, "scorer")
    result = run_training(
        ScorerLit(
            model,
            optim=config.optim,
            contrastive_weight=config.contrastive_weight,
            blind_share=config.blind_share,
        ),
        training,
        name="scorer",
        config=config.trainer,
        optim=config.optim,
        run_dir=run_dir,
        validation=_validation(training, held_images, held_captions, batch_size=config.trainer.batch_size),
    )
    scorer = TrainedScorer(model.to(resolve_device(config.trainer.device)), tokenizer)
    metrics = measure(scorer, held_images, held_captions)
    return TrainedResult(scorer, result.steps, result.seconds, metrics)


def fitted_config(
    config: ClipScorerConfig,
    image_size: tuple[int, int],
    captions: Sequence[tuple[str, ...]],
    tokenizer: TextTokenizer,
) -> ClipScorerConfig:
    """The config with the sizes that follow from the data."""
    config = replace(
        config,
        image_size=(int(image_size[0]), int(image_size[1])),
        text_len=tokenizer.fitting_text_len(text for texts in captions for text in texts),
        text_vocab_size=tokenizer.vocab_size,
    )
    while config.num_patches > _MOST_PATCHES:
        config = replace(config, patch_size=2 * config.patch_size)
    return config


def _sizes_of(folder: ModelFolder, image_size: tuple[int, int]) -> ClipScorerConfig:
    """The sizes of the scorer that training starts from, which must be for images of this size."""
    config = from_plain(ClipScorerConfig, folder.config("scorer"), source=f"{folder.path}/scorer/config.yaml")
    if config.image_size != tuple(image_size):
        scored, given = ("x".join(map(str, size)) for size in (config.image_size, image_size))
        raise UserError(f"init_from={folder.path}: its scorer sees images of {scored} pixels, these have {given}")
    return config


def _validation(
    training: CaptionedBatches, images: NDArray[np.uint8], captions: Sequence[tuple[str, ...]], *, batch_size: int
) -> list[dict[str, torch.Tensor]]:
    source = CaptionedBatches(
        images, captions, training.tokenizer, text_len=training.text_len, num_captions=training.num_captions
    )
    keys = [SampleKey(place, 0) for place in range(min(len(source), _VALIDATION_BATCHES * batch_size))]
    return [source.batch(keys[start : start + batch_size]) for start in range(0, len(keys), batch_size)]


def measure(scorer: TrainedScorer, images: NDArray[np.uint8], captions: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """Retrieval by the embeddings, and choices by the ranking score, on pairs that were best not trained on.

    Args:
        scorer: to be measured.
        images: uint8 [M, H, W, 3].
        captions: M tuples; the first of each is used.

    Returns:
        image_to_text and text_to_image: share of images (captions), 0 to 1, whose own caption (image) is nearest among
        all M by the embeddings; best_of_16: share of 64 captions for which the ranking score prefers their own image
        to those of the 15 captions nearest by the embeddings. An image with the same caption counts as their own.
    """
    texts = [one[0] for one in captions]
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    words = scorer.embed_texts(texts)
    cosine = (scorer.embed_images(pixels) @ words.T).cpu()  # [M, M]
    equal = torch.tensor([[a == b for b in texts] for a in texts])
    rows = torch.arange(len(texts))
    similar = (words @ words.T).cpu().masked_fill(equal, -torch.inf)
    asked = rows[:_MEASURED_CHOICES]
    nearest = similar[asked].topk(min(_CHOICES, len(texts)) - 1, dim=1).indices
    candidates = torch.cat([asked[:, None], nearest], dim=1)  # [64, 16]
    scores = scorer.score(pixels[candidates.flatten()], [texts[row] for row in asked for _ in candidates[row]])
    chosen = candidates.gather(1, scores.cpu().view_as(candidates).argmax(dim=1, keepdim=True)).squeeze(1)
    return {
        "image_to_text": float(equal[rows, cosine.argmax(dim=1)].float().mean()),
        "text_to_image": float(equal[rows, cosine.argmax(dim=0)].float().mean()),
        "best_of_16": float(equal[asked, chosen].float().mean()),
    }


def train(config: TrainConfig, *, reconstruct: Reconstruct | None = None) -> dict[str, Any]:
    """Trains, measures on the validation split and exports; resumes or returns at once where that was done before.

    Args:
        config: the run.
        reconstruct: gives rows of the training split as the model's dVAE reconstructs them.

    Returns:
        steps, seconds, metrics (see `measure`) and sha256 of the exported part.

    Raises:
        UserError: if the corpus cannot be used or the folder's tokenizer is damaged.
        KeyboardInterrupt: after saving, when the user interrupted.
    """
    join(config.trainer.device)
    run_dir, out = Path(config.run_dir), Path(config.out)
    with first_goes_ahead():
        corpus = config.data.open("train")
        captions = [corpus.captions(index) for index in range(len(corpus))]
        tokenizer = _tokenizer(out, captions, vocab_size=config.vocab_size)
        inputs = {"corpus": corpus.fingerprint(), "tokenizer": tokenizer.sha256}
        if config.init_from is not None:
            inputs["init_from"] = ModelFolder.open(config.init_from, parts=["scorer"]).part_sha256("scorer")
        finished = stage.begin(run_dir, config, inputs=inputs)
        if finished is not None and _is_exported(out, finished["sha256"]):
            return finished
        images = open_images(corpus, directory=config.data.cache_path, most_gib=config.data.cache_gib)
        captions = [corpus.captions(index) for index in range(len(corpus))]  # files that failed have got a substitute
        try:
            held_out = config.data.open("validation", beside=corpus)
            held_images = open_images(held_out, directory=config.data.cache_path, most_gib=config.data.cache_gib)[
                :_MEASURED_PAIRS
            ]
            validation = np.asarray(held_images), [held_out.captions(index) for index in range(len(held_images))]
        except UserError:  # a handful of images leaves none to hold out
            validation = None
    result = train_scorer(
        images,
        captions,
        tokenizer,
        config=config,
        run_dir=run_dir,
        reconstruct=reconstruct,
        validation=validation,
    )
    model = result.scorer.model

    def export() -> dict[str, Any]:
        sha256 = write_part(
            out,
            "scorer",
            config=to_plain(model.config),
            tensors=model.state_dict(),
            requires={"tokenizer": tokenizer.sha256},
            metadata={"corpus": corpus.name, "images": len(images), "steps": result.steps, "measured": result.metrics},
        )
        finished = {"steps": result.steps, "seconds": result.seconds, "metrics": result.metrics, "sha256": sha256}
        stage.finish(run_dir, finished)
        return finished

    return on_first(export)


def _tokenizer(out: Path, captions: Sequence[tuple[str, ...]], *, vocab_size: int) -> TextTokenizer:
    """The model folder's, or a new one if it has none."""
    if (out / INDEX_FILE).exists():
        folder = ModelFolder.open(out, parts=[])
        if folder.has_tokenizer:
            return TextTokenizer(folder.tokenizer_proto())
    tokenizer = TextTokenizer.train((text for texts in captions for text in texts), vocab_size=vocab_size)
    write_tokenizer(out, tokenizer.proto)
    return tokenizer


def _is_exported(out: Path, sha256: str) -> bool:
    try:
        return ModelFolder.open(out, parts=["scorer"]).part_sha256("scorer") == sha256
    except UserError:
        return False


def main(argv: Sequence[str]) -> int:
    """The command."""
    config = load(TrainConfig, argv, prog="tessera train-scorer")
    result = train(config)
    if not is_first():
        return 0
    shown = "  ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items())
    print(f"scorer in {config.out}: {result['steps']:,} steps, {result['seconds']:,.0f} s, {shown}")
    return 0


if __name__ == "__main__":
    from tessera.errors import run_command

    sys.exit(run_command(main, sys.argv[1:]))
