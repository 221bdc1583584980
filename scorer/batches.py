"""Training batches of the scorer: images, several captions of each, and which captions fit other images too."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from scorer.model import without_common_pads
from tessera.data.corpus import LazyImages
from tessera.data.order import SampleKey, mix
from tessera.text_tokenizer import TextTokenizer

# N pairs, H W pixels, B batch, G captions per image, T text positions, Q most captions of one image.

# Rows int64 [n] of the training images to uint8 [n, H, W, 3], the same images as a dVAE gives them back. A function, so
# that only those are decoded that a batch holds: few of a large corpus are ever seen.
Reconstruct = Callable[[NDArray[np.int64]], NDArray[np.uint8]]


class CaptionedBatches:
    """A `BatchSource` over captioned images in memory; every choice follows from a key's seed.

    Args:
        images: uint8 [N, H, W, 3].
        captions: N tuples of at least one caption each.
        tokenizer: splits captions.
        text_len: T, text positions.
        num_captions: G, captions per image and batch; an image with fewer repeats some.
        reconstruct: gives images as a dVAE reconstructs them; None for none.
        reconstruction_share: share of images, 0 to 1, that are replaced by their reconstructions.
    """

    def __init__(
        self,
        images: NDArray[np.uint8] | LazyImages,
        captions: Sequence[tuple[str, ...]],
        tokenizer: TextTokenizer,
        *,
        text_len: int,
        num_captions: int,
        reconstruct: Reconstruct | None = None,
        reconstruction_share: float = 0.0,
    ) -> None:
        if len(images) != len(captions):
            raise ValueError(f"one tuple of captions per image: got {len(images)} images and {len(captions)} tuples")
        self.images, self.captions, self.tokenizer = images, captions, tokenizer
        self.text_len, self.num_captions = text_len, num_captions
        self.reconstruct, self.reconstruction_share = reconstruct, reconstruction_share
        self.hashes = _caption_hashes(captions)  # int64 [N, Q]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, keys: Sequence[SampleKey]) -> dict[str, torch.Tensor]:
        """The samples that keys choose.

        Returns:
            images uint8 [B, H, W, 3]; text_ids int64 [B, G, T'] without the pads that all have in common; first int64
            [B], a hash of the first of these captions, and known int64 [B, Q], of all captions of the image, see
            `scorer.losses.fitting_pairs`; draws float32 [B] in [0, 1), one random number per sample for the training
            step.
        """
        rows = np.array([key.index for key in keys])
        seeds = np.array([key.seed for key in keys])
        chosen = [self._choose(row, seed) for row, seed in zip(rows, mix(seeds, 1), strict=True)]
        texts = [self.captions[row][place] for row, places in zip(rows, chosen, strict=True) for place in places]
        text_ids = self.tokenizer.encode_batch(texts, text_len=self.text_len)
        text_ids = without_common_pads(text_ids, self.tokenizer.vocab_size)
        images = np.asarray(self.images[rows])  # a copy
        replaced = mix(seeds, 2) / 2.0**64 < self.reconstruction_share
        if self.reconstruct is not None and replaced.any():
            remade = self.reconstruct(rows[replaced])
            if remade.shape != images[replaced].shape:
                raise ValueError(f"reconstructions must have shape {images[replaced].shape}; got {remade.shape}")
            images[replaced] = remade
        first = self.hashes[rows, [places[0] for places in chosen]]  # [B]
        return {
            "images": torch.from_numpy(images),
            "text_ids": text_ids.unflatten(0, (len(rows), self.num_captions)),
            "first": torch.from_numpy(first),
            "known": torch.from_numpy(self.hashes[rows]),
            "draws": torch.from_numpy((mix(seeds, 3) / 2.0**64).astype(np.float32)),
        }

    def _choose(self, row: int, seed: np.uint64) -> list[int]:
        """G captions of an image, all different as long as there are enough."""
        count = len(self.captions[row])
        shuffled = np.argsort(mix(int(seed), np.arange(count)))
        return [int(shuffled[place % count]) for place in range(self.num_captions)]


def _caption_hashes(captions: Sequence[tuple[str, ...]]) -> NDArray[np.int64]:
    """int64 [N, Q]: one hash per caption; an image of fewer captions repeats its first."""
    most = max((len(texts) for texts in captions), default=1)
    hashes = np.empty((len(captions), most), np.int64)
    for row, texts in enumerate(captions):
        digests = [hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest() for text in texts]
        numbers = [int.from_bytes(digest, "little", signed=True) for digest in digests]
        hashes[row] = numbers + numbers[:1] * (most - len(numbers))
    return hashes
