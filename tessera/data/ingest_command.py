"""`tessera ingest PATH --out DIR`: checks captioned images once and writes the manifest that stages train from.

With `--check`, reads every image of a manifest again and reports those whose bytes have changed or are gone.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from tessera.data.images import ImageError
from tessera.data.ingest import OnProgress, ingest, is_manifest
from tessera.data.manifest import MANIFEST_NAME, REJECTS_NAME, Manifest, Record
from tessera.data.read_ahead import read_ahead
from tessera.data.reading import read_bytes
from tessera.data.source import EXPECTED
from tessera.errors import EXIT_USER_ERROR, UserError, run_command
from tessera.one_line_parser import OneLineParser
from tessera.precision import usable_cores
from tessera.progress import counting

_TOLERATED_SHARE = 0.01


class Difference(NamedTuple):
    """An image that is no longer what was ingested."""

    name: str
    problem: str
    """"changed", or "missing: " and the reason"""


def main(argv: Sequence[str]) -> int:
    """The command."""
    parser = OneLineParser(
        prog="tessera ingest",
        description="Checks captioned images and writes a manifest of them; or checks them against one.",
        epilog="examples:\n"
        "  tessera ingest photos --out photos-manifest\n"
        "  tessera ingest photos-manifest --check\n"
        "  tessera fit photos-manifest/manifest.jsonl --out my-model",
    )
    parser.add_argument("path", metavar="PATH", nargs="?", help=EXPECTED)
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder for manifest.jsonl and rejects.jsonl")
    parser.add_argument(
        "--check",
        action="store_true",
        help="read every image of the manifest in DIR again, or of PATH where there is no DIR, and compare hashes",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of text")
    arguments = parser.parse_args(argv)
    return _check(arguments) if arguments.check else _ingest(arguments)


def _ingest(arguments: argparse.Namespace) -> int:
    if arguments.path is not None and is_manifest(Path(arguments.path).expanduser()):
        raise UserError(f"{arguments.path} is a manifest already: train on it, or verify it with --check")
    if arguments.path is None or arguments.out is None:
        raise UserError("expected PATH and --out DIR; see `tessera ingest --help`")
    with counting("checking images") as on_progress:
        manifest = ingest(arguments.path, directory=arguments.out, on_progress=on_progress)
    if arguments.json:
        print(json.dumps(_describe(manifest)))
        return 0
    print(manifest.summary())
    rejected, seen = manifest.header.rejected, manifest.num_seen
    if rejected > _TOLERATED_SHARE * seen:
        print(f"{rejected / seen:.1%} of what was seen cannot be used")
    if rejected or manifest.header.duplicate:
        print(f"what was refused, and why: {manifest.path.with_name(REJECTS_NAME)}")
    train, validation = (len(manifest.of_split(split)) for split in ("train", "validation"))
    print(f"manifest: {manifest.path} ({train} to train on, {validation} held out)")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    place = arguments.out or arguments.path
    if place is None:
        raise UserError("--check needs a manifest, or the folder that holds it; see `tessera ingest --help`")
    path = Path(place)
    path = path / MANIFEST_NAME if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path} does not exist: make it with `tessera ingest PATH --out DIR`")
    manifest = Manifest.read(path)
    with counting("comparing images") as on_progress:
        found = list(compare(manifest, on_progress))
    changed = [difference.name for difference in found if difference.problem == "changed"]
    missing = [difference.name for difference in found if difference.problem != "changed"]
    if arguments.json:
        print(json.dumps({"images": len(manifest.records), "changed": changed, "missing": missing}))
    else:
        for difference in found:
            print(f"{difference.name}: {difference.problem}")
        same = len(manifest.records) - len(found)
        print(f"compared {len(manifest.records)} = unchanged {same} + changed {len(changed)} + missing {len(missing)}")
    return EXIT_USER_ERROR if found else 0


def compare(manifest: Manifest, on_progress: OnProgress | None = None) -> Iterator[Difference]:
    """Reads every image of a manifest and yields those that are not what they were.

    Args:
        manifest: any.
        on_progress: called with (images done, images in all).
    """

    def read(record: Record) -> Difference | None:
        try:
            content = read_bytes(manifest.root, record.location)
        except ImageError as error:
            return Difference(record.location.name, f"missing: {error}")
        is_same = hashlib.sha256(content).hexdigest() == record.sha256
        return None if is_same else Difference(record.location.name, "changed")

    threads = usable_cores()
    with closing(read_ahead(read, manifest.records, threads=threads, most_ahead=16 * threads)) as differences:
        for done, difference in enumerate(differences, start=1):
            if difference is not None:
                yield difference
            if on_progress is not None:
                on_progress(done, len(manifest.records))


def _describe(manifest: Manifest) -> dict[str, Any]:
    header = manifest.header
    return {
        "manifest": str(manifest.path),
        "seen": header.seen,
        "kept": header.kept,
        "rejected": header.rejected,
        "duplicate": header.duplicate,
        "reasons": header.reasons,
        "notes": header.notes,
        "train": len(manifest.of_split("train")),
        "validation": len(manifest.of_split("validation")),
    }


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
