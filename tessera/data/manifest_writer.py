"""Writing a manifest: outcomes come one by one and wait in a journal, so that an interrupted ingest goes on.

Only the end knows the counts, and which images are for validation; then the journal becomes the three files of
`tessera.data.manifest`. In memory is a dict by which duplicates are found: from the first 16 bytes of the hash of every
image that was kept to its place in the journal, some 150 bytes an image as Python stores them.
"""

import contextlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

from tessera.atomic_write import atomic_write
from tessera.data.candidates import Reject
from tessera.data.manifest import (
    MANIFEST_NAME,
    MANIFEST_VERSION,
    REJECTS_NAME,
    SPLITS,
    ContentDigest,
    Header,
    Record,
    split_key,
)
from tessera.data.manifest_index import TRAIN, VALIDATION, Index, write_index

VALIDATION_SHARE = 0.05
# Fewer images than this are all needed for training.
MIN_FOR_VALIDATION = 10

JOURNAL_NAME = ".ingest.journal"
_DIGEST_BYTES = 16


class ManifestWriter:
    """Takes every outcome of an ingest, in the order of the source.

    Args:
        directory: where the manifest will be; must exist. No other writer may be at work there: see `folder_lock`.
        listing: what the source was like. A journal of the same listing is gone on with, another one is thrown away.

    Example:
        with ManifestWriter(folder, listing=listing) as writer:
            for outcome in itertools.islice(outcomes, writer.num_seen, None):
                writer.add(outcome)
            writer.finish(name="photos", root=root, notes={})
    """

    def __init__(self, directory: Path, *, listing: str) -> None:
        self.directory, self.listing = directory, listing
        self._resources = contextlib.ExitStack()
        self._forget()

    @property
    def num_seen(self) -> int:
        """Outcomes so far; those of an ingest that was interrupted included."""
        return self.num_kept + self.num_duplicate + self.reasons.total()

    def __enter__(self) -> Self:
        path = self.directory / JOURNAL_NAME
        path.touch()
        with contextlib.ExitStack() as resources:
            self._journal: BinaryIO = resources.enter_context(path.open("r+b"))
            self._reader: BinaryIO = resources.enter_context(path.open("rb"))
            self._recover()
            self._resources = resources.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def add(self, outcome: Record | Reject) -> None:
        """Takes the next outcome; a record whose bytes were seen before becomes a duplicate."""
        if isinstance(outcome, Reject):
            row = {"kind": "rejected", **outcome._asdict()}
        else:
            place = self._places.get(_beginning(outcome.sha256))
            row = outcome.to_row() if place is None else self._duplicate(outcome, place)
        self._count(row, self._end)
        line = json.dumps(row).encode() + b"\n"  # ASCII, because a file name may hold bytes that are not text
        self._journal.write(line)
        self._end += len(line)

    def start_over(self) -> None:
        """Throws away all outcomes so far, where they turn out to be those of another source."""
        self._forget()
        self._journal.seek(0)
        self._journal.truncate()
        self._journal.write(self._first_line())

    def finish(self, *, name: str, root: Path, notes: Mapping[str, int]) -> None:
        """Writes the manifest; its files appear whole or not at all.

        Images whose split key is at most 0.05 are for validation, or where no key is, the one of the lowest key; fewer
        than ten images are all trained on. Images that are added later can move others only where one of the two
        exceptions holds no longer.
        """
        self._journal.flush()
        limit = -1.0 if self.num_kept < MIN_FOR_VALIDATION else max(VALIDATION_SHARE, self._lowest_key)
        offsets, keys, splits = array("q"), array("d"), bytearray()
        content = ContentDigest()

        def header() -> bytes:
            return Header(
                name=name,
                root=str(root),
                seen=self.num_seen,
                kept=self.num_kept,
                rejected=self.reasons.total(),
                duplicate=self.num_duplicate,
                reasons=dict(self.reasons.most_common()),
                notes=dict(notes),
                content=content.hexdigests(),
                listing=self.listing,
            ).to_line()

        # The manifest last: where it is, the rejects that its header counts are there too.
        with atomic_write(self.directory / MANIFEST_NAME) as manifest:
            with (
                atomic_write(self.directory / REJECTS_NAME) as rejects,
                rejects.open("wb") as refused,
                manifest.open("wb") as kept,
            ):
                offsets.append(kept.write(header()))  # to be replaced by one of the same length
                for line, row in self._rows():
                    if "kind" in row:
                        refused.write(line)
                        continue
                    keys.append(split_key(row["sha256"]))
                    splits.append(VALIDATION if keys[-1] <= limit else TRAIN)
                    row["split"] = SPLITS[splits[-1]]
                    content.add(row)
                    offsets.append(offsets[-1] + kept.write(json.dumps(row).encode() + b"\n"))
                kept.seek(0)
                kept.write(header())
            write_index(Index.of(offsets, keys, splits), manifest, self.directory)
        (self.directory / JOURNAL_NAME).unlink()

    def _recover(self) -> None:
        """Counts what an earlier ingest of the same source has found, and cuts off what it left incomplete."""
        first = self._first_line()
        if self._journal.readline(len(first)) == first:
            for line in self._journal:
                row = _parse(line)
                if row is None:
                    break
                self._count(row, self._end)
                self._end += len(line)
            self._journal.seek(self._end)
            self._journal.truncate()
        else:
            self.start_over()

    def _forget(self) -> None:
        self.num_kept = self.num_duplicate = 0
        self.reasons: Counter[str] = Counter()
        self.last_source: str | None = None
        self._lowest_key = 1.0
        self._places: dict[bytes, int] = {}  # of a record's line in the journal, by the beginning of its hash
        self._end = len(self._first_line())

    def _first_line(self) -> bytes:
        return json.dumps({"tessera_manifest": MANIFEST_VERSION, "listing": self.listing}).encode() + b"\n"

    def _count(self, row: Mapping[str, Any], place: int) -> None:
        self.last_source = _source_of(row)
        if "kind" not in row:
            self.num_kept += 1
            self._places[_beginning(row["sha256"])] = place
            self._lowest_key = min(self._lowest_key, split_key(row["sha256"]))
        elif row["kind"] == "duplicate":
            self.num_duplicate += 1
        else:
            self.reasons[row["reason"].partition(":")[0]] += 1

    def _duplicate(self, record: Record, place: int) -> dict[str, str]:
        self._journal.flush()
        self._reader.seek(place)
        first = Record.of_row(json.loads(self._reader.readline()))
        assert first is not None
        return {
            "kind": "duplicate",
            "source": record.location.name,
            "reason": f"duplicate: same bytes as {first.location.name}",
        }

    def _rows(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        self._reader.seek(0)
        self._reader.readline()
        for line in self._reader:
            yield line, json.loads(line)


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line of the journal; None where the process was killed while it wrote it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_refusal = isinstance(row, dict) and row.keys() == {"kind", "source", "reason"}
    return row if line.endswith(b"\n") and (is_refusal or Record.of_row(row) is not None) else None


def _source_of(row: Mapping[str, Any]) -> str:
    if "kind" in row:
        return row["source"]
    record = Record.of_row(row)
    assert record is not None
    return record.location.name


def _beginning(sha256: str) -> bytes:
    return bytes.fromhex(sha256[: 2 * _DIGEST_BYTES])
