"""The manifest: which images are trained on, what is said of each, and what was refused; on the disk, not in memory.

    manifest.jsonl   a header with all counts, then a record a line, for people and for `Manifest`
    manifest.index   where each line begins, see `tessera.data.manifest_index`
    rejects.jsonl    what was refused, and why

Opening one reads the header and maps the index. A record costs one read and one JSON line when it is asked for.
"""

import hashlib
import json
import os
import weakref
from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from tessera.data.candidates import Location, Reject
from tessera.data.manifest_index import TRAIN, VALIDATION, Index, map_index, write_index
from tessera.errors import UserError

# N records.

MANIFEST_VERSION = 2
MANIFEST_NAME, REJECTS_NAME = "manifest.jsonl", "rejects.jsonl"
_MOST_HEADER_BYTES = 2**20
_RECORDS_AT_ONCE = 1024
_AGAIN = "ingest the images again"

Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")  # by the numbers of the index


class Record(NamedTuple):
    """One image that was decoded once and may be trained on."""

    id: str
    """The first 16 hex digits of `sha256`: the same wherever the image lies, so random choices can be keyed by it."""
    location: Location
    sha256: str
    """Of the image file's bytes."""
    width: int
    """Pixels, after EXIF rotation."""
    height: int
    captions: tuple[str, ...]
    """At least one; it may be empty."""
    split: Split

    def to_row(self) -> dict[str, Any]:
        """What its line says: the record in plain values, without the parts of the location that do not apply."""
        values = self._asdict()
        del values["location"], values["id"]
        location = {name: value for name, value in self.location._asdict().items() if value not in (None, "")}
        return {"id": self.id, **location, **values}

    @classmethod
    def of_row(cls, row: Any) -> Self | None:
        """The record that a line says; None if it says none."""
        match row:
            case {
                "id": str(identity),
                "file": str(file),
                "sha256": str(sha256),
                "width": int(width),
                "height": int(height),
                "captions": [str(), *_] as captions,
                "split": "train" | "validation" as split,
            } if all(isinstance(caption, str) for caption in captions):
                location = Location(file, row.get("member", ""), row.get("offset"), row.get("size"), row.get("row"))
                if isinstance(location.member, str) and all(_is_place(place) for place in location[2:]):
                    return cls(identity, location, sha256, width, height, tuple(captions), split)
        return None


@dataclass(frozen=True, kw_only=True)
class Header:
    """The first line of a manifest: seen = kept + rejected + duplicate, always."""

    tessera_manifest: int = MANIFEST_VERSION
    name: str
    """of the data set"""
    root: str
    """the folder below which the images lie"""
    seen: int
    kept: int
    rejected: int
    duplicate: int
    """files whose bytes were already there under another name"""
    reasons: dict[str, int]
    """kinds of refusal with their counts, the commonest first"""
    notes: dict[str, int]
    """what was changed in images or captions that were kept, or passed over, and how often"""
    content: dict[str, str]
    """of each split, sha256 over the hashes of its images and their captions, in order"""
    listing: str
    """sha256 over names, sizes and times of the files, by which a later ingest knows that nothing has changed"""

    def to_line(self) -> bytes:
        """The line, of a length that does not depend on the hashes in it."""
        return json.dumps(asdict(self)).encode() + b"\n"


