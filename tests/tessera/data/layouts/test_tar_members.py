import bz2
import gzip
import io
import lzma
import os
import posixpath
import random
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.data.images import ImageError
from tessera.data.layouts.tar_members import (
    NOTE_EMPTY,
    NOTE_NO_END,
    Archive,
    Member,
    walk_members,
)

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
NAMES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x2FF, categories=("L", "N")), min_size=1, max_size=150)
CONTENTS = st.binary(max_size=600)


def member(name: str, content: bytes = b"", *, kind: bytes = tarfile.REGTYPE, size: int | None = None) -> bytes:
    """One header, whatever it claims, with this content."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(content) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % BLOCK)


def repaired(header: bytearray) -> bytes:
    """The header with the right checksum."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def walk(path: Path, content: bytes | None = None) -> tuple[list[Member], str | None, Counter[str]]:
    """The members, why the walk has ended early, and the notes."""
    if content is not None:
        path.write_bytes(content)
    members: list[Member] = []
    notes: Counter[str] = Counter()
    try:
        for found in walk_members(Archive(path), notes):
            members.append(found)
    except ImageError as error:
        return members, str(error), notes
    return members, None, notes


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@settings(max_examples=20)
@given(files=st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=2), CONTENTS), max_size=4))
def test_members_are_found_where_tarfile_finds_them(
    tmp_path_factory: pytest.TempPathFactory, form: int, files: list[tuple[list[str], bytes]]
) -> None:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    with tarfile.open(path, "w", format=form) as archive:
        for parts, content in files:
            info = tarfile.TarInfo("/".join(parts))
            info.size = len(content)
            try:
                archive.addfile(info, io.BytesIO(content))
            except ValueError:  # ustar has no place for long names
                assert form == tarfile.USTAR_FORMAT
    with tarfile.open(path) as archive:
        expected = [(info.name, info.offset_data, info.size) for info in archive]
    members, damage, _ = walk(path)
    assert [(found.name, found.offset, found.size) for found in members] == expected
    assert damage is None and {found.kind for found in members} <= {"file"}


def test_what_is_no_file_is_named_and_has_no_content(tmp_path: Path) -> None:
    kinds = {
        tarfile.DIRTYPE: "folder",
        tarfile.LNKTYPE: "hard link",
        tarfile.SYMTYPE: "symbolic link",
        tarfile.CHRTYPE: "device",
        tarfile.BLKTYPE: "device",
        tarfile.FIFOTYPE: "pipe",
        b"Z": "unknown type",
        tarfile.AREGTYPE: "file",
        tarfile.CONTTYPE: "file",
    }
    # A size that is not there: whoever believed it would miss the next member.
    content = b"".join(
        member("a", kind=kind, size=0 if what in ("unknown type", "file") else 10**6) for kind, what in kinds.items()
    )
    members, damage, _ = walk(tmp_path / "a.tar", content + member("last", b"x") + END)
    assert [found.kind for found in members] == [*kinds.values(), "file"]
    assert (members[-1].name, members[-1].size, damage) == ("last", 1, None)


def test_a_folder_of_the_oldest_format_ends_in_a_slash(tmp_path: Path) -> None:
    members, _, _ = walk(tmp_path / "a.tar", member("folder/", kind=tarfile.AREGTYPE) + END)
    assert [(found.name, found.kind) for found in members] == [("folder", "folder")]


def test_long_names_speak_of_the_next_member_only(tmp_path: Path) -> None:
    long = "folder/" * 30 + "x.JPG"
    content = member("././@LongLink", long.encode() + b"\0", kind=tarfile.GNUTYPE_LONGNAME) + member("cut", b"1")
    members, _, _ = walk(tmp_path / "a.tar", content + member("b.png", b"2") + END)
    assert [(found.name, found.suffix) for found in members] == [(long, ".jpg"), ("b.png", ".png")]


def test_names_become_labels_that_can_be_printed_and_compared(tmp_path: Path) -> None:
    names = [b"./a//b.jpg", b"\xff\xfe.jpg", b"red\x1b[31m.jpg", "gr\u00fcn.jpg".encode(), b"../../up.jpg"]
    pieces = []
    for name in names:
        header = bytearray(member("x", b"x")[:BLOCK])
        header[:100] = name.ljust(100, b"\0")
        pieces.append(repaired(header) + b"x".ljust(BLOCK, b"\0"))
    members, damage, _ = walk(tmp_path / "a.tar", b"".join(pieces) + END)
    assert damage is None
    assert [found.name for found in members] == [
        "a/b.jpg",
        "\\xff\\xfe.jpg",
        "red\\x1b[31m.jpg",
        "gr\u00fcn.jpg",
        "../../up.jpg",
    ]


