"""Turns a corpus into token shards with the dVAE of a model folder: `tessera encode key=value ...`.

Pictures are read by several threads, a batch at a time, and codes are written as they come: of the corpus, captions
alone are held, and after an interruption the same command goes on. While a GPU computes, the threads read the next
batches; on a CPU both need the same cores and take turns.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dvae.model import DiscreteVAE
from dvae.model import load as load_vae
from dvae.pixels import to_float
from dvae.reconstruct import images_per_forward
from tessera.config import load
from tessera.data.config import DataConfig
from tessera.data.corpus import Corpus, ManifestCorpus, read_views
from tessera.data.shards import ShardIndex, ShardWriter, TokenShards
from tessera.data.views import Views
from tessera.errors import UserError
from tessera.model_folder import ModelFolder, write_tokenizer
from tessera.precision import Precision, autocast, resolve_device, resolve_precision
from tessera.text_tokenizer import TextTokenizer

# n samples, V views of each, H W image pixels, h w code grid.

# Pixels per forward. On a CPU larger batches leave the caches and are no faster; a GPU wants more to do at once.
_CPU_PIXELS = 2**19
_GPU_PIXELS = 2**21
_LEAST_CROP_SCALE = 0.5  # large JPEGs are decoded at no less than twice the image size
_LINE_EVERY_SECONDS = 20.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """One pass over a corpus."""

    data: DataConfig = DataConfig()
    """what to encode"""
    out: str = "my-model"
    """model folder that holds the dvae; receives the text tokenizer if it has none"""
    shards: str = "runs/shards"
    """folder that receives the token shards"""
    vocab_size: int = 4096
    """most pieces of a new text tokenizer; small corpora get fewer"""
    text_len: int | None = None
    """T, text positions; null takes what the longest of 999 in 1,000 captions needs, at most 256"""
    bpe_dropout: float = 0.1
    """chance, 0 to 1, that the prior's training skips a merge of the tokenizer: above 0, captions get room for it"""
    crops: int = 1
    """views of every picture, of which each epoch of the prior draws one: the first is the picture as it is, the others
    are random crops of it, keyed by data.seed"""
    crop_scale: float = 0.8
    """smallest side of a random crop, 0.5 to 1, as a share of what is seen of the picture without it"""
    flip: bool = False
    """mirror half of the random crops left to right; false is right for captions that say "left of" and for pictures
    with writing in them, which would become untrue and unreadable"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 where the hardware multiplies it, else fp32; fp32 gives the exact codes of imported models"""

    def __post_init__(self) -> None:
        if not 0 <= self.bpe_dropout < 1:
            raise UserError(f"bpe_dropout must lie in [0, 1); got {self.bpe_dropout}")
        if self.crops < 1:
            raise UserError(f"crops must be at least 1; got {self.crops}")
        if not _LEAST_CROP_SCALE <= self.crop_scale <= 1:
            raise UserError(f"crop_scale must lie in [{_LEAST_CROP_SCALE}, 1]; got {self.crop_scale}")
        if self.flip and self.crops == 1:
            raise UserError("flip mirrors crops and there are none: set crops to 2 or more, or flip to false")


class _Encoded(NamedTuple):
    """What one call has done."""

    images: int
    seconds: float
    waiting_seconds: float


