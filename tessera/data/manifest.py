"""Ingest: any layout of captioned images -> a checked list of records, with every refusal counted and explained.

On disk a manifest is JSON lines: a header, then one record a line; `rejects.jsonl` beside it holds the refused files.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tessera.atomic_write import atomic_write
from tessera.data.images import ImageError, open_image, read_file
from tessera.data.sources import IMAGE_SUFFIXES, Candidate, Reject, Sources, find_sources, resolve_inside
from tessera.errors import UserError

MANIFEST_VERSION = 1
VALIDATION_SHARE = 0.05
# Fewer images than this are all needed for training.
MIN_FOR_VALIDATION = 10

Split = Literal["train", "validation"]
Progress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One image that was decoded once and may be trained on."""

    id: str
    """The first 16 hex digits of `sha256`: the same wherever the file lies, so random choices can be keyed by it."""
    source: str
    """Path below the manifest's root, with forward slashes."""
    sha256: str
    """Of the file's bytes."""
    width: int
    """Pixels, after EXIF rotation."""
    height: int
    captions: tuple[str, ...]
    """At least one; it may be empty."""
    split: Split


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an ingest found: seen = kept + rejected + duplicate, always."""

    root: Path
    records: tuple[Record, ...]
    rejects: tuple[Reject, ...]
    duplicates: tuple[Reject, ...]
    """Files whose bytes were already there under another name."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """What was changed in images or captions that were kept, and how often."""
    listing: str = ""
    """sha256 over names, sizes and times of the files, by which a later ingest knows that nothing has changed."""

    @property
    def num_seen(self) -> int:
        return len(self.records) + len(self.rejects) + len(self.duplicates)

    def reasons(self) -> list[tuple[str, int]]:
        """Kinds of refusal with their counts, the commonest first."""
        return Counter(reject.reason.partition(":")[0] for reject in self.rejects).most_common()

    def summary(self) -> str:
        """One line: "seen 120 = kept 113 + rejected 5 + duplicate 2; rejected: 3 no caption, 2 truncated"."""
        line = (
            f"seen {self.num_seen} = kept {len(self.records)} + rejected {len(self.rejects)} "
            f"+ duplicate {len(self.duplicates)}"
        )
        if self.rejects:
            line += "; rejected: " + ", ".join(f"{count} {reason}" for reason, count in self.reasons())
        if self.notes:
            line += "; noted: " + ", ".join(f"{count} {note}" for note, count in self.notes.items())
        return line

    def of_split(self, split: Split) -> tuple[Record, ...]:
        return tuple(record for record in self.records if record.split == split)

    def write(self, directory: Path) -> None:
        """Writes manifest.jsonl and rejects.jsonl; each appears whole or not at all."""
        directory.mkdir(parents=True, exist_ok=True)
        header = {
            "tessera_manifest": MANIFEST_VERSION,
            "root": str(self.root),
            "seen": self.num_seen,
            "kept": len(self.records),
            "rejected": len(self.rejects),
            "duplicate": len(self.duplicates),
            "notes": dict(self.notes),
            "listing": self.listing,
        }
        refused = [{"kind": "rejected", **reject._asdict()} for reject in self.rejects]
        refused += [{"kind": "duplicate", **reject._asdict()} for reject in self.duplicates]
        # The manifest last: where it is, the rejects that its header counts are there too.
        _write_lines(directory / "rejects.jsonl", refused)
        _write_lines(directory / "manifest.jsonl", [header, *map(asdict, self.records)])

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Reads manifest.jsonl, and rejects.jsonl beside it if it is there. No image is opened.

        Raises:
            UserError: the file is damaged, or from another version.
        """
        rows = _read_lines(path)
        header = rows[0] if rows else {}
        if header.get("tessera_manifest") != MANIFEST_VERSION:
            raise UserError(f"{path} is not a manifest of version {MANIFEST_VERSION}: ingest the images again")
        records = tuple(_record(row, f"{path}:{number}") for number, row in enumerate(rows[1:], start=2))
        if len(records) != header.get("kept"):
            raise UserError(f"{path} is cut short: {len(records)} of {header.get('kept')} records")
        refused = _read_lines(path.with_name("rejects.jsonl")) if path.with_name("rejects.jsonl").exists() else []
        by_kind: dict[str, list[Reject]] = {"rejected": [], "duplicate": []}
        for row in refused:
            by_kind.setdefault(str(row.get("kind")), []).append(Reject(str(row.get("source")), str(row.get("reason"))))
        # A data set that was moved together with its manifest lies beside it now.
        root = Path(str(header.get("root", "")))
        return cls(
            root=(root if root.is_dir() else path.parent).resolve(),
            records=records,
            rejects=tuple(by_kind["rejected"]),
            duplicates=tuple(by_kind["duplicate"]),
            notes=header.get("notes", {}),
            listing=str(header.get("listing", "")),
        )


