"""Walks the members of an uncompressed tar archive from a stranger: their names, kinds and places, in bounded memory.

`tarfile.TarInfo.frombuf` decodes single headers of 512 bytes. Going from one to the next is done here, because
`tarfile.TarFile` keeps every member in memory, reads extended headers of any length, and calls itself for each of them.
Formats: POSIX.1-2001 `pax`; GNU tar manual, "Basic Tar Format".
"""

import os
import posixpath
import stat
import tarfile
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from tessera.data.images import ImageError

MAX_HEADER_BYTES = 2**20
MAX_PADDING_BYTES = 2**20

NOT_REGULAR = "not a regular file"
NOTE_NO_END = "tar archive without its end mark"
NOTE_EMPTY = "empty tar archive"

_BLOCK = tarfile.BLOCKSIZE
# Of these nothing follows the header, whatever size it states.
_WITHOUT_CONTENT = {
    tarfile.DIRTYPE: "folder",
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "pipe",
}
_COMPRESSED = {
    b"\x1f\x8b": "gzip -d",
    b"\x28\xb5\x2f\xfd": "zstd -d",
    b"BZh": "bzip2 -d",
    b"\xfd7zXZ": "xz -d",
    b"\x04\x22\x4d\x18": "lz4 -d",
}


class Member(NamedTuple):
    """What the headers of a member say."""

    name: str
    """A label, printable and normalized; it may be absolute or lead upward"""
    suffix: str
    """of the name, in small letters, with its dot"""
    kind: str
    """ "file", "folder", "hard link", "symbolic link", "device", "pipe", "sparse file" or "unknown type" """
    offset: int
    """first byte of the content"""
    size: int
    """bytes of the content"""