def encode(config: EncodeConfig) -> dict[str, Any]:
    """Encodes the training split; goes on where it was interrupted, and returns at once if the shards are there.

    Returns:
        num_samples, grid, text_len, truncated (captions longer than text_len), directory; and of this call alone:
        encoded (images), seconds (from the first picture to the last), images_per_second, and waiting_share (of the
        seconds, in which the model had no pictures), all 0 if there was nothing to do.

    Raises:
        UserError: if the model folder has no dvae or the corpus cannot be used.
        KeyboardInterrupt: after saving, when the user interrupted.
    """
    out, directory = Path(config.out), Path(config.shards)
    folder = ModelFolder.open(out, parts=["dvae"])
    vae = load_vae(folder, device=resolve_device(config.device))
    _check_size(config, folder, vae)
    corpus = config.data.open("train")
    all_captions = [corpus.captions(index) for index in range(len(corpus))]
    if folder.has_tokenizer:
        tokenizer = TextTokenizer(folder.tokenizer_proto())
    else:
        texts = (text for captions in all_captions for text in captions)
        tokenizer = TextTokenizer.train(texts, vocab_size=config.vocab_size)
        write_tokenizer(out, tokenizer.proto)
    lengths = caption_lengths(all_captions, tokenizer)
    text_len = config.text_len or tokenizer.fitting_text_len(
        (text for captions in all_captions for text in captions), dropout=config.bpe_dropout
    )
    index = _describe(config, folder, vae, corpus, tokenizer, text_len)
    done = _Encoded(0, 0.0, 0.0)
    if not _same(directory, index):
        precision = resolve_precision(config.precision, next(vae.parameters()).device)
        done = _write(directory, index, vae, corpus, all_captions, precision=precision, cache=config.data.cache_path)
    return {
        "num_samples": index.num_samples,
        "grid": [index.grid_height, index.grid_width],
        "text_len": text_len,
        "truncated": int((lengths > text_len).sum()),
        "directory": str(directory),
        "encoded": done.images,
        "seconds": done.seconds,
        "images_per_second": done.images / done.seconds if done.images else 0.0,
        "waiting_share": done.waiting_seconds / done.seconds if done.images else 0.0,
    }


