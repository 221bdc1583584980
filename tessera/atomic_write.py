"""Files appear whole or not at all: written beside their place, flushed to the disk, then renamed."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path to write; when the block ends without an error, it becomes `path`.

    A crash at any moment leaves either the old file or the new one. The temporary file lies in the same folder, because
    a rename is atomic only within one file system. Its folder must exist.

    Args:
        path: the file to create or replace.

    Yields:
        The path to write to; the block must have closed it when it ends.
    """
    path = Path(path)
    # Machines that share a file system may have processes of the same number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    temporary.touch()
    permissions = temporary.stat().st_mode  # those of the user's umask; some writers make files of their own, private
    try:
        yield temporary
        temporary.chmod(permissions)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # folders cannot be opened elsewhere
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