class Records:
    """The kept images in their order; nothing of them is in memory. Safe for threads."""

    def __init__(self, path: Path, index: Index) -> None:
        self._path, self._index = path, index
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return len(self._index.keys)

    def __getitem__(self, number: int) -> Record:
        """Reads one record, from 0.

        Raises:
            IndexError: there is none of that number.
            UserError: the manifest has been damaged since it was opened.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"expected a record in [0, {len(self)}), got {number}")
        return self._parse(self._read(number, number + 1), number)

    def __iter__(self) -> Iterator[Record]:
        for first in range(0, len(self), _RECORDS_AT_ONCE):
            lines = self._read(first, min(first + _RECORDS_AT_ONCE, len(self))).splitlines()
            yield from (self._parse(line, first + place) for place, line in enumerate(lines))

    def of_split(self, split: Split) -> NDArray[np.int64]:
        """Numbers of a split's records, ascending."""
        return np.flatnonzero(self._index.splits == SPLITS.index(split))

    def keys(self, numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        """The split keys of these records."""
        return self._index.keys[numbers]

    def _read(self, start: int, stop: int) -> bytes:
        begin, end = int(self._index.offsets[start]), int(self._index.offsets[stop])
        lines = os.pread(self._descriptor, end - begin, begin)
        if len(lines) < end - begin:
            raise UserError(f"{self._path} was cut short while it was in use: {_AGAIN}")
        return lines

    def _parse(self, line: bytes, number: int) -> Record:
        with suppress(ValueError, RecursionError):
            record = Record.of_row(json.loads(line))
            if record is not None:
                return record
        raise UserError(f"{self._path}:{number + 2} is not a record of a manifest: {_AGAIN}")


class Refusals:
    """What was refused, read from the disk when it is iterated over."""

    def __init__(self, manifest: "Manifest", *, kind: str, count: int) -> None:
        # Holding the manifest, as a temporary one takes its files with it.
        self._manifest, self._kind, self._count = manifest, kind, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Reject]:
        path = self._manifest.path.with_name(REJECTS_NAME)
        if not path.exists():  # the manifest was copied without them
            return
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                    refusal = str(row["kind"]), Reject(str(row["source"]), str(row["reason"]))
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise UserError(f"{path}:{number} is not a refusal: {_AGAIN}") from error
                if refusal[0] == self._kind:
                    yield refusal[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """What an ingest has found. It travels to other processes by its path."""

    path: Path
    root: Path
    """the folder below which the images lie, resolved"""
    header: Header
    records: Records

    @classmethod
    def read(cls, path: Path) -> Self:
        """Opens manifest.jsonl. No image is opened, and no record is read if the index fits.

        Raises:
            UserError: the file is damaged, or from another version.
        """
        path = path.absolute()
        header = _read_header(path)
        index = map_index(path) or _index_again(path, header)
        if len(index.keys) != header.kept:
            raise UserError(f"{path} is cut short: {len(index.keys)} of {header.kept} records")
        # A data set that was moved together with its manifest lies beside it now.
        root = Path(header.root)
        root = (root if root.is_dir() else path.parent).resolve()
        return cls(path=path, root=root, header=header, records=Records(path, index))

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_same, (type(self), self.path, self.header.content)

    @property
    def rejects(self) -> Refusals:
        """What cannot be used."""
        return Refusals(self, kind="rejected", count=self.header.rejected)

    @property
    def duplicates(self) -> Refusals:
        """Files whose bytes were already there under another name."""
        return Refusals(self, kind="duplicate", count=self.header.duplicate)

    @property
    def num_seen(self) -> int:
        return self.header.seen

    @property
    def notes(self) -> Mapping[str, int]:
        """What was changed in images or captions that were kept, or passed over, and how often."""
        return self.header.notes

    def reasons(self) -> list[tuple[str, int]]:
        """Kinds of refusal with their counts, the commonest first."""
        return list(self.header.reasons.items())

    def summary(self) -> str:
        """One line: "seen 120 = kept 113 + rejected 5 + duplicate 2; rejected: 3 no caption, 2 truncated"."""
        header = self.header
        line = f"seen {header.seen} = kept {header.kept} + rejected {header.rejected} + duplicate {header.duplicate}"
        if header.reasons:
            line += "; rejected: " + ", ".join(f"{count} {reason}" for reason, count in header.reasons.items())
        if header.notes:
            line += "; noted: " + ", ".join(f"{count} {note}" for note, count in header.notes.items())
        return line

    def of_split(self, split: Split) -> NDArray[np.int64]:
        """Numbers of a split's records, ascending."""
        return self.records.of_split(split)


def split_key(sha256: str) -> float:
    """A number in [0, 1) that only depends on the image's bytes, so that images hold their split when others come.

    But for those that are for validation only because a small data set has none else: see `ManifestWriter.finish`.
    """
    digest = hashlib.blake2b(sha256.encode(), key=b"tessera split", digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class ContentDigest:
    """The hashes by which two manifests of the same images and captions are known to be equal."""

    def __init__(self) -> None:
        self._digests = {split: hashlib.sha256() for split in SPLITS}

    def add(self, row: Mapping[str, Any]) -> None:
        """Counts in one record, given as its line says it."""
        self._digests[row["split"]].update(json.dumps([row["sha256"], *row["captions"]]).encode() + b"\n")

    def hexdigests(self) -> dict[str, str]:
        """By split."""
        return {split: digest.hexdigest() for split, digest in self._digests.items()}


def _read_header(path: Path) -> Header:
    with path.open("rb") as file:
        line = file.readline(_MOST_HEADER_BYTES)
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    version = fields.get("tessera_manifest") if isinstance(fields, dict) else None
    if isinstance(version, int) and version > MANIFEST_VERSION:
        raise UserError(
            f"{path} is a manifest of version {version}, this tessera reads {MANIFEST_VERSION}: take a newer tessera, "
            f"or {_AGAIN}"
        )
    if version != MANIFEST_VERSION:
        raise UserError(f"{path} is not a manifest of version {MANIFEST_VERSION}: {_AGAIN}")
    wanted = get_type_hints(Header)
    if fields.keys() != wanted.keys() or not all(
        isinstance(fields[name], get_origin(kind) or kind) for name, kind in wanted.items()
    ):
        raise UserError(f"{path} is damaged: its first line is not a header")
    return Header(**fields)


def _index_again(path: Path, header: Header) -> Index:
    """Reads all records once, checks them against the header, and writes the index if that is allowed."""
    offsets, keys, splits = array("q"), array("d"), bytearray()
    content = ContentDigest()
    with path.open("rb") as file:
        offsets.append(len(file.readline()))
        for number, line in enumerate(file, start=2):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} is damaged: line {number}: {error}") from error
            record = Record.of_row(row)
            if record is None:
                raise UserError(f"{path}:{number} is not a record of a manifest: {_AGAIN}")
            offsets.append(offsets[-1] + len(line))
            keys.append(split_key(record.sha256))
            splits.append(TRAIN if record.split == "train" else VALIDATION)
            content.add(row)
    index = Index.of(offsets, keys, splits)
    if len(keys) == header.kept and content.hexdigests() != header.content:
        raise UserError(f"{path} was changed after it was written: {_AGAIN}")
    with suppress(OSError):  # a folder that may not be written
        write_index(index, path, path.parent)
    return index


def _open_same(cls: type[Manifest], path: Path, content: Mapping[str, str]) -> Manifest:
    manifest = cls.read(path)
    if manifest.header.content != content:
        raise UserError(f"{path} was replaced by another manifest while it was in use")
    return manifest


def _is_place(value: Any) -> bool:
    return value is None or (isinstance(value, int) and value >= 0)
