"""Reading ahead: the order is kept, and no more is read than may wait."""

import threading
from contextlib import closing

import pytest

from tessera.data.read_ahead import read_ahead


def test_items_come_in_order_whichever_thread_is_first() -> None:
    second_is_read = threading.Event()

    def read(index: int) -> int:
        if index == 0:
            assert second_is_read.wait(timeout=10), "both threads read at once"
        if index == 1:
            second_is_read.set()
        return 10 * index

    assert list(read_ahead(read, range(5), threads=2, most_ahead=3)) == [0, 10, 20, 30, 40]


@pytest.mark.parametrize("threads", [1, 3])
def test_the_next_items_are_read_unasked_and_no_more_than_may_wait(threads: int) -> None:
    is_read = [threading.Event() for _ in range(100)]
    with closing(read_ahead(lambda index: is_read[index].set(), range(100), threads=threads, most_ahead=4)) as items:
        assert not is_read[0].is_set()
        for taken, _ in zip(range(1, 10), items, strict=False):
            assert all(event.wait(timeout=10) for event in is_read[: taken + 4])
            assert not any(event.is_set() for event in is_read[taken + 4 :])
    assert not any(event.is_set() for event in is_read[20:]), "after closing, nothing more is read"


def test_an_error_comes_when_its_item_is_due() -> None:
    def read(index: int) -> int:
        if index == 2:
            raise OSError("damaged")
        return index

    items = read_ahead(read, range(5), threads=2, most_ahead=4)
    assert (next(items), next(items)) == (0, 1)
    with pytest.raises(OSError, match="damaged"):
        next(items)