@pytest.mark.parametrize("extensions", [0, 1, 5])
def test_sparse_files_are_named_and_the_walk_goes_on_behind_them(tmp_path: Path, extensions: int) -> None:
    header = bytearray(member("holes.jpg", kind=tarfile.GNUTYPE_SPARSE, size=3)[:BLOCK])
    header[482] = extensions > 0
    maps = b"".join(bytes(504) + bytes([number < extensions]) + bytes(7) for number in range(1, extensions + 1))
    pax = member("x", b"22 GNU.sparse.major=1\n", kind=tarfile.XHDTYPE) + member("holes.png", b"new")
    content = repaired(header) + maps + b"old".ljust(BLOCK, b"\0") + pax + member("b.jpg", b"b") + END
    members, damage, _ = walk(tmp_path / "a.tar", content)
    assert [(found.name, found.kind) for found in members] == [
        ("holes.jpg", "sparse file"),
        ("holes.png", "sparse file"),
        ("b.jpg", "file"),
    ]
    assert damage is None
    assert content[members[0].offset :][:3] == b"old"


@pytest.mark.parametrize("has_end", [True, False])
def test_a_sparse_map_of_more_than_a_mebibyte_is_refused(tmp_path: Path, has_end: bool) -> None:
    header = bytearray(member("holes.jpg", kind=tarfile.GNUTYPE_SPARSE)[:BLOCK])
    header[482] = 1
    end = bytes(BLOCK) + member("a.jpg") + END if has_end else b""
    members, damage, _ = walk(tmp_path / "a.tar", repaired(header) + b"\1" * BLOCK * 2_100 + end)
    assert not members and damage == "damaged archive: the map of a sparse file at byte 512 has no end"


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_an_extended_header_of_gigabytes_is_refused_unread(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(member("a.jpg", b"a") + member("x", kind=kind, size=3 * 2**30))
    os.truncate(path, 3 * 2**30 + 10 * BLOCK)  # a hole: the file is as long as the header says
    tracemalloc.start()
    members, damage, _ = walk(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [found.name for found in members] == ["a.jpg"]
    assert damage == "damaged archive: extended header of 3,072 MiB at byte 1,024"
    assert peak < 2**20


def test_global_headers_and_long_links_of_any_length_are_passed_by_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        for kind in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            file.write(member("x", kind=kind, size=2**30))
            file.seek(2**30, os.SEEK_CUR)
        file.write(member("a.jpg", b"a") + END)
    members, damage, _ = walk(path)
    assert [found.name for found in members] == ["a.jpg"] and damage is None


def test_thousands_of_extended_headers_in_a_row_are_no_recursion(tmp_path: Path) -> None:
    chain = member("x", b"new.jpg", kind=tarfile.GNUTYPE_LONGNAME) * 3_000
    members, damage, _ = walk(tmp_path / "a.tar", chain + member("old.jpg") + END)
    assert [found.name for found in members] == ["new.jpg"] and damage is None


@pytest.mark.parametrize(
    "records",
    [
        b"nonsense",
        b"99 path=beyond\n",
        b"0 path=x\n",
        b"-9 path=x\n",
        b"9 path=xx",
        b"8 path x\n",
        b"11 size=two\n",
        b"9" * 5000 + b" path=x\n",
        b"15 size=-10000\n",
    ],
)
def test_bad_extended_headers_end_the_walk(tmp_path: Path, records: bytes) -> None:
    content = member("a.jpg") + member("x", records, kind=tarfile.XHDTYPE) + member("b.jpg") + END
    members, damage, _ = walk(tmp_path / "a.tar", content)
    assert [found.name for found in members] == ["a.jpg"]
    assert damage is not None and damage.startswith("damaged archive: ")


def test_an_extended_header_may_state_name_and_size(tmp_path: Path) -> None:
    records = b"14 path=b.jpg\n10 size=3\n\0\0\0"
    content = member("x", records, kind=tarfile.XHDTYPE) + member("cut", b"abc", size=0) + member("c.jpg") + END
    members, damage, _ = walk(tmp_path / "a.tar", content)
    assert [(found.name, found.size) for found in members] == [("b.jpg", 3), ("c.jpg", 0)] and damage is None


def test_negative_sizes_do_not_lead_backward(tmp_path: Path) -> None:
    header = bytearray(member("b.jpg")[:BLOCK])
    header[124:136] = b"\xff" * 10 + b"\xfc\0"  # -1024 in base 256
    members, damage, _ = walk(tmp_path / "a.tar", member("a.jpg") + repaired(header) + END)
    assert [found.name for found in members] == ["a.jpg"]
    assert damage == "damaged archive: bad header at byte 512"


@pytest.mark.parametrize("cut", [1, 511, 600, 1023, 1024 + 200])
def test_of_a_truncated_archive_the_beginning_is_kept(tmp_path: Path, cut: int) -> None:
    first = member("a.jpg", b"a")
    content = first + member("b.jpg", bytes(range(256)) * 4)
    members, damage, _ = walk(tmp_path / "a.tar", content[: len(first) + cut])
    assert [found.name for found in members] == ["a.jpg"]
    expected = "it ends inside of the header at byte 1,024" if cut < BLOCK else "it ends inside of b.jpg"
    assert damage == f"damaged archive: {expected}"


def test_rubbish_between_members_ends_the_walk(tmp_path: Path) -> None:
    content = member("a.jpg") + b"rubbish!" * 64 + member("b.jpg") + END
    members, damage, _ = walk(tmp_path / "a.tar", content)
    assert [found.name for found in members] == ["a.jpg"]
    assert damage == "damaged archive: bad header at byte 512"


def test_archives_joined_by_cat_are_not_taken_for_one(tmp_path: Path) -> None:
    one = member("a.jpg") + END
    for joined in (one + one, one + bytes(2 * 2**20)):
        members, damage, _ = walk(tmp_path / "a.tar", joined)
        assert [found.name for found in members] == ["a.jpg"]
        assert damage is not None and damage.startswith("damaged archive: it goes on behind its end mark at byte 512")


def test_a_missing_end_mark_and_an_empty_archive_are_noted(tmp_path: Path) -> None:
    assert walk(tmp_path / "a.tar", member("a.jpg"))[1:] == (None, {NOTE_NO_END: 1})
    assert walk(tmp_path / "a.tar", bytes(10_240)) == ([], None, {NOTE_EMPTY: 1})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"a red star", "not a tar archive"),
        (random.Random(0).randbytes(4096), "not a tar archive"),
        (gzip.compress(member("a.jpg") + END), "compressed archive: .* gzip -d"),
        (bz2.compress(member("a.jpg") + END), "compressed archive: .* bzip2 -d"),
        (lzma.compress(member("a.jpg") + END), "compressed archive: .* xz -d"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed archive: .* zstd -d"),
    ],
    ids=["empty", "text", "random", "gzip", "bzip2", "xz", "zstd"],
)
def test_what_is_no_tar_is_told_apart(tmp_path: Path, content: bytes, reason: str) -> None:
    members, damage, _ = walk(tmp_path / "a.tar", content)
    assert not members
    with pytest.raises(ImageError, match=f"^{reason}$"):
        raise ImageError(damage)