class Archive:
    """An open archive; its bytes are asked for by place, so that threads and forked processes can share it.

    Raises:
        ImageError: it is no regular file.
        OSError: it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # O_NONBLOCK, because opening a pipe would wait for somebody to write into it.
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        # Not before the last thread has let go of it: the number may stand for another file from then on.
        weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(NOT_REGULAR)
        self.size = status.st_size

    def read(self, offset: int, size: int) -> bytes:
        """These bytes, or fewer at the end of the file."""
        content = os.pread(self._descriptor, size, offset)
        while len(content) < size and (more := os.pread(self._descriptor, size - len(content), offset + len(content))):
            content += more
        return content


class _Extension:
    """What extended headers say of the member behind them."""

    def __init__(self) -> None:
        self.name: bytes | None = None
        self.size: int | None = None
        self.is_sparse = False

    def read_long_name(self, text: bytes) -> None:
        self.name = text.partition(b"\0")[0]

    def read_pax(self, text: bytes) -> None:
        """Reads records "LENGTH KEYWORD=VALUE\n", the length being that of the whole record in decimal digits."""
        position = 0
        while position < len(text) and text[position]:  # some writers fill up with zeros
            length = text[position : position + 20].partition(b" ")[0]
            end = position + (int(length) if length.isdigit() else 0)
            keyword, equals, value = text[position + len(length) + 1 : end].partition(b"=")
            if end > len(text) or not equals or not value.endswith(b"\n"):
                raise ValueError("bad extended header")
            position = end
            if keyword == b"path":
                self.name = value[:-1]
            elif keyword == b"size":
                self.size = int(value[:20])
            self.is_sparse |= keyword.startswith(b"GNU.sparse.")


def walk_members(archive: Archive, notes: Counter[str]) -> Iterator[Member]:
    """Yields the members in their order; what global headers say of all of them is passed over.

    Args:
        archive: an open archive; of its contents only headers are read.
        notes: counts archives that end in an unusual way.

    Raises:
        ImageError: it is no tar archive, or damaged from here on.
    """
    offset = 0
    extension = _Extension()
    while block := archive.read(offset, _BLOCK):
        if not any(block):
            # Two blocks of zeros, and more of them to fill a record: 10 KiB in all, if nobody has asked for more.
            if archive.size - offset > MAX_PADDING_BYTES or any(archive.read(offset, MAX_PADDING_BYTES)):
                raise ImageError(f"damaged archive: it goes on behind its end mark at byte {offset:,} (joined by cat?)")
            notes.update([] if offset else [NOTE_EMPTY])
            return
        header = _decode(block, offset)
        content, size, kind = offset + _BLOCK, header.size, header.type
        if kind in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            offset = _next_block(content + size)
            continue
        if kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            text = _read_header(archive, content, size)
            try:
                extension.read_long_name(text) if kind == tarfile.GNUTYPE_LONGNAME else extension.read_pax(text)
            except ValueError as error:
                raise ImageError(f"damaged archive: bad extended header at byte {offset:,}") from error
            offset = _next_block(content + size)
            continue
        if kind == tarfile.GNUTYPE_SPARSE:
            content = _behind_sparse_map(archive, block, content)
        if kind in _WITHOUT_CONTENT:
            size = 0
        elif extension.size is not None:
            size = extension.size
        name = _label(header.name if extension.name is None else extension.name.decode("utf-8", "backslashreplace"))
        if size < 0 or content + size > archive.size:
            raise ImageError(f"damaged archive: it ends inside of {name[:100]}")
        yield Member(name, posixpath.splitext(name)[1].lower(), _kind(kind, extension), content, size)
        offset = _next_block(content + size)
        extension = _Extension()
    if offset == 0:
        raise ImageError("empty file")
    notes[NOTE_NO_END] += 1


def _kind(kind: bytes, extension: _Extension) -> str:
    if extension.is_sparse or kind == tarfile.GNUTYPE_SPARSE:
        return "sparse file"
    return "file" if kind in tarfile.REGULAR_TYPES else _WITHOUT_CONTENT.get(kind, "unknown type")


def _decode(block: bytes, offset: int) -> tarfile.TarInfo:
    try:
        # Bytes that are not UTF-8 become \xff and the like, which can be printed and written anywhere.
        header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        if header.size < 0:
            raise ValueError("negative size")
    except (tarfile.HeaderError, ValueError) as error:
        if offset == 0:
            raise ImageError(_not_a_tar(block)) from error
        what = "bad header" if len(block) == _BLOCK else "it ends inside of the header"
        raise ImageError(f"damaged archive: {what} at byte {offset:,}") from error
    return header


def _not_a_tar(beginning: bytes) -> str:
    for magic, command in _COMPRESSED.items():
        if beginning.startswith(magic):
            return f"compressed archive: members are read by their place; decompress it with {command}"
    return "not a tar archive"


def _read_header(archive: Archive, offset: int, size: int) -> bytes:
    if size > MAX_HEADER_BYTES:
        raise ImageError(f"damaged archive: extended header of {size / 2**20:,.0f} MiB at byte {offset - _BLOCK:,}")
    text = archive.read(offset, size)
    if len(text) < size:
        raise ImageError(f"damaged archive: it ends inside of the header at byte {offset - _BLOCK:,}")
    return text


def _behind_sparse_map(archive: Archive, block: bytes, offset: int) -> int:
    """Where the content of a sparse file in GNU's old format begins: its map may go on behind the header."""
    start, goes_on = offset, block[482]
    while goes_on:
        block = archive.read(offset, _BLOCK)
        if len(block) < _BLOCK or offset - start > MAX_HEADER_BYTES:
            raise ImageError(f"damaged archive: the map of a sparse file at byte {start:,} has no end")
        offset, goes_on = offset + _BLOCK, block[504]
    return offset


def _next_block(offset: int) -> int:
    return -(-offset // _BLOCK) * _BLOCK


def _label(name: str) -> str:
    return posixpath.normpath(name if name.isprintable() else name.encode("unicode_escape").decode())
