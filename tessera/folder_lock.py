"""One writer at a time in a folder, where the system and its file system have locks; elsewhere nobody is kept out."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(directory: Path, *, wait: bool) -> Iterator[None]:
    """Keeps out of a folder who asks for the same.

    Args:
        directory: must exist.
        wait: until another process has left the folder; else it is an error that one is there.

    Raises:
        BlockingIOError: another process is there, and `wait` is False.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
