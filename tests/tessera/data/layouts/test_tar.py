import io
import json
import os
import pickle
import tarfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.data.candidates import NO_IMAGE_FOR_CAPTION, Candidate, Reject
from tessera.data.captions import MAX_FILE_BYTES as MAX_CAPTION_FILE_BYTES
from tessera.data.captions import NOTE_LONG_FILE
from tessera.data.images import ImageError
from tessera.data.layouts import tar
from tessera.data.layouts.tar import (
    DUPLICATE,
    LEAVES,
    NO_CAPTION,
    NOTE_BAD_JSON,
    NOTE_LONG_JSON,
    NOTE_MANY_NAMES,
    NOTE_NO_CAPTION_IN_JSON,
    read_member,
    read_tar,
)
from tessera.data.layouts.tar_members import Member

FILE = "shards/00000.tar"


class Evil:
    """What writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def write(root: Path, *members: tuple[str, bytes | str] | tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> Path:
    path = root / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            content = member[1].encode() if isinstance(member[1], str) else member[1]
            info = tarfile.TarInfo(member[0])
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def link(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def read(root: Path) -> tuple[dict[str, tuple[str, ...]], dict[str, str], Counter[str]]:
    """Captions and reasons by the member's name, and the notes."""
    notes: Counter[str] = Counter()
    items = list(read_tar(root, FILE, notes))
    candidates = {item.location.member: item.captions for item in items if isinstance(item, Candidate)}
    rejects = {item.source: item.reason for item in items if isinstance(item, Reject)}
    assert len(candidates) + len(rejects) == len(items)
    return candidates, {source.removeprefix(f"{FILE}/"): reason for source, reason in rejects.items()}, notes


def test_members_of_one_key_are_a_sample_and_lie_where_they_are_said_to(tmp_path: Path) -> None:
    write(
        tmp_path,
        ("000.jpg", b"first image"),
        ("000.txt", "a red star\na star\n"),
        ("000.json", json.dumps({"caption": "a red  star", "url": "http://x/y.jpg", "width": 3})),
        ("001.caption", "a ring"),
        ("001.WEBP", b"second"),
    )
    notes: Counter[str] = Counter()
    items = list(read_tar(tmp_path, FILE, notes))
    assert all(isinstance(item, Candidate) for item in items) and not notes
    assert [(item.location.name, item.captions) for item in items if isinstance(item, Candidate)] == [
        (f"{FILE}/000.jpg", ("a red star", "a star")),
        (f"{FILE}/001.WEBP", ("a ring",)),
    ]
    places = [item.location for item in items if isinstance(item, Candidate)]
    contents = [read_member(tmp_path / place.file, place.offset or 0, place.size or 0) for place in places]
    assert contents == [b"first image", b"second"]


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        ({"caption": "one"}, ("one",)),
        ({"TEXT": "two", "key": "0"}, ("two",)),
        ({"prompt": ["three", "four"]}, ("three", "four")),
        (["five", "six"], ("five", "six")),
        ("seven", ("seven",)),
    ],
)
def test_captions_in_json_are_objects_lists_or_strings(tmp_path: Path, content: Any, captions: tuple[str, ...]) -> None:
    write(tmp_path, ("0.png", b"0"), ("0.json", json.dumps(content)))
    assert read(tmp_path) == ({"0.png": captions}, {}, {})


def test_the_members_of_a_sample_may_lie_apart(tmp_path: Path) -> None:
    captions = [(f"{number}.txt", f"caption {number}") for number in range(50)]
    images = [(f"{number}.jpg", b"image") for number in reversed(range(50))]
    write(tmp_path, *captions, *images)
    candidates, rejects, _ = read(tmp_path)
    assert candidates == {f"{number}.jpg": (f"caption {number}",) for number in range(50)} and not rejects


def test_the_window_is_bounded_and_what_waited_too_long_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar, "WINDOW_BYTES", 20_000)
    near = [(f"near{number}.{suffix}", b"x") for number in range(100) for suffix in ("txt", "jpg")]
    write(tmp_path, ("far.txt", b"a caption"), *near, ("far.jpg", b"an image"))
    candidates, rejects, _ = read(tmp_path)
    assert len(candidates) == 100
    assert rejects == {"far.txt": NO_IMAGE_FOR_CAPTION, "far.jpg": NO_CAPTION}


