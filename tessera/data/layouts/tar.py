"""Tar shards as WebDataset and img2dataset write them: members of one name are one sample, read where they lie.

    00000.tar:  000017.jpg  000017.txt  000017.json  000018.jpg ...
                captions are .txt, .caption or .json with caption | text | prompt

The key of a member is its path up to the first dot of the last name. Members of a sample usually follow each other, but
`tar` stores a folder's files in any order. So a sample waits for more members until the names and captions of all that
wait take 64 MiB: about 50,000 samples, which is five shards of img2dataset.

Archives come from strangers. Nothing is extracted, unpickled or imported, and no path is ever made of a member's name.
"""

import json
import os
import posixpath
import re
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from tessera.data import captions as captions_of_files
from tessera.data.candidates import NO_IMAGE_FOR_CAPTION, Candidate, Location, Reject
from tessera.data.captions import (
    CAPTION_SUFFIXES,
    captions_of,
    clean_captions,
    decode_text,
    join_captions,
    row_captions,
)
from tessera.data.images import IMAGE_SUFFIXES, MAX_FILE_BYTES, UNSUPPORTED_SUFFIXES, ImageError
from tessera.data.layouts.tar_members import NOT_REGULAR, Archive, Member, walk_members
from tessera.data.reading import resolve_inside

WINDOW_BYTES = 64 * 2**20
MAX_NAMES = 2**22

NO_CAPTION = "no caption: expected .txt, .caption or .json of the same name in the archive"
LEAVES = "member name leaves the archive"
DUPLICATE = "duplicate name: an earlier member of the archive has it"
NOTE_PASSED_OVER = "tar member passed over"
NOTE_LONG_JSON = "JSON member longer than 1 MiB passed over"
NOTE_BAD_JSON = "JSON member that is not JSON passed over"
NOTE_NO_CAPTION_IN_JSON = "JSON member without caption, text or prompt passed over"
NOTE_MANY_NAMES = f"names in a tar archive behind the first {MAX_NAMES:,} not compared"

_OF_IMAGES = frozenset((*IMAGE_SUFFIXES, *UNSUPPORTED_SUFFIXES))
_WANTED_SUFFIXES = frozenset((*_OF_IMAGES, *CAPTION_SUFFIXES, ".json"))
# Views of one thing may share captions; more images than this have one key because of a dot in their names.
_MAX_VIEWS = 16
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_PLAIN_SUFFIX = re.compile(r"\.[a-z0-9_-]{1,12}")
_MAX_KINDS_OF_NOTES = 32
# What Python takes for a member and for a caption that wait, without their letters.
_MEMBER_BYTES = 400
_CAPTION_BYTES = 100


@dataclass(slots=True)
class _Sample:
    """The members of one key that have come so far."""

    key: str
    images: list[Location] = field(default_factory=list)
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by the name of the member that holds them
    refused: list[str] = field(default_factory=list)  # images whose captions are not to be refused as well
    waiting_bytes: int = 0


def read_tar(root: Path, file: str, notes: Counter[str]) -> Iterator[Candidate | Reject]:
    """Reads the headers and captions of an uncompressed archive; its images are left where they lie.

    Args:
        root: a resolved folder.
        file: path of the archive below it, with forward slashes.
        notes: counts what was changed or passed over.

    Yields:
        Every image, and every caption that has none, once. An archive that cannot be read to its end is one reject
        more, after what was found before the damage.
    """
    window = _Window(file)
    names = _Names(notes)
    damage = None
    try:
        archive = Archive(resolve_inside(root, file))
        for member in walk_members(archive, notes):
            if member.kind == "folder":
                continue
            refusal = _refusal(member)
            if refusal is None and not _is_wanted(member, notes):
                continue
            if refusal is None and not names.add(member.name):
                refusal = DUPLICATE
            if refusal is None and member.suffix in UNSUPPORTED_SUFFIXES:
                refusal = f"format not supported: {member.suffix}"
            if refusal is not None:
                yield Reject(f"{file}/{member.name}", refusal)
            if member.suffix in _OF_IMAGES:
                window.add_image(member, is_refused=refusal is not None)
            elif refusal is None:
                window.add_captions(member, _read_captions(archive, member, notes))
            yield from window.close_oldest()
    except ImageError as error:
        damage = Reject(file, str(error))
    except OSError as error:
        damage = Reject(file, f"cannot be read: {error.strerror or error}")
    yield from window.close_all()
    if damage is not None:
        yield damage


