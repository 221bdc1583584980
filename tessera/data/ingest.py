"""Ingest: any layout of captioned images -> a checked manifest, with every refusal counted and explained.

Each image is decoded once, in several threads; what is found goes to the disk as it comes.
"""

import hashlib
import itertools
import os
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from tessera.data.candidates import Candidate, Reject
from tessera.data.images import ImageError, open_image
from tessera.data.manifest import MANIFEST_NAME, Manifest, Record
from tessera.data.manifest_writer import ManifestWriter
from tessera.data.read_ahead import read_ahead
from tessera.data.reading import HUB_PREFIX, read_bytes
from tessera.data.source import Source, find_source
from tessera.errors import UserError
from tessera.folder_lock import locked
from tessera.precision import usable_cores

_MOST_AHEAD = 16  # images for each thread

OnProgress = Callable[[int, int | None], None]  # (done, in all or None where that is not known)


def ingest(
    path: str | os.PathLike[str], *, directory: Path | None = None, on_progress: OnProgress | None = None
) -> Manifest:
    """Finds captioned images, decodes each once, and keeps the good ones.

    An ingest that was interrupted goes on where it stopped, if it writes to the same folder and no file has changed.

    Args:
        path: a folder (see `tessera.data.layouts.folder` for what may be in it), a .tar, .parquet, .json (COCO),
            .jsonl, .csv or .tsv file, "hf:NAME_OR_PATH[:SPLIT]", or a manifest that was written before, which is read
            and not checked again.
        directory: where the manifest is written. If there is one already and no file has changed since, it is read
            instead. None writes to a temporary folder that goes with the manifest.
        on_progress: called with (images done, images in all, or None while nobody knows): at least once where images
            have to be checked, and never where a manifest is only read.

    Raises:
        UserError: nothing is there, or nothing of it can be used; the message gives the commonest reason.
    """
    spec = os.fspath(path)
    if not spec.startswith(HUB_PREFIX):
        spec = os.path.expanduser(spec)
        if is_manifest(Path(spec)):
            return _with_records(Manifest.read(Path(spec)), spec)
    source = find_source(spec)
    if directory is not None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory} cannot be made a folder for the manifest: {error.strerror}") from error
        return _with_records(_known(directory, source) or _make(directory, source, on_progress), spec)
    temporary = Path(tempfile.mkdtemp(prefix="tessera-manifest-"))
    try:
        manifest = _with_records(_make(temporary, source, on_progress), spec)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    weakref.finalize(manifest, _remove, temporary, os.getpid())
    return manifest


def is_manifest(path: Path) -> bool:
    """Whether a file begins as a manifest does, of whatever version."""
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return False
    with path.open("rb") as file:
        return b'"tessera_manifest"' in file.read(4096).partition(b"\n")[0]


def _make(directory: Path, source: Source, on_progress: OnProgress | None) -> Manifest:
    with locked(directory, wait=True):
        known = _known(directory, source)  # made by another process while this one waited
        if known is not None:
            return known
        notes: Counter[str] = Counter()
        with ManifestWriter(directory, listing=source.listing) as writer:
            left = _behind(writer, source, notes)
            threads = usable_cores()
            outcomes = read_ahead(
                lambda item: _check(source.root, item), left, threads=threads, most_ahead=_MOST_AHEAD * threads
            )
            with closing(outcomes):
                for outcome in outcomes:
                    writer.add(outcome)
                    if on_progress is not None:
                        most = source.num_images
                        on_progress(writer.num_seen, None if most is None else max(most, writer.num_seen))
            if on_progress is not None:
                on_progress(writer.num_seen, writer.num_seen)
            writer.finish(name=source.name, root=source.root, notes=notes)
        return Manifest.read(directory / MANIFEST_NAME)


def _behind(writer: ManifestWriter, source: Source, notes: Counter[str]) -> Iterator[Candidate | Reject]:
    """What comes after the outcomes of an earlier ingest; everything if those do not end where they should."""
    items = source.read(notes)
    if not writer.num_seen:
        return items
    last = next(itertools.islice(items, writer.num_seen - 1, None), None)
    if last is not None and _name(last) == writer.last_source:
        return items
    writer.start_over()
    notes.clear()
    return source.read(notes)


def _name(item: Candidate | Reject) -> str:
    return item.source if isinstance(item, Reject) else item.location.name


def _check(root: Path, item: Candidate | Reject) -> Record | Reject:
    if isinstance(item, Reject):
        return item
    try:
        content = read_bytes(root, item.location)
        image = open_image(content)
    except ImageError as error:
        return Reject(item.location.name, str(error))
    sha256 = hashlib.sha256(content).hexdigest()
    return Record(sha256[:16], item.location, sha256, image.width, image.height, item.captions, "train")


def _known(directory: Path, source: Source) -> Manifest | None:
    """The manifest of an earlier ingest of just these files, if there is a sound one."""
    try:
        manifest = Manifest.read(directory / MANIFEST_NAME)
    except (OSError, UserError):
        return None
    return manifest if manifest.header.listing == source.listing else None


def _with_records(manifest: Manifest, path: str) -> Manifest:
    if not len(manifest.records):
        reason, count = manifest.reasons()[0] if manifest.reasons() else ("it is empty", 0)
        counts = manifest.summary().partition(";")[0]
        raise UserError(f"no usable image in {path}: {counts}; mostly: {reason} ({count})")
    return manifest


def _remove(directory: Path, process: int) -> None:
    if os.getpid() == process:  # and not a loader process that was forked from it
        shutil.rmtree(directory, ignore_errors=True)
