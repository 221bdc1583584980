"""Batches in keyed order: the same stream whatever the number of workers, and from any step on."""

import itertools
import os
import signal
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tessera.data.order import SampleKey, sample_keys

Batch = dict[str, Tensor]

_DRAWN_AT_ONCE = 1024

# Tensors of a batch go from process to process in shared memory, of which each costs a connection between the two.
_SENT_BY_VALUE_BYTES = 2**18


class BatchSource(Protocol):
    """Turns draws into tensors. A batch is a function of its keys alone."""

    def __len__(self) -> int: ...

    def batch(self, keys: Sequence[SampleKey]) -> Batch:
        """The tensors of these draws, batch first."""
        ...


class KeyedLoader:
    """An endless iterable of batches, beginning at `start_step`.

    Args:
        source: what turns keys into tensors.
        batch_size: draws per step over all ranks; must be a multiple of `world_size` x `accumulate`.
        seed: keys the order and every draw.
        start_step: optimizer steps already done; iteration continues with the batch after them.
        rank: this process's place among `world_size` processes that share each batch.
        world_size: number of processes.
        accumulate: parts into which a process cuts its share of a batch; they come one after the other.
        num_workers: loading processes; 0 loads in the training process.

    Raises:
        ValueError: if the source is empty or the batch cannot be shared evenly.
    """

    def __init__(
        self,
        source: BatchSource,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        num_workers: int = 0,
    ) -> None:
        if len(source) == 0:
            raise ValueError("cannot load batches from an empty source")
        if batch_size < 1 or batch_size % (world_size * accumulate):
            raise ValueError(
                f"batch_size must be a positive multiple of {world_size} processes x {accumulate} parts; "
                f"got {batch_size}"
            )
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.start_step, self.rank, self.world_size, self.num_workers = start_step, rank, world_size, num_workers
        self.accumulate = accumulate
        self.waited_seconds = 0.0
        """for how long whoever iterates has waited for batches"""

    def parts(self) -> Iterator[list[SampleKey]]:
        """The draws of one batch after the other, without end."""
        at_once = max(1, _DRAWN_AT_ONCE // self.batch_size)  # steps; drawing takes as long for many as for one
        for first in itertools.count(self.start_step, at_once):
            keys = sample_keys(
                first * self.batch_size, at_once * self.batch_size, size=len(self.source), seed=self.seed
            )
            for begin in range(self.rank, len(keys), self.batch_size):
                of_rank = keys[begin : begin - self.rank + self.batch_size : self.world_size]
                for part in range(self.accumulate):
                    yield of_rank[part :: self.accumulate]

    def __iter__(self) -> Iterator[Batch]:
        batches = self._made_here() if self.num_workers == 0 else self._made_by_workers()
        while True:
            began = time.monotonic()
            batch = next(batches)
            self.waited_seconds += time.monotonic() - began
            yield batch

    def _made_here(self) -> Iterator[Batch]:
        for keys in self.parts():
            yield self.source.batch(keys)

    def _made_by_workers(self) -> Iterator[Batch]:
        loader = DataLoader(
            _BatchDataset(self.source),
            sampler=_PartSampler(self),
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=4,
            worker_init_fn=_leave_signals_to_training,
            collate_fn=_small_by_value,  # type: ignore[arg-type]
            generator=torch.Generator(),  # or beginning would draw from the generator that training draws from
        )
        for received in loader:
            yield {name: torch.as_tensor(value) for name, value in received.items()}


def _small_by_value(batch: Batch) -> dict[str, Tensor | NDArray[np.generic]]:
    """What a worker sends: arrays are pickled."""
    return {name: tensor if tensor.nbytes > _SENT_BY_VALUE_BYTES else tensor.numpy() for name, tensor in batch.items()}


def _leave_signals_to_training(worker: int) -> None:
    """Terminals and launchers send signals to all processes: the one that trains ends its step and saves, with these.

    The second SIGTERM counts, for that is how Python ends processes that are left over when it exits.
    """

    def ignore_once(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, end)

    def end(number: int, frame: FrameType | None) -> None:
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, ignore_once)


class _PartSampler(Sampler[list[SampleKey]]):
    """Yields the keys of one batch after the other, so that a worker receives whole batches."""

    def __init__(self, loader: KeyedLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return self.loader.parts()


class _BatchDataset(Dataset[Batch]):
    def __init__(self, source: BatchSource) -> None:
        self.source = source

    def __getitem__(self, keys: Sequence[SampleKey]) -> Batch:
        return self.source.batch(keys)