def caption_lengths(
    captions: Sequence[tuple[str, ...]], tokenizer: TextTokenizer, *, most: int = 50_000
) -> NDArray[np.int64]:
    """Tokens of up to `most` distinct captions, int64."""
    distinct = list(dict.fromkeys(text for texts in captions for text in texts))
    step = max(1, len(distinct) // most)
    return np.array([len(tokenizer.encode(text)) for text in distinct[::step]], dtype=np.int64)


def _write(
    directory: Path,
    index: ShardIndex,
    vae: DiscreteVAE,
    corpus: Corpus,
    all_captions: Sequence[tuple[str, ...]],
    *,
    precision: Precision,
    cache: Path | None,
) -> _Encoded:
    """Encodes what the shards still lack."""
    device = next(vae.parameters()).device
    views = Views(count=index.crops, crop_scale=index.crop_scale, flip=index.flip, seed=index.crop_seed)
    pixels = (_CPU_PIXELS if device.type == "cpu" else _GPU_PIXELS) // views.count
    batch_size = max(1, pixels // (index.image_height * index.image_width))
    at_once = images_per_forward(vae.config, index.image_height, index.image_width)
    batch_size = min(batch_size, max(1, at_once // views.count))
    waiting_seconds = 0.0
    with (
        ShardWriter(directory, index) as writer,
        closing(
            read_views(
                corpus,
                views,
                batch_size=batch_size,
                start=writer.complete,
                directory=cache,
                ahead=device.type != "cpu",
            )
        ) as read_batches,
        _progress(index.num_samples, first=writer.complete) as show,
    ):
        first, began = writer.complete, time.monotonic()
        while writer.complete < index.num_samples:
            asked = time.monotonic()
            pictures = next(read_batches)  # [n, V, H, W, 3]
            waiting_seconds += time.monotonic() - asked
            span = range(writer.complete, writer.complete + len(pictures))
            # Only files are replaced by others, and that is known when they are read; scenes would be described anew.
            if isinstance(corpus, ManifestCorpus):
                captions = [corpus.captions(number) for number in span]
            else:
                captions = list(all_captions[span.start : span.stop])
            writer.append(_codes(vae, pictures, precision), captions)
            seconds = time.monotonic() - began
            show(_Encoded(writer.complete - first, seconds, waiting_seconds))
        return _Encoded(writer.complete - first, time.monotonic() - began, waiting_seconds)


def _codes(vae: DiscreteVAE, pictures: NDArray[np.uint8], precision: Precision) -> NDArray[np.int64]:
    """The codes [n, V, h, w] of pictures [n, V, H, W, 3]."""
    device = next(vae.parameters()).device
    with torch.inference_mode(), autocast(precision, device):
        images = to_float(torch.from_numpy(pictures).flatten(0, 1).to(device))  # [n * V, 3, H, W]
        codes = vae.encode(images).cpu().numpy()
    return codes.reshape(*pictures.shape[:2], *codes.shape[1:])


@contextmanager
def _progress(total: int, *, first: int) -> Iterator[Callable[[_Encoded], None]]:
    """Gives a function that shows how far the encoding is: a bar on a terminal, now and then a line elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(total, first)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("encode", total=total, completed=first)

        def show(done: _Encoded) -> None:
            bar.update(task, description=f"encode  {_pace(done)}", completed=first + done.images)

        yield show


def _lines(total: int, first: int) -> Callable[[_Encoded], None]:
    shown = 0.0

    def show(done: _Encoded) -> None:
        nonlocal shown
        if done.seconds - shown < _LINE_EVERY_SECONDS:
            return
        shown = done.seconds
        complete = first + done.images
        left = done.seconds * (total - complete) / done.images
        print(f"encode  {complete:,} of {total:,}  {_pace(done)}  {left:,.0f} s left", file=sys.stderr, flush=True)

    return show


def _pace(done: _Encoded) -> str:
    return f"{done.images / done.seconds:,.0f} images/s  waiting {done.waiting_seconds / done.seconds:.0%}"


def _check_size(config: EncodeConfig, folder: ModelFolder, vae: DiscreteVAE) -> None:
    """Raises UserError for sizes that the dVAE cannot take, and warns of others than it was trained on."""
    height, width = config.data.image_size
    f = vae.downsampling
    if height % f or width % f:
        raise UserError(f"data.image_size must be divisible by {f}, as this dvae needs; got {height}x{width}")
    trained = folder.metadata("dvae").get("image_size")
    if trained is not None and list(trained) != [height, width]:
        _logger.warning(
            "the dvae was trained on images of %dx%d pixels, these are encoded at %dx%d: set data.image_size=[%d,%d]",
            *(*trained, height, width, *trained),
        )


def _describe(
    config: EncodeConfig, folder: ModelFolder, vae: DiscreteVAE, corpus: Corpus, tokenizer: TextTokenizer, text_len: int
) -> ShardIndex:
    height, width = config.data.image_size
    f = vae.downsampling
    return ShardIndex(
        num_samples=len(corpus),
        grid_height=height // f,
        grid_width=width // f,
        codebook_size=vae.codebook_size,
        codebook_levels=vae.config.code_digits,
        image_height=height,
        image_width=width,
        crops=config.crops,
        # what does not matter where there are no crops is always the same, or it would make other shards
        crop_scale=config.crop_scale if config.crops > 1 else 1.0,
        flip=config.flip,
        crop_seed=config.data.seed if config.crops > 1 else 0,
        corpus_name=corpus.name,
        corpus_fingerprint=corpus.fingerprint(),
        dvae_sha256=folder.part_sha256("dvae"),
        tokenizer_sha256=tokenizer.sha256,
        text_len=text_len,
    )


def _same(directory: Path, index: ShardIndex) -> bool:
    try:
        return TokenShards(directory).index == index
    except UserError:
        return False


def main(argv: Sequence[str]) -> int:
    """The command."""
    config = load(EncodeConfig, argv, prog="tessera encode")
    result = encode(config)
    images = f"{result['num_samples']:,} images" + (f", {config.crops} views of each," if config.crops > 1 else "")
    speed = "encoded before"
    if result["encoded"]:
        speed = f"{result['images_per_second']:,.0f} images/s, {result['waiting_share']:.0%} waiting for pictures"
    print(
        f"{images} as {result['grid'][0]}x{result['grid'][1]} codes in {result['directory']}; {speed}; "
        f"{result['text_len']} text positions, {result['truncated']:,} captions cut"
    )
    return 0


if __name__ == "__main__":
    from tessera.errors import run_command

    sys.exit(run_command(main, sys.argv[1:]))
