"""Captions by image, collected from tables in any order before the images come, and kept on the disk meanwhile.

A table may name its images in another order than a folder lists them, and one image in many rows; of millions of rows,
SQLite holds in memory only those at hand.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from typing import Self

from tessera.data.candidates import Candidate, Location, Reject
from tessera.data.captions import join_captions


class CaptionTable:
    """Captions of image files, of which each is taken once.

    Use it as a context manager: leaving it removes what lies on the disk.
    """

    def __init__(self) -> None:
        self._database = sqlite3.connect("")  # a nameless database: a temporary file of SQLite's own
        self._database.execute("CREATE TABLE captions (image BLOB NOT NULL, texts TEXT NOT NULL, taken INT DEFAULT 0)")
        self._database.execute("CREATE INDEX by_image ON captions (image)")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def fill(self, items: Iterable[Candidate | Reject]) -> Iterator[Reject]:
        """Adds the captions of candidates that are whole files, and yields the rejects between them."""
        for item in items:
            if isinstance(item, Reject):
                yield item
            else:
                self._database.execute(
                    "INSERT INTO captions (image, texts) VALUES (?, ?)",
                    (_to_bytes(item.location.file), json.dumps(item.captions)),
                )

    def take(self, image: str) -> tuple[str, ...] | None:
        """The captions of an image file in the order of their rows, joined, maybe none; None if no row named it."""
        key = (_to_bytes(image),)
        rows = self._database.execute("SELECT texts FROM captions WHERE image = ? ORDER BY rowid", key).fetchall()
        if not rows:
            return None
        self._database.execute("UPDATE captions SET taken = 1 WHERE image = ?", key)
        return join_captions(text for (texts,) in rows for text in json.loads(texts))

    def not_taken(self) -> Iterator[str]:
        """Image files that rows named and nobody took, in the order of their first rows."""
        left = self._database.execute("SELECT image FROM captions WHERE taken = 0 GROUP BY image ORDER BY MIN(rowid)")
        # All rows are found before the first is given, so that those may be taken that were given.
        for (image,) in left:
            yield bytes(image).decode("utf-8", "surrogatepass")


def one_per_image(items: Iterable[Candidate | Reject], *, no_caption: str) -> Iterator[Candidate | Reject]:
    """Joins the candidates of a table that speak of the same image file.

    Args:
        items: what a reader of tables yields.
        no_caption: reason for refusing an image without any caption.
    """
    with CaptionTable() as table:
        yield from table.fill(items)
        for image in table.not_taken():
            captions = table.take(image)
            yield Candidate(Location(image), captions) if captions else Reject(image, no_caption)


def _to_bytes(image: str) -> bytes:
    """File names may hold bytes that are not text."""
    return image.encode("utf-8", "surrogatepass")
