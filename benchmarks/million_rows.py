"""A manifest of a million images: how soon it opens, and how much memory it takes.

python -m benchmarks.million_rows [--quick] [--out FILE]

The manifest is written by the ingest's own writer, from records of images that are not there: opening looks at none.
Then fresh processes open it, as a stage of training does: manifest, corpus, fingerprint, and records from all over it.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.record import Row, write_results
from tessera.data.candidates import Location
from tessera.data.manifest import MANIFEST_NAME, Manifest, Record
from tessera.data.manifest_corpus import ManifestCorpus
from tessera.data.manifest_writer import ManifestWriter
from tessera.errors import run_command

CLAIM = "a manifest of a million images opens in less than a second and does not live in memory"
_ROWS, _QUICK_ROWS = 1_000_000, 20_000
_PROCESSES = 5
_READ = 1_000  # records of each process
_MEMORY_GOAL_MIB = 64.0  # a tenth or less of what the records would take
_OPEN = "--open"  # what a fresh process is started with


def main(argv: Sequence[str]) -> int:
    """Writes a manifest, has it opened, and writes what that took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.million_rows", description=CLAIM)
    parser.add_argument("--quick", action="store_true", help=f"{_QUICK_ROWS:,} rows")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/million_rows.json"), help="where to write")
    parser.add_argument(_OPEN, type=Path, dest="manifest", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.manifest is not None:
        print(json.dumps(opening(arguments.manifest)))
        return 0
    rows = _QUICK_ROWS if arguments.quick else _ROWS
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_manifest(Path(folder), rows)
        size_mib = manifest.stat().st_size / 2**20
        command = [sys.executable, "-m", "benchmarks.million_rows", _OPEN, str(manifest)]
        found = [
            json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            for _ in range(_PROCESSES)
        ]
    seconds, mib = (median(each[name] for each in found) for name in ("seconds", "mib"))
    name = f"{rows:,} rows, {size_mib:,.0f} MiB"
    write_results(
        arguments.out,
        claim=CLAIM,
        rows=[
            Row(f"{name}: seconds left of one after opening", 1 - seconds, "s", "", None, 0.0),
            Row(
                f"{name}: memory left of {_MEMORY_GOAL_MIB:g} MiB after opening and reading {_READ:,} records",
                _MEMORY_GOAL_MIB - mib,
                "MiB",
                "",
                None,
                0.0,
            ),
        ],
        raw={"openings": found, "rows": rows},
    )
    return 0


def write_manifest(directory: Path, rows: int) -> Path:
    """A manifest of images that are not there; the writer parts training from validation."""
    with ManifestWriter(directory, listing="made") as writer:
        for number in range(rows):
            sha256 = hashlib.sha256(str(number).encode()).hexdigest()
            location = Location(f"{number // 10_000:03}/{number:07}.jpg")
            captions = (f"a photograph of thing number {number} on a table", f"thing {number}, seen from above")
            writer.add(Record(sha256[:16], location, sha256, 512, 384, captions, "train"))
        writer.finish(name="made", root=directory, notes={})
    return directory / MANIFEST_NAME


def opening(manifest: Path) -> dict[str, float]:
    """Seconds until there is a corpus with its fingerprint, and MiB that this process then has more than before."""
    before, began = _resident_mib(), time.perf_counter()
    corpus = ManifestCorpus(Manifest.read(manifest), image_size=(64, 64))
    corpus.fingerprint()
    seconds = time.perf_counter() - began
    for index in range(0, len(corpus), max(1, len(corpus) // _READ)):
        corpus.record(index)
    return {"seconds": seconds, "mib": _resident_mib() - before}


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
