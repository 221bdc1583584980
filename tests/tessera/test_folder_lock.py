"""A folder has one writer at a time: the next one waits, or is told."""

import os
import threading
from pathlib import Path

import pytest

from tessera.folder_lock import locked

pytestmark = pytest.mark.skipif(os.name != "posix", reason="folders are locked on POSIX systems only")


def test_writers_wait_for_each_other(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with locked(tmp_path, wait=True):
            order.append("second")

    thread = threading.Thread(target=second)
    with locked(tmp_path, wait=True):
        thread.start()
        thread.join(timeout=0.1)
        order.append("first")
    thread.join(timeout=10)
    assert order == ["first", "second"]


def test_who_does_not_wait_is_told(tmp_path: Path) -> None:
    with locked(tmp_path, wait=True), pytest.raises(BlockingIOError), locked(tmp_path, wait=False):
        pass
    with locked(tmp_path, wait=False):
        pass
