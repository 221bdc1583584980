"""Turns a corpus into token shards with the dVAE of a model folder: `tessera encode key=value ...`."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from dvae.model import DiscreteVAE
from dvae.model import load as load_vae
from dvae.pixels import to_float
from tessera.config import load
from tessera.data.config import DataConfig
from tessera.data.corpus import Corpus, load_images
from tessera.data.shards import ShardIndex, TokenShards, batches, write_shards
from tessera.errors import UserError
from tessera.model_folder import ModelFolder, write_tokenizer
from tessera.precision import autocast, resolve_device, resolve_precision
from tessera.text_tokenizer import TextTokenizer

_BATCH = 128


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
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""

    def __post_init__(self) -> None:
        if not 0 <= self.bpe_dropout < 1:
            raise UserError(f"bpe_dropout must lie in [0, 1); got {self.bpe_dropout}")


def encode(config: EncodeConfig) -> dict[str, Any]:
    """Encodes the training split; returns at once if the shards are there already.

    Returns:
        num_samples, grid, text_len, truncated (captions longer than text_len), directory.

    Raises:
        UserError: if the model folder has no dvae or the corpus cannot be used.
    """
    out, directory = Path(config.out), Path(config.shards)
    folder = ModelFolder.open(out, parts=["dvae"])
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
    vae = load_vae(folder, device=resolve_device(config.device))
    index = _describe(config, folder, vae, corpus, tokenizer, text_len)
    if not _same(directory, index):
        images = load_images(corpus, directory=config.data.cache_path)
        # read again: where a file failed and another picture took its place, the captions are now that picture's
        all_captions = [corpus.captions(index) for index in range(len(corpus))]
        write_shards(directory, codes=_codes(vae, images), captions=all_captions, index=index)
    return {
        "num_samples": index.num_samples,
        "grid": [index.grid_height, index.grid_width],
        "text_len": text_len,
        "truncated": int((lengths > text_len).sum()),
        "directory": str(directory),
    }


def caption_lengths(
    captions: Sequence[tuple[str, ...]], tokenizer: TextTokenizer, *, most: int = 50_000
) -> NDArray[np.int64]:
    """Tokens of up to `most` distinct captions, int64."""
    distinct = list(dict.fromkeys(text for texts in captions for text in texts))
    step = max(1, len(distinct) // most)
    return np.array([len(tokenizer.encode(text)) for text in distinct[::step]], dtype=np.int64)


def _codes(vae: DiscreteVAE, images: NDArray[np.uint8]) -> Iterator[NDArray[np.int64]]:
    device = next(vae.parameters()).device
    precision = resolve_precision("auto", device)
    spans = list(batches(len(images), _BATCH))
    for span in track(spans, description="encode", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        batch = to_float(torch.from_numpy(images[span.start : span.stop].copy())).to(device)
        with autocast(precision, device):
            yield vae.encode(batch).cpu().numpy()


def _describe(
    config: EncodeConfig, folder: ModelFolder, vae: DiscreteVAE, corpus: Corpus, tokenizer: TextTokenizer, text_len: int
) -> ShardIndex:
    height, width = config.data.image_size
    f = vae.downsampling
    if height % f or width % f:
        raise UserError(f"data.image_size must be divisible by {f}, as this dvae needs; got {height}x{width}")
    return ShardIndex(
        num_samples=len(corpus),
        grid_height=height // f,
        grid_width=width // f,
        codebook_size=vae.codebook_size,
        codebook_levels=vae.config.code_digits,
        image_height=height,
        image_width=width,
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
    print(
        f"{result['num_samples']:,} images as {result['grid'][0]}x{result['grid'][1]} codes in {result['directory']}; "
        f"{result['text_len']} text positions, {result['truncated']:,} captions cut"
    )
    return 0


if __name__ == "__main__":
    from tessera.errors import run_command

    sys.exit(run_command(main, sys.argv[1:]))