def ingest(
    path: str | os.PathLike[str], *, directory: Path | None = None, on_progress: Progress | None = None
) -> Manifest:
    """Finds captioned images, decodes each once, and keeps the good ones.

    Args:
        path: a folder (see `tessera.data.sources` for its layouts), a .jsonl or .csv file with a row per image, or a
            manifest that was written before, which is read and not checked again.
        directory: where manifest.jsonl and rejects.jsonl are written. If they are there already and no file has changed
            since, they are read instead.
        on_progress: called with (images done, images in all).

    Raises:
        UserError: nothing is there, or nothing of it can be used; the message gives the commonest reason.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: expected a folder of captioned images or a manifest")
    if not path.is_dir():
        if path.suffix.lower() not in (".jsonl", ".csv"):
            raise UserError(f"{path} is neither a folder nor a manifest (.jsonl or .csv)")
        if _is_manifest(path):
            return _with_records(Manifest.read(path), path)
    sources = find_sources(path)
    if not sources.candidates and not sources.rejects:
        raise UserError(
            f"no images in {path}: expected {', '.join(suffix[1:] for suffix in IMAGE_SUFFIXES)} files, "
            "each with its caption in x.txt or in a row of metadata.jsonl or metadata.csv"
        )
    known = _known(directory, sources) if directory else None
    if known is not None:
        return _with_records(known, path)
    manifest = _check_all(sources, on_progress)
    if directory is not None:
        manifest.write(directory)
    return _with_records(manifest, path)


def split_key(sha256: str) -> float:
    """A number in [0, 1) that only depends on the image's bytes: adding images never moves others between splits."""
    digest = hashlib.blake2b(sha256.encode(), key=b"tessera split", digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _check_all(sources: Sources, on_progress: Progress | None) -> Manifest:
    records: list[Record] = []
    rejects = list(sources.rejects)
    duplicates: list[Reject] = []
    source_of: dict[str, str] = {}
    threads = os.cpu_count() or 1
    total = len(sources.candidates)
    with ThreadPoolExecutor(threads) as pool:
        # In batches, so that Ctrl-C waits for few files and a million of them are not queued at once.
        for start in range(0, total, 16 * threads):
            batch = sources.candidates[start : start + 16 * threads]
            results = pool.map(lambda candidate: _check(sources.root, candidate), batch)
            for done, checked in enumerate(results, start + 1):
                if isinstance(checked, Reject):
                    rejects.append(checked)
                elif checked.sha256 in source_of:
                    duplicates.append(Reject(checked.source, f"duplicate: same bytes as {source_of[checked.sha256]}"))
                else:
                    source_of[checked.sha256] = checked.source
                    records.append(checked)
                if on_progress is not None:
                    on_progress(done, total)
    return Manifest(
        root=sources.root,
        records=_split(records),
        rejects=tuple(rejects),
        duplicates=tuple(duplicates),
        notes=dict(sources.notes),
        listing=sources.listing,
    )


def _check(root: Path, candidate: Candidate) -> Record | Reject:
    try:
        content = read_file(resolve_inside(root, candidate.source))
        image = open_image(content)
    except ImageError as error:
        return Reject(candidate.source, str(error))
    sha256 = hashlib.sha256(content).hexdigest()
    return Record(
        id=sha256[:16],
        source=candidate.source,
        sha256=sha256,
        width=image.width,
        height=image.height,
        captions=candidate.captions,
        split="train",
    )


def _split(records: list[Record]) -> tuple[Record, ...]:
    if len(records) < MIN_FOR_VALIDATION:
        return tuple(records)
    keys = [split_key(record.sha256) for record in records]
    limit = max(VALIDATION_SHARE, min(keys))  # at least one
    return tuple(
        replace(record, split="validation") if key <= limit else record
        for record, key in zip(records, keys, strict=True)
    )


def _with_records(manifest: Manifest, path: Path) -> Manifest:
    if not manifest.records:
        reason, count = manifest.reasons()[0] if manifest.rejects else ("it is empty", 0)
        counts = manifest.summary().partition(";")[0]
        raise UserError(f"no usable image in {path}: {counts}; mostly: {reason} ({count})")
    return manifest


def _known(directory: Path, sources: Sources) -> Manifest | None:
    """The manifest of an earlier ingest of just these files, if there is a sound one."""
    try:
        manifest = Manifest.read(directory / "manifest.jsonl")
    except (OSError, UserError):
        return None
    return manifest if (manifest.root, manifest.listing) == (sources.root, sources.listing) else None


def _is_manifest(path: Path) -> bool:
    with path.open("rb") as file:
        return b'"tessera_manifest"' in file.read(4096).partition(b"\n")[0]


def _record(row: Mapping[str, Any], place: str) -> Record:
    match row:
        case {
            "id": str(identity),
            "source": str(source),
            "sha256": str(sha256),
            "width": int(width),
            "height": int(height),
            "captions": [str(), *_] as captions,
            "split": "train" | "validation" as split,
        } if all(isinstance(caption, str) for caption in captions):
            return Record(
                id=identity,
                source=source,
                sha256=sha256,
                width=width,
                height=height,
                captions=tuple(captions),
                split=split,
            )
    raise UserError(f"{place} is not a record of a manifest: ingest the images again")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{number} is not a JSON object")
                rows.append(row)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return rows


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            # ASCII, because a file name may hold bytes that are not text.
            file.write(json.dumps(row, ensure_ascii=True) + "\n")
