"""Tar archives from strangers: nothing is written, run or reached outside of them, and memory stays bounded.

Every archive is ingested in a process of its own. Before and after, everything in the folder above the archives is
listed with its bytes; a picture that lies there must not come in through a link. Memory is the peak of the process
beyond that of one that ingests a harmless archive.
"""

import hashlib
import io
import multiprocessing
import os
import pickle
import resource
import sys
import tarfile
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from benchmarks.record import Row
from tessera.data.ingest import ingest
from tessera.errors import UserError

_BLOCK = tarfile.BLOCKSIZE
_MOST_MIB = 256  # on top of what a harmless archive takes
_GIB = 2**30
_PAIRS_EVERY = 2000  # members of the largest archive
_SPECIAL_SUFFIXES = (".txt", ".pkl", ".pth", ".cls", ".jsonl")


class Outcome(NamedTuple):
    """What an ingest came to.

    Attributes:
        kept: sha256 of the images that were kept.
        told: the summary, or the error that the user would read.
        peak_mib: the most memory that the process had.
    """

    kept: list[str]
    told: str
    peak_mib: float


class _Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def _png(number: int) -> bytes:
    """A picture of its own for every number below 65,536."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 7)).save(content, "PNG")
    return content.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes = b"", **fields: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(content))


def _add_pair(archive: tarfile.TarFile, name: str, number: int) -> None:
    _add(archive, f"{name}.png", _png(number))
    _add(archive, f"{name}.txt", b"a caption")


def harmless(archive: tarfile.TarFile, outside: Path) -> None:
    """What memory is compared with."""


def upward(archive: tarfile.TarFile, outside: Path) -> None:
    """Names that lead out of the folder."""
    for depth in range(1, 6):
        _add_pair(archive, "../" * depth + "written", depth)
        _add_pair(archive, f"a/b/{'../' * (depth + 2)}written", 10 + depth)


def absolute(archive: tarfile.TarFile, outside: Path) -> None:
    """Names that begin at the root."""
    _add_pair(archive, str(outside / "written-absolutely"), 20)
    _add_pair(archive, "/" + str(outside / "written-absolutely-2"), 21)


def links(archive: tarfile.TarFile, outside: Path) -> None:
    """Links to a picture outside, to its folder, and to themselves."""
    for name, target, kind in (
        ("symbolic.png", str(outside / "secret.png"), tarfile.SYMTYPE),
        ("relative.png", "../secret.png", tarfile.SYMTYPE),
        ("hard.png", "../secret.png", tarfile.LNKTYPE),
        ("folder", str(outside), tarfile.SYMTYPE),
        ("loop.png", "loop.png", tarfile.SYMTYPE),
    ):
        _add(archive, name, linkname=target, type=kind)
        _add(archive, name.replace(".png", ".txt"), b"a caption")
    _add_pair(archive, "folder/written", 30)


def devices(archive: tarfile.TarFile, outside: Path) -> None:
    """Devices and pipes, on which reading could wait for ever."""
    for name, kind in (("null", tarfile.CHRTYPE), ("disk", tarfile.BLKTYPE), ("pipe", tarfile.FIFOTYPE)):
        _add(archive, f"{name}.png", type=kind, devmajor=1, devminor=5)
        _add(archive, f"{name}.txt", b"a caption")


def duplicates(archive: tarfile.TarFile, outside: Path) -> None:
    """A thousand members of one name."""
    for number in range(1000):
        _add(archive, "same.png", _png(number))
        _add(archive, "same.txt", b"a caption")


def pickles(archive: tarfile.TarFile, outside: Path) -> None:
    """Pickles that write a file, under names that other readers of such archives load and under those of images."""
    trap = pickle.dumps(_Trap(outside / "executed"))
    for suffix in (".pkl", ".pickle", ".pyd", ".pth", ".pt", ".npy", ".npz", ".cls", ".png", ".jpg", ".json", ".txt"):
        _add(archive, f"trap{suffix}", trap)


def code(archive: tarfile.TarFile, outside: Path) -> None:
    """Files that Python or a shell would run."""
    program = f"import os; os.system('touch {outside / 'executed'}')".encode()
    for name in ("sitecustomize.py", "conftest.py", "tessera/__init__.py", "x.pth", "__main__.py", "run.sh"):
        _add(archive, name, program, mode=0o755)


def odd_names(archive: tarfile.TarFile, outside: Path) -> None:
    """Names that are no text, or no file's."""
    names = ("a\nb", "\x1b[2Jc", "..", ".", " ", "x" * 5000, "C:\\written", "-rf", "\udcff", "a/" * 2000)
    for number, name in enumerate(names):
        _add_pair(archive, name, 40 + number)


_HOSTILE = (upward, absolute, links, devices, duplicates, pickles, code, odd_names)


def _long_header(file: BinaryIO, kind: bytes) -> None:
    """An extended header of four gigabytes of zeros, which take no room on the disk."""
    member = tarfile.TarInfo("long")
    member.type, member.size = kind, 4 * _GIB
    file.write(member.tobuf(tarfile.GNU_FORMAT))
    file.truncate(file.tell() + 4 * _GIB)


def _long_member(file: BinaryIO, name: str) -> None:
    """A member of two gigabytes of zeros."""
    member = tarfile.TarInfo(name)
    member.size = 2 * _GIB
    file.write(member.tobuf(tarfile.GNU_FORMAT))
    file.truncate(file.tell() + 2 * _GIB)