def test_images_of_one_key_share_captions_unless_they_have_their_own(tmp_path: Path) -> None:
    write(
        tmp_path,
        *[("0.left.jpg", b"l"), ("0.right.jpg", b"r"), ("0.txt", "both")],
        *[("v1.2/IMG_1.2.jpg", b"2"), ("v1.2/IMG_1.3.jpg", b"3"), ("v1.2/IMG_1.2.txt", "two")],
        *[("v1.2/IMG_1.3.txt", "three"), ("v1.2/IMG_1.4.txt", "nobody's")],
        *[("cat.png", b"c"), ("cat.png.txt", "a cat"), ("cat.json", '{"caption": ""}')],
    )
    candidates, rejects, _ = read(tmp_path)
    assert candidates == {
        "0.left.jpg": ("both",),
        "0.right.jpg": ("both",),
        "v1.2/IMG_1.2.jpg": ("two",),
        "v1.2/IMG_1.3.jpg": ("three",),
        "cat.png": ("a cat",),
    }
    assert rejects == {"v1.2/IMG_1.4.txt": NO_IMAGE_FOR_CAPTION}


def test_an_image_is_never_given_the_captions_of_its_neighbors(tmp_path: Path) -> None:
    write(
        tmp_path,
        *[("frame.1.jpg", b"1"), ("frame.2.jpg", b"2"), ("frame.3.jpg", b"3"), ("frame.1.txt", "one")],
        *[("frame.2.jpg.txt", "two"), ("frame.9.txt", "nine")],
        *[("a/0.jpg", b"0"), ("a/0.mask.png", b"m"), ("a/0.txt", "of the key"), ("a/0.mask.txt", "its own")],
        *[("a/1.jpg", b"1"), ("a/1.mask.png", b"m"), ("a/1.txt", "of both")],
        *[("a/2.left.jpg", b"l"), ("a/2.right.jpg", b"r"), ("a/2.en.txt", "nobody's own")],
    )
    candidates, rejects, _ = read(tmp_path)
    assert candidates == {
        "frame.1.jpg": ("one",),
        "frame.2.jpg": ("two",),
        "a/0.jpg": ("of the key",),
        "a/0.mask.png": ("its own",),
        "a/1.jpg": ("of both",),
        "a/1.mask.png": ("of both",),
        "a/2.left.jpg": ("nobody's own",),
        "a/2.right.jpg": ("nobody's own",),
    }
    assert rejects == {"frame.3.jpg": NO_CAPTION, "frame.9.txt": NO_IMAGE_FOR_CAPTION}


def test_many_images_of_one_key_are_no_views_of_one_thing(tmp_path: Path) -> None:
    frames = [(f"frame.{number}.{suffix}", b"x") for number in range(30) for suffix in ("jpg", "en.txt")]
    write(tmp_path, *frames)
    candidates, rejects, _ = read(tmp_path)
    assert not candidates and Counter(rejects.values()) == {NO_CAPTION: 30, NO_IMAGE_FOR_CAPTION: 30}


def test_time_grows_with_the_number_of_images_of_one_key_and_not_its_square(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"frame.{number}{suffix}" for number in range(20_000) for suffix in (".jpg", ".txt")]
    members = [Member(name, name[-4:], "file", 512, 0) for name in names]
    monkeypatch.setattr(tar, "walk_members", lambda *_: members)
    write(tmp_path)
    start = time.process_time()
    num_candidates = 0
    for item in read_tar(tmp_path, FILE, Counter()):
        num_candidates += isinstance(item, Candidate)
        assert time.process_time() - start < 3  # looked at on the way: a square would take an hour
    assert num_candidates == 20_000


