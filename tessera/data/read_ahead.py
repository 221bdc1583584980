"""Reading ahead: threads work on the next items while their caller is busy with the ones before."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

KeyT = TypeVar("KeyT")
ItemT = TypeVar("ItemT")


def read_ahead(
    read: Callable[[KeyT], ItemT], keys: Iterable[KeyT], *, threads: int, most_ahead: int
) -> Generator[ItemT, None, None]:
    """Yields `read(key)` of every key in order, whichever thread is first.

    Close the iterator when leaving it early: that waits for the reads in progress and drops the others.

    Args:
        read: called in the threads.
        keys: any number of them; taken as they are needed, in the caller's thread.
        threads: at least 1.
        most_ahead: most items, at least 1, that wait to be taken: the limit on memory.

    Raises:
        Exception: what `read` raised, when its item is due.
    """
    waiting: deque[Future[ItemT]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
    try:
        for key in keys:
            waiting.append(pool.submit(read, key))
            if len(waiting) > most_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
