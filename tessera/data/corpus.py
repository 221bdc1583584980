"""Corpora: numbered pictures with captions, whether they are drawn, rendered from a font, or read from files."""

import hashlib
import json
import logging
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tessera.atomic_write import atomic_write
from tessera.data.images import ImageError, fit_to, open_image, read_file
from tessera.data.manifest import Manifest, Progress, ingest, split_key
from tessera.data.read_ahead import read_ahead
from tessera.data.sources import resolve_inside
from tessera.data.views import Views, cut_views
from tessera.errors import UserError
from tessera.precision import usable_cores

NUM_SCENES = {"train": 20_000, "validation": 1_000}
VERSION = 1
_BATCH = 256

_logger = logging.getLogger(__name__)


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


class ManifestCorpus:
    """Image files, decoded and fitted when they are asked for.

    A file that was sound at ingest may have changed or gone since. The order of all others must not change then, so the
    next good picture takes its place: `image` finds it, and `captions` of the same index are the substitute's from then
    on.

    Args:
        manifest: what `ingest` returned.
        image_size: (height, width) in pixels; pictures are cropped in the middle to this aspect and resized.
        split: "train" or "validation". Fewer than 10 images have no validation split: they are used for both.
        limit: keep only so many, chosen by a keyed hash.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        image_size: tuple[int, int],
        split: Literal["train", "validation"] = "train",
        limit: int | None = None,
    ) -> None:
        self.name = manifest.root.name
        self.manifest = manifest
        self.image_size = image_size
        self.split = split
        records = manifest.of_split(split) or manifest.records
        if limit is not None and limit < len(records):
            chosen = {record.id for record in sorted(records, key=lambda record: split_key(record.sha256))[-limit:]}
            records = tuple(record for record in records if record.id in chosen)
        self.records = records
        self.substitutes: dict[int, int] = {}
        """Index of a file that has become unusable -> index of the picture that stands in for it."""

    def __len__(self) -> int:
        return len(self.records)

    def captions(self, index: int) -> tuple[str, ...]:
        """Returns the captions of what `image(index)` returned."""
        return self.records[self.substitutes.get(index, index)].captions

    def image(self, index: int) -> NDArray[np.uint8]:
        """Reads picture `index`: [height, width, 3], RGB.

        Raises:
            UserError: no file of the corpus can be read any more.
        """
        return fit_to(self.picture(index), self.image_size)

    def picture(self, index: int) -> Image.Image:
        """Reads picture `index` before it is cropped and resized; a large JPEG at no less than twice the image size.

        Raises:
            UserError: no file of the corpus can be read any more.
        """
        try:
            return self._read(self.substitutes.get(index, index))
        except ImageError as error:
            return self._substitute(index, error)

    def fingerprint(self) -> str:
        """Returns a sha256 over the hashes of the files, the captions and the size."""
        identity = {
            "version": VERSION,
            "image_size": list(self.image_size),
            "records": [[record.sha256, *record.captions] for record in self.records],
        }
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def _read(self, index: int) -> Image.Image:
        record = self.records[index]
        content = read_file(resolve_inside(self.manifest.root, record.source))
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise ImageError("the file has changed since it was ingested")
        return open_image(content, enough_for=self.image_size)

    def _substitute(self, index: int, error: ImageError) -> Image.Image:
        count = len(self.records)
        for step in range(1, count):
            substitute = (index + step) % count
            try:
                picture = self._read(substitute)
            except ImageError:
                continue
            if not self.substitutes:
                _logger.warning(
                    "%s: %s; another picture takes its place, and so for all further ones that fail",
                    self.records[index].source,
                    error,
                )
            self.substitutes[index] = substitute
            return picture
        raise UserError(f"no image of {self.manifest.root} can be read any more: {self.records[index].source}: {error}")


def open_corpus(
    spec: str,
    *,
    image_size: tuple[int, int],
    split: Literal["train", "validation"],
    seed: int = 0,
    limit: int | None = None,
    font: str | None = None,
    cache_dir: Path | None = None,
    on_progress: Progress | None = None,
) -> Corpus:
    """Opens a corpus by name or path.

    Args:
        spec: "scenes", "emoji", a folder of captioned images, or a manifest (.jsonl or .csv).
        image_size: (height, width) in pixels.
        split: "train", or "validation" for pictures that are never trained on.
        seed: which scenes are drawn; other corpora do not depend on it.
        limit: keep only so many pictures; for scenes it is their number (20,000 to train on and 1,000 for validation if
            None).
        font: path of the color font for emoji; searched for if None.
        cache_dir: where the manifest and the rejects of a folder are written, and looked for by the next call.
        on_progress: called with (images checked, images in all) while a folder is ingested.

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
    path = Path(spec).expanduser()
    if not path.exists():
        raise UserError(
            f"no data {spec!r}: expected scenes, emoji, an existing folder of captioned images, "
            "or a manifest (.jsonl or .csv)"
        )
    manifest = ingest(path, directory=cache_dir, on_progress=on_progress)
    return ManifestCorpus(manifest, image_size=image_size, split=split, limit=limit)


def load_images(
    corpus: Corpus, *, directory: Path | None = None, on_progress: Progress | None = None
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

    # Decoders release Python's lock; drawing does not, and fonts are not made for several threads.
    is_drawn = images is None and not isinstance(corpus, ManifestCorpus)
    threads = 1 if is_drawn else usable_cores()
    indices = range(start, len(corpus))
    at_once = max(1, len(indices)) if ahead else batch_size
    for first in range(0, len(indices), at_once):
        part = indices[first : first + at_once]
        with closing(read_ahead(read, part, threads=threads, most_ahead=2 * batch_size)) as pictures:
            while batch := list(islice(pictures, batch_size)):
                yield np.stack(batch)


def _reported(corpus: Corpus, on_progress: Progress | None) -> Iterator[NDArray[np.uint8]]:
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
