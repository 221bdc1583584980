"""Batches: the same stream for any number of workers and ranks, and from any step on."""

import os
import signal
import time
from collections.abc import Sequence
from itertools import islice
from multiprocessing import active_children

import pytest
import torch

from tessera.data.loader import KeyedLoader
from tessera.data.order import SampleKey, sample_keys


class Numbers:
    """A source whose batches show which draws they were made of."""

    def __len__(self) -> int:
        return 10

    def batch(self, keys: Sequence[SampleKey]) -> dict[str, torch.Tensor]:
        return {"index": torch.tensor([key.index for key in keys]), "seed": torch.tensor([key.seed for key in keys])}


def first_batches(count: int, **options: int) -> list[list[int]]:
    loader = KeyedLoader(Numbers(), batch_size=4, seed=0, **options)
    return [batch["seed"].tolist() for batch in islice(loader, count)]


def test_an_epoch_visits_every_sample_once() -> None:
    loader = KeyedLoader(Numbers(), batch_size=5, seed=0)
    seen = torch.cat([batch["index"] for batch in islice(loader, 2)])
    assert sorted(seen.tolist()) == list(range(10))


def test_a_resumed_loader_continues_the_stream() -> None:
    assert first_batches(4, start_step=3) == first_batches(7)[3:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # on a machine of two cores
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_workers_do_not_change_the_stream(num_workers: int) -> None:
    assert first_batches(5, num_workers=num_workers) == first_batches(5)


def test_every_step_has_the_draws_of_its_own_number() -> None:
    # more steps than are drawn at once, and from the middle
    drawn = first_batches(600, start_step=100, accumulate=2)
    for step, (first, second) in enumerate(zip(drawn[::2], drawn[1::2], strict=True), start=100):
        expected = [key.seed for key in sample_keys(4 * step, 4, size=10, seed=0)]
        assert [first[0], second[0], first[1], second[1]] == expected


def test_a_signal_to_all_processes_is_left_to_the_one_that_trains() -> None:
    stream = iter(KeyedLoader(Numbers(), batch_size=4, seed=0, num_workers=2))
    received = [next(stream), next(stream)]  # from each of the workers
    for worker in active_children():
        os.kill(worker.pid or 0, signal.SIGTERM)
        os.kill(worker.pid or 0, signal.SIGINT)
    received += islice(stream, 18)
    assert [batch["seed"].tolist() for batch in received] == first_batches(20)
    workers = active_children()
    assert len(workers) == 2
    for worker in workers:
        worker.terminate()  # as Python does when it exits
        worker.join(10)
    assert [worker.exitcode for worker in workers] == [0, 0]


class Tables:
    """A source of batches with one small and one large tensor."""

    def __len__(self) -> int:
        return 10

    def batch(self, keys: Sequence[SampleKey]) -> dict[str, torch.Tensor]:
        indices = torch.tensor([key.index for key in keys])
        return {"index": indices, "table": indices.to(torch.float16)[:, None].expand(-1, 2**17).contiguous()}


def test_batches_of_workers_are_tensors_of_their_own_however_large() -> None:
    here = next(iter(KeyedLoader(Tables(), batch_size=4, seed=0)))
    received = next(iter(KeyedLoader(Tables(), batch_size=4, seed=0, num_workers=1)))
    for name, tensor in received.items():
        assert tensor.dtype == here[name].dtype and torch.equal(tensor, here[name])
        tensor.add_(1)  # writable


def test_time_spent_waiting_for_batches_is_counted() -> None:
    class Slow(Numbers):
        def batch(self, keys: Sequence[SampleKey]) -> dict[str, torch.Tensor]:
            time.sleep(0.01)
            return super().batch(keys)

    loader = KeyedLoader(Slow(), batch_size=4, seed=0)
    for _ in islice(loader, 3):
        waited = loader.waited_seconds
        time.sleep(0.01)  # the consumer's own time
        assert loader.waited_seconds == waited
    assert loader.waited_seconds >= 0.03


def test_ranks_share_each_batch() -> None:
    whole = first_batches(3)
    parts = [first_batches(3, rank=rank, world_size=2) for rank in range(2)]
    for step in range(3):
        assert sorted(parts[0][step] + parts[1][step]) == sorted(whole[step])


def test_an_uneven_share_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 3 processes x 1 parts; got 4"):
        KeyedLoader(Numbers(), batch_size=4, seed=0, world_size=3)
