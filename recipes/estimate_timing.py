"""The time of work here: with as many samples at once as a short budget allows, for larger batches are faster."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from recipes.speed import median_seconds
from tessera.errors import UserError
from tessera.precision import describe_hardware

_SECONDS = 3.0  # for each thing that is timed
_ENOUGH_SECONDS = 0.5  # work that takes so long is not timed with more samples


class TimedBatch(NamedTuple):
    """The seconds that work on so many samples at once takes."""

    size: int
    seconds: float


def timed_batch(
    work_on: Callable[[int], Callable[[], object]], device: torch.device, *, most: int, sample: str
) -> TimedBatch:
    """Times work on one sample, then on more and more, until it takes long enough or memory ends.

    Args:
        work_on: makes the work on so many samples.
        device: where the work is done.
        most: samples at once, >= 1.
        sample: what one is called, for people.

    Raises:
        UserError: if the memory is too small for a single sample.
    """
    timed = TimedBatch(0, 0.0)
    while timed.size < most and (not timed.size or timed.seconds < _ENOUGH_SECONDS):
        wanted = max(2 * timed.size, int(timed.size * _ENOUGH_SECONDS / timed.seconds / 2)) if timed.size else 1
        wanted = min(most, wanted)
        try:
            timed = TimedBatch(wanted, seconds_of(work_on(wanted), device))
        except torch.OutOfMemoryError:
            if not timed.size:
                raise UserError(f"not even one {sample} of this size can be trained on with {device}") from None
            break  # what was measured with fewer samples has to do
    return timed


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """The median time of a call, within the budget that everything here has."""
    return median_seconds(work, device, budget=_SECONDS)


def seconds_of_update(optimizer: torch.optim.Optimizer, device: torch.device, *, clip_norm: float | None) -> float:
    """The time of clipping gradients and updating weights, in which an optimizer gets all the state that it keeps."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        if parameter.grad is None:  # after a pass for which the memory was too small
            parameter.grad = torch.zeros_like(parameter)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, math.inf if clip_norm is None else clip_norm)
        optimizer.step()

    return seconds_of(update, device)


def describe_device(device: torch.device) -> str:
    """The name of what computes, for people."""
    hardware = describe_hardware()
    return hardware["gpu"] if device.type == "cuda" else f"{hardware['cpu']}, {hardware['cores']} cores"