def test_formats_that_are_not_supported_are_refused_and_their_captions_are_not(tmp_path: Path) -> None:
    write(
        tmp_path,
        *[("a.heic", b"a"), ("a.txt", "a"), ("b.AVIF", b"b"), ("b.json", '{"caption": "b"}'), ("._c.heic", b"c")],
        *[("frame.1.heic", b"1"), ("frame.1.txt", "one"), ("frame.2.jpg", b"2"), ("frame.2.txt", "two")],
        *[("frame.3.jpg", b"3"), ("d.png", b"d"), ("d.svg", b"d"), ("d.txt", "d")],
    )
    candidates, rejects, notes = read(tmp_path)
    assert candidates == {"frame.2.jpg": ("two",), "d.png": ("d",)}
    assert rejects == {
        "a.heic": "format not supported: .heic",
        "b.AVIF": "format not supported: .avif",
        "frame.1.heic": "format not supported: .heic",
        "frame.3.jpg": NO_CAPTION,
        "d.svg": "format not supported: .svg",
    }
    assert notes == {"tar member passed over: hidden file": 1}


def test_blank_captions_are_legal_and_missing_ones_are_not(tmp_path: Path) -> None:
    write(tmp_path, ("a.jpg", b"a"), ("a.txt", " \n"), ("b.jpg", b"b"), ("c.txt", "c"), ("d.json", '{"url": "x"}'))
    candidates, rejects, notes = read(tmp_path)
    assert candidates == {"a.jpg": ("",)}
    assert rejects == {"b.jpg": NO_CAPTION, "c.txt": NO_IMAGE_FOR_CAPTION}
    assert notes == {NOTE_NO_CAPTION_IN_JSON: 1}


def test_names_that_lead_out_of_the_archive_are_refused(tmp_path: Path) -> None:
    names = ["../up.jpg", "a/../../on.jpg", "/etc/a.jpg", "//b.jpg", "..\\c.jpg", "C:\\d.jpg", "../e.sh", "a/../.."]
    write(tmp_path, *[(name, b"x") for name in names], ("a/../b.jpg", b"inside"), ("b.txt", "inside"))
    before = sorted(tmp_path.rglob("*"))
    candidates, rejects, _ = read(tmp_path)
    assert candidates == {"b.jpg": ("inside",)}
    assert len(rejects) == len(names) and set(rejects.values()) == {LEAVES}
    assert sorted(tmp_path.rglob("*")) == before


def test_links_devices_and_pipes_are_refused_and_never_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    write(
        tmp_path,
        link("a.jpg", tarfile.SYMTYPE, str(tmp_path / "secret.txt")),
        link("a.txt", tarfile.SYMTYPE, str(tmp_path / "secret.txt")),
        link("b.jpg", tarfile.LNKTYPE, "a.jpg"),
        link("c.jpg", tarfile.CHRTYPE),
        link("d.jpg", tarfile.BLKTYPE),
        link("e.jpg", tarfile.FIFOTYPE),
        ("e.txt", "a caption of an image that is there, though refused"),
        link("folder.jpg", tarfile.DIRTYPE),
        ("f.jpg", b"f"),
        ("f.txt", "f"),
    )
    candidates, rejects, _ = read(tmp_path)
    assert candidates == {"f.jpg": ("f",)}
    assert rejects == {
        "a.jpg": "not a regular file: symbolic link",
        "a.txt": "not a regular file: symbolic link",
        "b.jpg": "not a regular file: hard link",
        "c.jpg": "not a regular file: device",
        "d.jpg": "not a regular file: device",
        "e.jpg": "not a regular file: pipe",
    }


@pytest.mark.parametrize("names", [("a.jpg", "a.jpg"), ("a.jpg", "./a.jpg"), ("a.jpg", "b/../a.jpg")])
def test_of_members_of_one_name_the_first_is_taken(tmp_path: Path, names: tuple[str, str]) -> None:
    write(tmp_path, (names[0], b"first"), ("a.txt", "first"), (names[1], b"second"), ("a.txt", "second"))
    items = list(read_tar(tmp_path, FILE, Counter()))
    assert [item for item in items if isinstance(item, Reject)] == [
        Reject(f"{FILE}/a.jpg", DUPLICATE),
        Reject(f"{FILE}/a.txt", DUPLICATE),
    ]
    (candidate,) = [item for item in items if isinstance(item, Candidate)]
    assert candidate.captions == ("first",)
    assert read_member(tmp_path / FILE, candidate.location.offset or 0, candidate.location.size or 0) == b"first"