def read_member(path: Path, offset: int, size: int) -> bytes:
    """Reads the bytes of one member by their place; threads may do so side by side.

    Args:
        path: the archive.
        offset: first byte.
        size: bytes, at most 512 MiB.

    Raises:
        ImageError: the archive is missing, unreadable, too short or no regular file, or the member too large.
    """
    if size > MAX_FILE_BYTES:
        raise ImageError(_too_large(size))
    try:
        status = os.stat(path)
        content = _open_archive(os.fspath(path), status.st_dev, status.st_ino).read(offset, size)
    except (OSError, ValueError, OverflowError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) < size:
        raise ImageError("truncated: the archive ends before it")
    return content


@lru_cache(maxsize=32)
def _open_archive(path: str, device: int, inode: int) -> Archive:
    """Device and inode are for the cache: a file that has been replaced is opened again."""
    return Archive(path)


class _Names:
    """Which names an archive has had, as hashes in a table with open addressing: 16 to 32 bytes a name."""

    def __init__(self, notes: Counter[str]) -> None:
        self._notes = notes
        self._count = 0
        self._table = array("Q", bytes(8 * 1024))  # 0 is an empty place

    def add(self, name: str) -> bool:
        """Whether the name is new."""
        if self._count == MAX_NAMES:
            self._notes[NOTE_MANY_NAMES] = 1
            return True
        if 2 * self._count == len(self._table):
            old, self._table = self._table, array("Q", bytes(16 * len(self._table)))
            for key in filter(None, old):
                self._table[self._place(key)] = key
        key = hash(name) % 2**64 or 1
        place = self._place(key)
        is_new = not self._table[place]
        self._table[place] = key
        self._count += is_new
        return is_new

    def _place(self, key: int) -> int:
        """Where the key is, or would be put."""
        place = key % len(self._table)
        while self._table[place] not in (0, key):
            place = (place + 1) % len(self._table)
        return place


class _Window:
    """Samples to which members may still be added."""

    def __init__(self, file: str) -> None:
        self._file = file
        # By key, the oldest first. A dict would look for its first key past all that have been taken away.
        self._waiting: OrderedDict[str, _Sample] = OrderedDict()
        self._waiting_bytes = 0

    def add_image(self, member: Member, *, is_refused: bool) -> None:
        sample = self._sample_of(member, _MEMBER_BYTES)
        if is_refused:
            sample.refused.append(member.name)
        else:
            sample.images.append(Location(self._file, member.name, member.offset, member.size))

    def add_captions(self, member: Member, captions: tuple[str, ...]) -> None:
        if captions:
            text_bytes = sum(_CAPTION_BYTES + len(caption) for caption in captions)
            self._sample_of(member, _MEMBER_BYTES + text_bytes).captions[member.name] = captions

    def close_oldest(self) -> Iterator[Candidate | Reject]:
        """Gives away the oldest samples until the others fit."""
        while self._waiting_bytes > WINDOW_BYTES:
            _, sample = self._waiting.popitem(last=False)
            self._waiting_bytes -= sample.waiting_bytes
            yield from self._close(sample)

    def close_all(self) -> Iterator[Candidate | Reject]:
        for sample in self._waiting.values():
            yield from self._close(sample)

    def _sample_of(self, member: Member, added_bytes: int) -> _Sample:
        folder, _, name = member.name.rpartition("/")
        key = posixpath.join(folder, name.partition(".")[0])
        sample = self._waiting.get(key)
        if sample is None:
            sample = self._waiting[key] = _Sample(key)
        added_bytes += 2 * len(member.name)
        sample.waiting_bytes += added_bytes
        self._waiting_bytes += added_bytes
        return sample

    def _close(self, sample: _Sample) -> Iterator[Candidate | Reject]:
        by_stem: dict[str, list[str]] = {}
        for name in sample.captions:
            by_stem.setdefault(posixpath.splitext(name)[0], []).append(name)
        images = [*(image.member for image in sample.images), *sample.refused]
        own = {image: _own_captions(image, by_stem) for image in images}
        used = {name for names in own.values() for name in names}
        shared = by_stem.get(sample.key, [])
        # Where one image has captions of its own, those that nobody owns are of an image that is missing.
        if not shared and not used and len(own) <= _MAX_VIEWS:
            shared = list(sample.captions)
        shared_texts = _texts(sample, shared)
        for image in sample.images:
            captions = _texts(sample, own[image.member]) or shared_texts
            yield Candidate(image, captions) if captions else Reject(image.name, NO_CAPTION)
        if not all(own.values()):
            used.update(shared)
        unused = (name for name in sample.captions if name not in used)
        yield from (Reject(f"{self._file}/{name}", NO_IMAGE_FOR_CAPTION) for name in unused)


