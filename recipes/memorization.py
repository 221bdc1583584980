"""Does a prior draw, or does it copy? The training picture nearest to each sample, and how near that is.

Pictures are compared as thumbnails of 16x16 RGB pixels. At that size, what a dVAE blurs and shifts costs a copy little,
while another arrangement or other colors cost much; and a million pictures take less than 1 GB. Training pictures go
through the dVAE first, as every sample has: what a weak one changes would hide all copies otherwise.

A distance means nothing by itself: of simple or frequent subjects any two pictures are alike. So it is divided by what
is usual there, the distance of the training picture that was found to its own neighbors (cf. Carlini et al. 2023,
"Extracting training data from diffusion models", section 5). Divided by what is usual in the whole corpus, 4% of the
held-out scenes were copies, the simplest; so they are 1%, what there is of near duplicates.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from dvae.reconstruct import reconstruct
from sampling.pictures import Tile, contact_sheet
from sampling.pipeline import Pipeline
from tessera.data.corpus import Corpus, read_views
from tessera.data.order import permuted
from tessera.data.shards import batches
from tessera.data.views import Views

# N pictures, Q of them in question, H W pixels, F = 3 x 16 x 16 numbers of a thumbnail.

# A picture with a smaller share of the usual distance counts as a copy.
COPY_RATIO = 1 / 3

_SIDE = 16
_AT_ONCE = 8_192  # thumbnails per matrix product
_READ_AT_ONCE = 256
_NEIGHBORS = 5
# Nearer than so many gray levels is the same picture again, in another file. Copies are made of such pictures above all
# and must not be what is usual; so more neighbors are looked at than are needed.
_SAME, _LOOKED_AT = 4.0, 32
_SHOWN_PAIRS = 24
_PAIRS_PER_ROW = 4
_TILE_PIXELS = 128
_NO_BASELINE = "no baseline: all pictures are trained on, they are too few to hold any out"


class Nearest(NamedTuple):
    """The most similar of N pictures, for each of Q.

    Attributes:
        index: int64 [Q], in [0, N).
        distance: float64 [Q], root mean square difference of the thumbnails in gray levels, in [0, 255].
        ratio: float64 [Q], at least 0, the distance as a share of what is usual, the mean distance of the picture that
            was found to its five nearest neighbors among the N: near 0 for a copy, about 1 for another of the kind.
    """

    index: NDArray[np.int64]
    distance: NDArray[np.float64]
    ratio: NDArray[np.float64]

    @property
    def is_copy(self) -> NDArray[np.bool_]:
        """Which of the Q are copies, [Q]."""
        return self.ratio < COPY_RATIO


class _Found(NamedTuple):
    index: NDArray[np.int64]  # [Q, k]
    distance: NDArray[np.float64]  # [Q, k], ascending


class Thumbnails:
    """Pictures, small, in the order in which they were added, among which the nearest to others is looked up."""

    def __init__(self) -> None:
        self._count = 0
        self._buffer = np.empty((_READ_AT_ONCE, 3 * _SIDE**2), np.uint8)  # twice as long whenever it is full

    def __len__(self) -> int:
        return self._count

    def add(self, images: NDArray[np.uint8]) -> None:
        """Takes in images uint8 [n, H, W, 3] of any size."""
        added = _thumbnails(images)
        before, self._count = self._count, self._count + len(added)
        if self._count > len(self._buffer):
            larger = np.empty((max(self._count, 2 * before), added.shape[1]), np.uint8)
            larger[:before] = self._buffer[:before]
            self._buffer = larger
        self._buffer[before : self._count] = added

    def nearest(self, images: NDArray[np.uint8]) -> Nearest:
        """Looks up images uint8 [Q, H, W, 3].

        Raises:
            ValueError: nothing was added.
        """
        if not len(self):
            raise ValueError("nothing can be nearest among no pictures")
        found = self._search(_thumbnails(images), 1)
        index, distance = found.index[:, 0], found.distance[:, 0]
        around = self._search(self._buffer[index], min(_LOOKED_AT, len(self)))
        is_neighbor = (around.distance > _SAME) & (around.index != index[:, None])  # [Q, k]
        is_neighbor &= is_neighbor.cumsum(axis=1) <= _NEIGHBORS
        total = np.where(is_neighbor, around.distance, 0.0).sum(axis=1)
        usual = np.maximum(_SAME, total / np.maximum(1, is_neighbor.sum(axis=1)))
        ratio = distance / usual
        return Nearest(index, distance, ratio)

    def _search(self, wanted: NDArray[np.uint8], count: int) -> _Found:
        """The `count` nearest to thumbnails [Q, F]."""
        centered = _centered(wanted)
        scores, index = torch.empty(len(wanted), 0), torch.empty(len(wanted), 0, dtype=torch.int64)
        for span in batches(len(self), _AT_ONCE):
            others = _centered(self._buffer[span.start : span.stop])  # [n, F]
            # squared distances, but for what is the same for all of a row
            own = others.square().sum(dim=1) - 2 * centered @ others.T  # [Q, n]
            scores = torch.cat([scores, own], dim=1)
            scores, order = scores.topk(min(count, scores.shape[1]), largest=False)
            places = torch.arange(span.start, span.stop).expand(len(wanted), -1)
            index = torch.cat([index, places], dim=1).gather(1, order)
        found = index.numpy()
        # once more, exactly: differences of large numbers leave little of a small one
        difference = wanted[:, None].astype(np.float64) - self._buffer[found]  # [Q, k, F]
        distance = np.sqrt(np.square(difference).mean(axis=2))
        order_of = np.argsort(distance, axis=1, kind="stable")
        return _Found(np.take_along_axis(found, order_of, axis=1), np.take_along_axis(distance, order_of, axis=1))


class Pair(NamedTuple):
    """A sample and the training picture nearest to it."""

    sample: NDArray[np.uint8]
    """[H, W, 3]"""
    caption: str
    """what the sample was drawn for"""
    nearest: NDArray[np.uint8]
    """[H, W, 3]"""
    nearest_caption: str
    ratio: float
    """see `Nearest`"""


class Memorization(NamedTuple):
    """What was found, in figures and as a picture."""

    figures: dict[str, Any]
    """plain values, see `memorization`"""
    sheet: NDArray[np.uint8]
    """the samples nearest to a training picture beside it, [height, width, 3]"""


def memorization(
    pipeline: Pipeline,
    training: Corpus,
    held_out: Corpus,
    *,
    samples: int = 64,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Memorization:
    """Draws samples, half of them for captions that were trained on, and compares them with all training pictures.

    The figures: `share` of the samples that are copies, and `of_training_captions` and `of_held_out_captions` alone;
    `of_held_out_pictures`, which nobody drew: as many are near duplicates in the corpus, or alike by chance; the
    `median_ratio` of the samples and that of the held-out pictures, `usual_ratio`, which a prior that draws as freely
    reaches; the number of `samples` and of `training_pictures`. A corpus that is too small for a split has nothing to
    compare with: where all pictures that are held out are trained on, the figures of held-out ones and `usual_ratio`
    are None, and `no_baseline` says why.

    Args:
        pipeline: the model.
        training: what it was trained on.
        held_out: pictures of the same kind.
        samples: how many to draw, at least 2.
        seed: of the drawing and of the choice of captions.
        on_progress: called with (training pictures read, training pictures in all).
    """

    def remade(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return reconstruct(pipeline.vae, images, precision=pipeline.precision).images

    trained_on, others = (_chosen(len(corpus), samples // 2, seed) for corpus in (training, held_out))
    held_out_images = _images(held_out, others)
    not_trained_on = {_digest(image) for image in held_out_images}
    thumbnails = Thumbnails()
    for batch in read_views(training, Views(), batch_size=_READ_AT_ONCE):  # [n, 1, H, W, 3]
        not_trained_on.difference_update(map(_digest, batch[:, 0]))
        thumbnails.add(remade(batch[:, 0]))
        if on_progress is not None:
            on_progress(len(thumbnails), len(training))
    captions = [training.captions(row)[0] for row in trained_on] + [held_out.captions(row)[0] for row in others]
    drawn = pipeline(captions, seed=range(seed, seed + len(captions)), scorer=None, on_warning=lambda _: None)
    images = np.stack([image.image for image in drawn])  # [Q, H, W, 3]
    found = thumbnails.nearest(images)

    figures: dict[str, Any] = {
        "share": _mean(found.is_copy),
        "of_training_captions": _mean(found.is_copy),
        "of_held_out_captions": None,
        "of_held_out_pictures": None,
        "median_ratio": _median(found.ratio),
        "usual_ratio": None,
    }
    if not_trained_on:
        of_others = thumbnails.nearest(remade(held_out_images))
        figures |= {
            "of_training_captions": _mean(found.is_copy[: len(trained_on)]),
            "of_held_out_captions": _mean(found.is_copy[len(trained_on) :]),
            "of_held_out_pictures": _mean(of_others.is_copy),
            "usual_ratio": _median(of_others.ratio),
        }
    else:
        figures["no_baseline"] = _NO_BASELINE
    figures |= {"samples": len(images), "training_pictures": len(thumbnails)}
    nearest_first = np.argsort(found.ratio, kind="stable")[:_SHOWN_PAIRS]
    pairs = [
        Pair(
            sample=images[place],
            caption=captions[place],
            nearest=neighbor,
            nearest_caption=training.captions(int(found.index[place]))[0],
            ratio=float(found.ratio[place]),
        )
        for place, neighbor in zip(nearest_first, _images(training, found.index[nearest_first]), strict=True)
    ]
    title = (
        f"Of {len(images)} samples the {len(pairs)} most like one of {len(thumbnails):,} training pictures, beside it. "
        f"Copies, below {COPY_RATIO:.2f} of the usual distance: {figures['share']:.0%}"
    )
    return Memorization(figures, nearest_sheet(pairs, title=title))


def nearest_sheet(pairs: Sequence[Pair], *, title: str, tile_pixels: int = _TILE_PIXELS) -> NDArray[np.uint8]:
    """Draws each sample beside its neighbor with both captions, uint8 [height, width, 3].

    Args:
        pairs: at least one, pictures of one size.
        title: a line or two above.
        tile_pixels: smaller pictures are enlarged towards this size by a whole factor.
    """
    tiles = []
    for pair in pairs:
        note = f"{pair.ratio:.2f} of usual"
        tiles += [Tile(pair.sample, pair.caption, "sample"), Tile(pair.nearest, pair.nearest_caption, note)]
    columns = 2 * min(_PAIRS_PER_ROW, len(pairs))
    return np.array(contact_sheet(tiles, columns=columns, tile_pixels=tile_pixels, title=title))


def memorization_line(figures: dict[str, Any]) -> str:
    """The figures in a line for people."""
    copies, ratio = f"{figures['share']:.1%} of {figures['samples']} samples", f"{figures['median_ratio']:.2f}"
    if figures["usual_ratio"] is None:
        return f"copies  {copies}; median ratio {ratio}; {figures['no_baseline']}"
    return (
        f"copies  {copies}, {figures['of_held_out_pictures']:.1%} of held-out pictures; "
        f"median ratio {ratio} and {figures['usual_ratio']:.2f}"
    )


def _chosen(count: int, wanted: int, seed: int) -> list[int]:
    """Up to `wanted` different indices below `count`."""
    return permuted(np.arange(min(wanted, count)), size=count, key=seed).tolist()


def _digest(image: NDArray[np.uint8]) -> bytes:
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def _mean(values: NDArray[np.bool_]) -> float:
    return round(float(values.mean()), 4)


def _median(values: NDArray[np.float64]) -> float:
    return round(float(np.median(values)), 4)


def _images(corpus: Corpus, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
    return np.stack([corpus.image(int(row)) for row in rows])


def _thumbnails(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[n, H, W, 3] to [n, F]: the mean color of each cell of a 16x16 grid."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"expected uint8 images [n, H, W, 3]; got {images.dtype} {list(images.shape)}")
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float()
    small = F.interpolate(pixels, size=(_SIDE, _SIDE), mode="area")  # [n, 3, 16, 16]
    return small.round().byte().flatten(1).numpy()


def _centered(thumbnails: NDArray[np.uint8]) -> torch.Tensor:
    """float32 [n, F] around 0, where products of fp32 lose least."""
    return torch.from_numpy(thumbnails.astype(np.float32)) - 127.5