def test_names_are_compared_over_the_whole_archive_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{number}.jpg" for number in range(2_000)]  # the table grows twice on the way
    write(tmp_path, *[(name, b"x") for name in [*names, *names]], form=tarfile.USTAR_FORMAT)
    reasons = Counter(item.reason for item in read_tar(tmp_path, FILE, Counter()) if isinstance(item, Reject))
    assert reasons == {DUPLICATE: 2_000, NO_CAPTION: 2_000}
    monkeypatch.setattr(tar, "MAX_NAMES", 1_500)
    notes: Counter[str] = Counter()
    assert not [item for item in read_tar(tmp_path, FILE, notes) if DUPLICATE in item]
    assert notes == {NOTE_MANY_NAMES: 1}


@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".pth", ".pyd", ".cls", ".npy", ".jpg", ".txt", ".json"])
def test_nothing_is_unpickled(tmp_path: Path, suffix: str) -> None:
    trace = tmp_path / "executed"
    content = pickle.dumps(Evil(trace))
    write(tmp_path, (f"0{suffix}", content), ("0.py", f"open({str(trace)!r}, 'w')"), ("1.jpg", b"1"), ("1.txt", "1"))
    candidates, rejects, notes = read(tmp_path)
    assert not trace.exists()
    assert candidates == {"1.jpg": ("1",)}
    assert notes["tar member passed over: .py"] == 1
    if suffix in (".jpg", ".txt"):
        assert list(rejects) == [f"0{suffix}"]
    else:
        assert not rejects
        assert notes[NOTE_BAD_JSON if suffix == ".json" else f"tar member passed over: {suffix}"] == 1
    pickle.loads(content)
    assert trace.exists()  # or else it could not have been seen


def test_kinds_that_are_passed_over_are_counted_and_their_number_is_bounded(tmp_path: Path) -> None:
    odd = [("0.\x1b[31m", b""), ("0." + "y" * 50, b""), *((f"0.{number}x", b"") for number in range(300))]
    hidden = [("._0.jpg", b""), ("__MACOSX/0.jpg", b""), (".cache/1.zip", b"")]
    write(tmp_path, *hidden, ("README", b""), *odd, ("a.mp4", b""), form=tarfile.USTAR_FORMAT)
    candidates, rejects, notes = read(tmp_path)
    assert not candidates and not rejects
    assert notes["tar member passed over: hidden file"] == 2
    assert notes["tar member passed over: no suffix"] == 1
    assert notes["tar member passed over: .zip"] == 1
    assert notes["tar member passed over: other suffix"] > 200
    assert notes.total() == len(odd) + 5 and len(notes) <= 33
    assert all(note.isprintable() and len(note) < 50 for note in notes)


def test_oversized_members_are_refused_or_cut_without_being_read(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        ("a.jpg", b"a"),
        ("a.txt", "words " * (4 * MAX_CAPTION_FILE_BYTES)),
        ("b.jpg", b"b"),
        ("b.json", json.dumps({"caption": "x" * MAX_CAPTION_FILE_BYTES})),
    )
    huge = tarfile.TarInfo("c.jpg")
    huge.size = 3 * 2**30
    content = path.read_bytes()
    with path.open("wb") as file:
        file.write(huge.tobuf())
        file.seek(huge.size, os.SEEK_CUR)  # a hole
        file.write(content)
    tracemalloc.start()
    candidates, rejects, notes = read(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert list(candidates) == ["a.jpg"] and len(candidates["a.jpg"][0]) <= 1000
    assert rejects == {"b.jpg": NO_CAPTION, "c.jpg": "file too large: 3072 MiB, at most 512"}
    assert notes[NOTE_LONG_FILE] == notes[NOTE_LONG_JSON] == 1
    assert peak < 16 * 2**20


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b'{"caption": 1' + b"0" * 10_000 + b"}", b"\xff\xfe", b""])
def test_damaged_json_is_noted(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, ("a.jpg", b"a"), ("a.json", content))
    assert read(tmp_path) == ({}, {"a.jpg": NO_CAPTION}, {NOTE_BAD_JSON: 1})


def test_of_a_damaged_archive_what_came_before_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path, ("a.jpg", b"a"), ("a.txt", "a"), ("b.jpg", b"b" * 5000))
    os.truncate(path, 5 * 512 + 100)
    items = list(read_tar(tmp_path, FILE, Counter()))
    assert [type(item) for item in items] == [Candidate, Reject]
    assert items[1] == Reject(FILE, "damaged archive: it ends inside of b.jpg")


