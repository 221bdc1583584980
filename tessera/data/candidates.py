"""What ingest passes around before anything is decoded: where the bytes of an image lie and what is said of it.

Every reader of a layout (`tessera.data.layouts`) yields candidates and rejects one after the other, so that a layout of
a million images takes no more memory than one of ten.
"""

from typing import NamedTuple

NO_IMAGE_FOR_CAPTION = "no image for caption"


class Location(NamedTuple):
    """Where the bytes of one image file lie."""

    file: str
    """Path below the manifest's root, with forward slashes; for a `datasets` data set its name."""
    member: str = ""
    """Name inside a tar archive, for people: the bytes are found by their place."""
    offset: int | None = None
    """First byte of a tar archive's member."""
    size: int | None = None
    """Bytes of that member."""
    row: int | None = None
    """Row of a Parquet file or data set, from 0."""

    @property
    def name(self) -> str:
        """What people are told: "photos/cat.jpg", "00000.tar/0017.jpg", "train.parquet row 17"."""
        if self.member:
            return f"{self.file}/{self.member}"
        return self.file if self.row is None else f"{self.file} row {self.row}"


class Candidate(NamedTuple):
    """An image with its captions, not yet opened."""

    location: Location
    captions: tuple[str, ...]
    """At least one, each cleaned by `tessera.data.captions`; it may be empty."""


class Reject(NamedTuple):
    """Something that was seen and is not used; the reason's kind is the text before its first colon."""

    source: str
    reason: str