def _own_captions(image: str, by_stem: dict[str, list[str]]) -> list[str]:
    """IMG_1.2.jpg and IMG_1.3.jpg share a key, yet each has captions of its own; x.png may have x.png.txt."""
    return [*by_stem.get(posixpath.splitext(image)[0], ()), *by_stem.get(image, ())]


def _texts(sample: _Sample, names: list[str]) -> tuple[str, ...]:
    return join_captions(text for name in names for text in sample.captions[name])


def _refusal(member: Member) -> str | None:
    """Why a member is not used, whatever has come before it."""
    if member.kind != "file":
        return f"{NOT_REGULAR}: {member.kind}"
    parts = re.split(r"[\\/]", member.name)
    if parts[0] == "" or ".." in parts or _DRIVE.match(member.name):
        return LEAVES
    if member.size > MAX_FILE_BYTES and member.suffix in IMAGE_SUFFIXES:
        return _too_large(member.size)
    return None


def _is_wanted(member: Member, notes: Counter[str]) -> bool:
    """Whether it is an image or may hold captions; if not, that is counted by suffix."""
    is_hidden = member.name.startswith("__MACOSX/") or posixpath.basename(member.name).startswith(".")
    if not is_hidden and member.suffix in _WANTED_SUFFIXES:
        return True
    note = f"{NOTE_PASSED_OVER}: {'hidden file' if is_hidden else member.suffix or 'no suffix'}"
    # A stranger may make up suffixes without end, and of any letters.
    is_plain = is_hidden or not member.suffix or _PLAIN_SUFFIX.fullmatch(member.suffix)
    if note not in notes and (len(notes) >= _MAX_KINDS_OF_NOTES or not is_plain):
        note = f"{NOTE_PASSED_OVER}: other suffix"
    notes[note] += 1
    return False


def _read_captions(archive: Archive, member: Member, notes: Counter[str]) -> tuple[str, ...]:
    """The captions of a text file, at least one, or of a JSON file, maybe none."""
    limit = captions_of_files.MAX_FILE_BYTES
    content = archive.read(member.offset, min(member.size, limit + 1))
    if member.suffix != ".json":
        found = captions_of_files.parse_caption_file(content)
        notes.update(found.notes)
        return found.captions
    if len(content) > limit:
        notes[NOTE_LONG_JSON] += 1
        return ()
    try:
        row = json.loads(decode_text(content)[0])
    except (ValueError, RecursionError):
        notes[NOTE_BAD_JSON] += 1
        return ()
    captions = clean_captions(row_captions(row) if isinstance(row, dict) else captions_of(row), notes)
    if not captions:
        notes[NOTE_NO_CAPTION_IN_JSON] += 1
    return captions


def _too_large(size: int) -> str:
    return f"file too large: {size / 2**20:.0f} MiB, at most {MAX_FILE_BYTES // 2**20}"