def test_archives_that_cannot_be_opened_are_one_reject(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "noise.tar").write_bytes(b"noise" * 1000)
    (tmp_path / "outside.tar").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.tar")
    for file, reason in {
        "missing.tar": "cannot be read: No such file or directory",
        "noise.tar": "not a tar archive",
        "outside.tar": "points outside the folder",
        "pipe.tar": "not a regular file",
        "shards": "not a regular file",
    }.items():
        assert list(read_tar(tmp_path, file, Counter())) == [Reject(file, reason)]


def test_memory_stays_bounded_over_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "WINDOW_BYTES", 2**18)
    info = tarfile.TarInfo()
    with (tmp_path / "many.tar").open("wb") as file:
        for number in range(6_000):
            info.name = f"{number:08d}.{'jpg' if number % 2 else 'txt'}"
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
    tracemalloc.start()
    reasons = Counter(item.reason for item in read_tar(tmp_path, "many.tar", Counter()) if isinstance(item, Reject))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reasons == {NO_CAPTION: 3_000, NO_IMAGE_FOR_CAPTION: 3_000}
    assert peak < 2**20  # all the samples at once would be 3 MiB


@given(flips=st.lists(st.tuples(st.integers(0, 15 * 512 - 1), st.integers(1, 255)), min_size=1, max_size=8))
def test_flipped_bits_give_candidates_and_rejects_and_never_an_error(
    tmp_path_factory: pytest.TempPathFactory, flips: Iterable[tuple[int, int]]
) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    path = write(
        root,
        *[("a.jpg", b"a" * 700), ("a.txt", "a star"), ("gr\u00fcn.jpg", b"b"), ("gr\u00fcn.json", '{"caption": "b"}')],
        *[("c.jpg", b"c"), ("c.caption", "c")],
    )
    content = bytearray(path.read_bytes())
    for place, bits in flips:
        content[place] ^= bits
    path.write_bytes(content)
    for item in read_tar(root, FILE, Counter()):
        if isinstance(item, Reject):
            assert item.source.startswith(FILE) and item.reason
        else:
            assert item.captions
            size = item.location.size or 0
            assert len(read_member(path, item.location.offset or 0, size)) == size


def test_a_member_that_cannot_be_read_has_a_reason(tmp_path: Path) -> None:
    path = write(tmp_path, ("a.jpg", b"abc"))
    os.mkfifo(tmp_path / "pipe")
    size = path.stat().st_size
    for place, reason in {
        (path, size - 2, 3): "truncated: the archive ends before it",
        (path, 0, 2**29 + 1): "file too large: 512 MiB, at most 512",
        (path, -1, 3): "cannot be read: Invalid argument",
        (path, 2**70, 3): "cannot be read: .*",
        (path, 0, -1): "cannot be read: .*",
        (tmp_path / "missing.tar", 0, 1): "cannot be read: No such file or directory",
        (tmp_path / "nul\0.tar", 0, 1): "cannot be read: .*null.*",
        (tmp_path / "pipe", 0, 1): "not a regular file",
        (tmp_path, 0, 1): "not a regular file",
    }.items():
        with pytest.raises(ImageError, match=f"^{reason}$"):
            read_member(*place)


def test_a_file_that_was_replaced_is_opened_again(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"old bytes")
    assert read_member(tmp_path / "a.tar", 4, 5) == b"bytes"
    (tmp_path / "b.tar").write_bytes(b"new words")
    os.replace(tmp_path / "b.tar", tmp_path / "a.tar")
    assert read_member(tmp_path / "a.tar", 4, 5) == b"words"


def test_threads_read_more_archives_than_are_kept_open(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number}.tar").write_bytes(b"%02d" % number * 500)
    places = [(number, offset) for offset in range(0, 1000, 50) for number in range(50)]
    before = len(os.listdir("/dev/fd"))
    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(lambda place: read_member(tmp_path / f"{place[0]}.tar", place[1], 20), places))
    assert contents == [b"%02d" % number * 10 for number, _ in places]
    assert len(os.listdir("/dev/fd")) <= before + 32
