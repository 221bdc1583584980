"""Corpora: numbered pictures with captions, whether they are drawn, rendered from a font, or read from files."""

import math
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import get_worker_info

from tessera.atomic_write import atomic_write
from tessera.data.ingest import OnProgress, ingest
from tessera.data.manifest_corpus import ManifestCorpus
from tessera.data.read_ahead import read_ahead
from tessera.data.reading import HUB_PREFIX
from tessera.data.source import EXPECTED
from tessera.data.views import Views, cut_views
from tessera.errors import UserError
from tessera.precision import usable_cores, usable_memory_bytes

NUM_SCENES = {"train": 20_000, "validation": 1_000}
_BATCH = 256
_MOST_DECODING_THREADS = 8


class Corpus(Protocol):
    """Captioned pictures of one size, numbered from 0. The same number is always the same picture."""

    name: str
    image_size: tuple[int, int]
    """(height, width) in pixels."""

    def __len__(self) -> int: ...

    def captions(self, index: int) -> tuple[str, ...]:
        """At least one caption, which may be empty. Ask for the image first: see `ManifestCorpus`."""
        ...

    def image(self, index: int) -> NDArray[np.uint8]:
        """RGB pixels [height, width, 3], C-contiguous."""
        ...

    def fingerprint(self) -> str:
        """sha256 over all that determines pictures and captions: equal fingerprints, equal corpora."""
        ...


class LazyImages:
    """The pictures of a corpus as if they were one array, which would be too large: rows are decoded when asked for.

    Args:
        corpus: any corpus.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, H, W, 3]."""
        return (len(self.corpus), *self.corpus.image_size, 3)

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, rows: Sequence[int] | NDArray[np.integer] | slice) -> NDArray[np.uint8]:
        """Decodes some pictures in a few threads.

        Args:
            rows: n numbers in [0, N) in any order, or a slice.

        Returns:
            uint8 [n, H, W, 3], a new array.

        Raises:
            IndexError: for numbers out of range or anything but a row of numbers.
            UserError: no file of the corpus can be read any more.
        """
        indices = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)
        if indices.ndim != 1 or (len(indices) and not 0 <= indices.min() <= indices.max() < len(self)):
            raise IndexError(f"expected a list of rows in [0, {len(self)}), got {rows!r:.100}")
        images = np.empty((len(indices), *self.shape[1:]), np.uint8)

        def read(place: int) -> None:
            images[place] = self.corpus.image(int(indices[place]))

        threads = _decoding_threads(self.corpus, most=_MOST_DECODING_THREADS)
        if threads == 1:
            for place in range(len(indices)):
                read(place)
        else:
            with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
                deque(pool.map(read, range(len(indices))), maxlen=0)
        return images


