"""Timing with more and more samples, until it takes long enough or memory ends."""

import time
from collections.abc import Callable

import pytest
import torch

from recipes.estimate_timing import describe_device, seconds_of_update, timed_batch
from tessera.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.estimate_timing._SECONDS", 0.0)
    monkeypatch.setattr("recipes.estimate_timing._ENOUGH_SECONDS", 0.02)


def work_of(seconds_each: float, *, most: int | None = None) -> Callable[[int], Callable[[], None]]:
    def work_on(samples: int) -> Callable[[], None]:
        def work() -> None:
            if most is not None and samples > most:
                raise torch.OutOfMemoryError("too many")
            time.sleep(seconds_each * samples)

        return work

    return work_on


def test_quick_work_is_timed_with_many_samples() -> None:
    timed = timed_batch(work_of(0.001), CPU, most=1000, sample="picture")
    assert 8 <= timed.size < 1000, "until it takes 0.02 s"
    assert timed.seconds >= 0.001 * timed.size


def test_slow_work_is_timed_with_one_sample() -> None:
    assert timed_batch(work_of(0.03), CPU, most=1000, sample="picture").size == 1


def test_no_more_samples_are_taken_than_asked_for() -> None:
    assert timed_batch(work_of(0.0), CPU, most=5, sample="picture").size == 5


def test_the_memory_ends_it() -> None:
    assert 1 <= timed_batch(work_of(0.0, most=3), CPU, most=64, sample="picture").size <= 3
    with pytest.raises(UserError, match="not even one picture"):
        timed_batch(work_of(0.0, most=0), CPU, most=64, sample="picture")


def test_an_update_gives_an_optimizer_its_state_even_without_gradients() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    assert seconds_of_update(optimizer, CPU, clip_norm=None) > 0
    assert optimizer.state[weight]["exp_avg"].shape == (3,)


@pytest.mark.parametrize("clip_norm, moved", [(1.0, 1.0), (None, 100.0)])
def test_an_update_clips_gradients_first(clip_norm: float | None, moved: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.full((1,), 100.0)
    seconds_of_update(torch.optim.SGD([weight], lr=1.0), CPU, clip_norm=clip_norm)
    assert weight.item() == pytest.approx(-2 * moved), "two updates, the first of which warms up"


def test_a_device_is_named_for_people() -> None:
    assert describe_device(CPU).endswith("cores")