def test_pipes_and_folders_are_no_archives(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    for path in (tmp_path / "pipe.tar", tmp_path):
        with pytest.raises(ImageError, match="^not a regular file$"):
            Archive(path)


@given(
    flips=st.lists(st.tuples(st.integers(0, 13 * BLOCK - 1), st.integers(1, 255)), min_size=1, max_size=6),
    repair=st.booleans(),
)
def test_flipped_bits_give_members_inside_of_the_archive_or_damage(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]], repair: bool
) -> None:
    content = bytearray(
        member("a.jpg", b"a" * 700)
        + member("x", b"14 path=b.jpg\n10 size=3\n", kind=tarfile.XHDTYPE)
        + member("b", b"abc")
        + member("x", b"long.jpg\0", kind=tarfile.GNUTYPE_LONGNAME)
        + member("c", b"c")
        + END
    )
    headers = [0, 3 * BLOCK, 5 * BLOCK, 7 * BLOCK, 9 * BLOCK]
    for place, bits in flips:
        content[place] ^= bits
    if repair:  # flips that the checksum would betray
        for start in headers:
            content[start : start + BLOCK] = repaired(content[start : start + BLOCK])
    path = tmp_path_factory.mktemp("fuzz") / "a.tar"
    members, _, _ = walk(path, bytes(content))
    for found in members:
        assert found.size >= 0 and found.offset >= BLOCK and found.offset + found.size <= len(content)
        assert found.name.isprintable() and posixpath.normpath(found.name) == found.name
