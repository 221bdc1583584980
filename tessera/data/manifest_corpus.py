"""Image files of a manifest as a corpus: decoded and fitted when they are asked for, and replaced where they fail."""

import hashlib
import json
import logging
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tessera.data.images import ImageError, fit_to, open_image
from tessera.data.manifest import Manifest, Record
from tessera.data.reading import read_bytes
from tessera.errors import UserError

# N pictures.

VERSION = 2

_logger = logging.getLogger(__name__)


class ManifestCorpus:
    """A `tessera.data.corpus.Corpus` of image files; nothing of them is in memory.

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
        self.name = manifest.header.name
        self.manifest = manifest
        self.image_size = image_size
        self.split = split
        numbers = manifest.of_split(split)
        self._parts = [split] if len(numbers) else ["train", "validation"]
        if not len(numbers):
            numbers = np.arange(len(manifest.records))
        if limit is not None and limit < len(numbers):
            keys = manifest.records.keys(numbers)
            numbers = numbers[np.sort(np.argsort(keys, kind="stable")[-limit:])]
        self._numbers = numbers  # [N], of the manifest's records
        self.substitutes: dict[int, int] = {}
        """Index of a file that has become unusable -> index of the picture that stands in for it."""

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def num_substituted(self) -> int:
        """How many pictures others stand in for, as far as this process has read."""
        return len(self.substitutes)

    def record(self, index: int) -> Record:
        """What the manifest says of picture `index`, whether or not it can still be read."""
        return self.manifest.records[int(self._numbers[index])]

    def captions(self, index: int) -> tuple[str, ...]:
        """Returns the captions of what `image(index)` returned."""
        return self.record(self.substitutes.get(index, index)).captions

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
        """Returns a sha256 over the hashes of the files, the captions and the size, without reading a record."""
        content = self.manifest.header.content
        identity = {
            "version": VERSION,
            "image_size": list(self.image_size),
            "content": [content[part] for part in self._parts],
            "images": len(self),  # which ones a limit keeps depends on their bytes alone
        }
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def _read(self, index: int) -> Image.Image:
        record = self.record(index)
        content = read_bytes(self.manifest.root, record.location)
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise ImageError("the file has changed since it was ingested")
        return open_image(content, enough_for=self.image_size)

    def _substitute(self, index: int, error: ImageError) -> Image.Image:
        count = len(self)
        for step in range(1, count):
            substitute = (index + step) % count
            try:
                picture = self._read(substitute)
            except ImageError:
                continue
            if not self.substitutes:
                _logger.warning(
                    "%s: %s; another picture takes its place, and so for all further ones that fail",
                    self.record(index).location.name,
                    error,
                )
            self.substitutes[index] = substitute
            return picture
        name = self.record(index).location.name
        raise UserError(f"no image of {self.manifest.root} can be read any more: {name}: {error}")