def open_corpus(
    spec: str,
    *,
    image_size: tuple[int, int],
    split: Literal["train", "validation"],
    seed: int = 0,
    limit: int | None = None,
    font: str | None = None,
    cache_dir: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Corpus:
    """Opens a corpus by name or path.

    Args:
        spec: "scenes", "emoji", or what `ingest` takes: a folder of captioned images, an archive, a manifest.
        image_size: (height, width) in pixels.
        split: "train", or "validation" for pictures that are never trained on.
        seed: which scenes are drawn; other corpora do not depend on it.
        limit: keep only so many pictures; for scenes it is their number (20,000 to train on and 1,000 for validation if
            None).
        font: path of the color font for emoji; searched for if None.
        cache_dir: where the manifest and the rejects are written, and looked for by the next call.
        on_progress: called with (images checked, images in all or None) during an ingest.

    Raises:
        UserError: there is nothing under this name, or nothing in it can be used.
    """
    if min(image_size) < 1:
        raise UserError(f"the image size must be positive, got {image_size[0]}x{image_size[1]}")
    if limit is not None and limit < 1:
        raise UserError(f"the limit must be at least 1 picture, got {limit}")
    if spec == "scenes":
        from tessera.data.scenes import ScenesCorpus

        return ScenesCorpus(limit or NUM_SCENES[split], image_size=image_size, seed=seed, split=split)
    if spec == "emoji":
        from tessera.data.emoji import EmojiCorpus

        return EmojiCorpus(image_size, split=split, font=font, limit=limit)
    if not spec.startswith(HUB_PREFIX) and not Path(spec).expanduser().exists():
        raise UserError(f"no data {spec!r}: expected scenes, emoji, {EXPECTED}")
    manifest = ingest(spec, directory=cache_dir, on_progress=on_progress)
    return ManifestCorpus(manifest, image_size=image_size, split=split, limit=limit)


def open_images(
    corpus: Corpus, *, directory: Path | None = None, most_gib: float, on_progress: OnProgress | None = None
) -> NDArray[np.uint8] | LazyImages:
    """All pictures of a corpus: as one array while that is small enough, else decoded whenever they are asked for.

    Args:
        corpus: any corpus.
        directory: see `load_images`.
        most_gib: GiB (2^30 bytes) that the array may take on the disk of `directory`; without a directory also no more
            than a quarter of the memory, for all processes of this machine together.
        on_progress: see `load_images`.

    Returns:
        uint8 [N, height, width, 3], RGB; both kinds have `shape` and `dtype` and take a list of rows.
    """
    images = LazyImages(corpus)
    most_bytes = most_gib * 2**30
    if directory is None:
        most_bytes = min(most_bytes, usable_memory_bytes() / 4 / _processes_here())
    if math.prod(images.shape) > most_bytes:
        return images
    return load_images(corpus, directory=directory, on_progress=on_progress)


def load_images(
    corpus: Corpus, *, directory: Path | None = None, on_progress: OnProgress | None = None
) -> NDArray[np.uint8]:
    """Puts all pictures of a corpus into one array.

    Args:
        corpus: any corpus.
        directory: if given, the array is a file in it, named by the corpus's fingerprint: mapped into memory rather
            than held there, and reused by the next call instead of being made again.
        on_progress: called with (pictures done, pictures in all).

    Returns:
        uint8 [N, height, width, 3], RGB; read-only if it is mapped.
    """
    shape = (len(corpus), *corpus.image_size, 3)
    if directory is None:
        images = np.empty(shape, np.uint8)
        done = 0
        for views in _reported(corpus, on_progress):
            images[done : done + len(views)] = views[:, 0]
            done += len(views)
        return images
    path = _images_path(corpus, directory)
    cached = _map_images(path, shape)
    if cached is not None:
        return cached
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        # Written like any file, not through a map: a full disk is then an error and not the end of the process.
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for views in _reported(corpus, on_progress):
            file.write(views.data)
    if isinstance(corpus, ManifestCorpus) and corpus.substitutes:
        # Captions follow substitutions only in the corpus that made them: another run must read the files again.
        path = path.replace(path.with_stem(f"{path.stem}-substituted"))
    images = _map_images(path, shape)
    if images is None:
        raise OSError(f"{path} was just written and cannot be read")
    return images


def read_views(
    corpus: Corpus,
    views: Views,
    *,
    batch_size: int,
    start: int = 0,
    directory: Path | None = None,
    ahead: bool = False,
) -> Generator[NDArray[np.uint8], None, None]:
    """Reads the pictures of a corpus in order and in several threads; memory does not grow with their number.

    Close the iterator when leaving it early. Captions of a picture are right once its batch is there, see
    `ManifestCorpus`.

    Args:
        corpus: any corpus.
        views: what is taken of every picture.
        batch_size: pictures at once, at least 1.
        start: the first picture, from 0.
        directory: where `load_images` may have put the pictures; taken from there, they are not made again.
        ahead: also read while the caller is busy with a batch, up to two batches more: for one who computes on a GPU,
            and not on the cores that reading needs.

    Yields:
        uint8 [n, V, height, width, 3], RGB, with n = batch_size but in the last batch.
    """
    images = None
    # Crops of image files are cut from more pixels than the array has.
    if directory is not None and (views.count == 1 or not isinstance(corpus, ManifestCorpus)):
        images = _map_images(_images_path(corpus, directory), (len(corpus), *corpus.image_size, 3))
    if images is not None and views.count == 1:
        for first in range(start, len(corpus), batch_size):
            yield np.array(images[first : first + batch_size, None])
        return

    def read(index: int) -> NDArray[np.uint8]:
        if images is not None:
            picture = Image.fromarray(images[index])
        elif isinstance(corpus, ManifestCorpus):
            picture = corpus.picture(index)
        else:
            picture = Image.fromarray(corpus.image(index))
        return cut_views(picture, corpus.image_size, views, index=index)

    threads = _decoding_threads(corpus) if images is None else usable_cores()
    indices = range(start, len(corpus))
    at_once = max(1, len(indices)) if ahead else batch_size
    for first in range(0, len(indices), at_once):
        part = indices[first : first + at_once]
        with closing(read_ahead(read, part, threads=threads, most_ahead=2 * batch_size)) as pictures:
            while batch := list(islice(pictures, batch_size)):
                yield np.stack(batch)


def _decoding_threads(corpus: Corpus, *, most: int | None = None) -> int:
    """Decoders release Python's lock; drawing does not, and fonts are not made for several threads."""
    if not isinstance(corpus, ManifestCorpus):
        return 1
    loader_process = get_worker_info()
    sharing = _processes_here() * (1 if loader_process is None else loader_process.num_workers)
    cores = max(1, usable_cores() // sharing)
    return cores if most is None else min(most, cores)


def _processes_here() -> int:
    """How many processes of the same run a launcher has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1)


def _reported(corpus: Corpus, on_progress: OnProgress | None) -> Iterator[NDArray[np.uint8]]:
    """All pictures in their order, uint8 [n, 1, height, width, 3]."""
    done = 0
    with closing(read_views(corpus, Views(), batch_size=_BATCH)) as batches:
        for batch in batches:
            yield batch
            done += len(batch)
            if on_progress is not None:
                on_progress(done, len(corpus))


def _images_path(corpus: Corpus, directory: Path) -> Path:
    return directory / f"images-{corpus.fingerprint()[:16]}.npy"


def _map_images(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    try:
        images = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # missing, or damaged
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None