_OVERSIZED: dict[str, Callable[[BinaryIO], None]] = {
    "long name": lambda file: _long_header(file, tarfile.GNUTYPE_LONGNAME),
    "long link": lambda file: _long_header(file, tarfile.GNUTYPE_LONGLINK),
    "long extended header": lambda file: _long_header(file, tarfile.XHDTYPE),
    "long global header": lambda file: _long_header(file, tarfile.XGLTYPE),
    "long caption": lambda file: _long_member(file, "a.txt"),
    "long JSON": lambda file: _long_member(file, "a.json"),
    "long image": lambda file: _long_member(file, "a.png"),
}


def _write_many(path: Path, count: int) -> list[str]:
    """An archive of so many members, mostly empty ones; returns the sha256 of the images with captions among them."""
    template = bytearray(tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT))
    template[148:156] = b" " * 8  # the checksum is that of the header with blanks in its place
    plain_sum = sum(template)
    images = []
    with path.open("wb", buffering=2**20) as file:
        for number in range(count):
            pair, place = divmod(number, _PAIRS_EVERY)
            if place < 2:
                content = b"a caption" if place else _png(pair)
                member = tarfile.TarInfo(f"{pair:07d}.{'txt' if place else 'png'}")
                member.size = len(content)
                file.write(member.tobuf(tarfile.USTAR_FORMAT))
                file.write(content.ljust(-(-len(content) // _BLOCK) * _BLOCK, b"\0"))
                images += [] if place else [hashlib.sha256(content).hexdigest()]
            else:
                name = f"m/{number:07d}{_SPECIAL_SUFFIXES[number % len(_SPECIAL_SUFFIXES)]}".encode()
                header = bytearray(template)
                header[: len(name)] = name
                header[148:156] = b"%06o\0 " % (plain_sum + sum(name))
                file.write(header)
        file.write(bytes(2 * _BLOCK))
    return images


def measure(*, quick: bool) -> tuple[list[Row], dict[str, Any]]:
    """Ingests each hostile archive, and one of 1,000,000 members, 100,000 if it has to be quick."""
    count = 100_000 if quick else 1_000_000
    told, peaks, well = {}, {}, 0
    with tempfile.TemporaryDirectory() as scratch:
        outside = Path(scratch) / "outside"
        (outside / "archives").mkdir(parents=True)
        (outside / "secret.png").write_bytes(_png(99))
        secret = hashlib.sha256(_png(99)).hexdigest()
        base = _ingested(_archive(outside, harmless), Path(scratch))
        sound = set(base.kept)
        archives: dict[str, Callable[[], Path]] = {
            **{make.__name__: lambda make=make: _archive(outside, make) for make in _HOSTILE},
            **{name: lambda name=name: _oversized(outside, name) for name in _OVERSIZED},
        }
        for name, make in archives.items():
            path = make()
            before = _listing(outside, path)
            outcome = _ingested(path, Path(scratch))
            told[name], peaks[name] = outcome.told, outcome.peak_mib - base.peak_mib
            # The sound pictures at the beginning of every archive are to be kept all the same.
            well += _listing(outside, path) == before and secret not in outcome.kept and sound <= set(outcome.kept)
            print(f"{name}: {outcome.told}", file=sys.stderr, flush=True)
        path = outside / "archives" / "many.tar"
        wanted = _write_many(path, count)
        before = _listing(outside, path)
        many = _ingested(path, Path(scratch))
        found = len(set(wanted) & set(many.kept)) if _listing(outside, path) == before else 0
    peaks["many"], told["many"] = many.peak_mib - base.peak_mib, many.told
    every = len(archives)
    least = _MOST_MIB - max(peaks[name] for name in archives)
    rows = [
        Row("hostile tar archives that wrote, ran and reached nothing", well, f"of {every}", "", None, every),
        Row(f"memory left of {_MOST_MIB} MiB for the worst of them", least, "MiB", "", None, 0),
        Row(f"images found among {count:,} tar members", found, f"of {len(wanted)}", "", None, len(wanted)),
        Row(f"memory left of {_MOST_MIB} MiB for these members", _MOST_MIB - peaks["many"], "MiB", "", None, 0),
    ]
    return rows, {"told": told, "MiB on top of a harmless archive": peaks, "MiB of that": base.peak_mib}


def _archive(outside: Path, make: Callable[[tarfile.TarFile, Path], None]) -> Path:
    path = outside / "archives" / f"{make.__name__}.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as archive:
        for color in (200, 210):
            _add_pair(archive, f"sound-{color}", color)
        make(archive, outside)
    return path


def _oversized(outside: Path, name: str) -> Path:
    path = _archive(outside, harmless)
    with path.open("r+b") as file:
        with closing(tarfile.open(path)) as archive:
            last = archive.getmembers()[-1]
        file.seek(last.offset_data + _BLOCK)
        file.truncate()
        _OVERSIZED[name](file)
    return path


def _ingested(path: Path, scratch: Path) -> Outcome:
    """Ingests the folder of an archive, in which there is no other, and removes it."""
    with (
        tempfile.TemporaryDirectory(dir=scratch) as directory,
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool,
    ):
        outcome = pool.submit(_ingest, path, Path(directory)).result()
    path.unlink()
    return outcome


def _ingest(path: Path, directory: Path) -> Outcome:
    kept: list[str] = []
    try:
        manifest = ingest(path.parent, directory=directory)
        kept = [record.sha256 for record in manifest.records]
        told = manifest.summary()
    except UserError as error:
        told = str(error)
    return Outcome(kept, told, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def _listing(folder: Path, archive: Path) -> dict[str, str]:
    """Everything below a folder with its bytes, but the archive itself."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
        for path in sorted(folder.rglob("*"))
        if path != archive
    }
