"""Training by several processes: torchrun or SLURM starts them, and this finds out how many there are and joins them.

The launcher alone decides: the same configuration runs in one process on a CPU and in 32 on four nodes. Stages do more
than train, they read corpora and write files; `first_goes_ahead` keeps several processes from doing that at once.
"""

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tessera.errors import UserError

ValueT = TypeVar("ValueT")

_FAILED = "the first process has failed"

# The first process may ingest a corpus or decode all its pictures while the others wait.
_TIMEOUT = timedelta(hours=12)


class Processes(NamedTuple):
    """The processes that train together, as seen by one of them."""

    rank: int = 0
    """this process, from 0"""
    world_size: int = 1
    """how many there are"""
    local_rank: int = 0
    """this process among those of its machine, from 0"""
    per_node: int = 1
    """processes on each machine"""
    environment: ClusterEnvironment | None = None
    """Lightning's name for the launcher; None where there is none"""

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and talks to the user."""
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        """Machines."""
        return self.world_size // self.per_node


def read_environment() -> Processes:
    """What the launcher says of itself; nothing is connected.

    Raises:
        UserError: if SLURM spreads its tasks unevenly.
    """
    environment: ClusterEnvironment
    if TorchElasticEnvironment.detect():
        environment = TorchElasticEnvironment()
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", environment.world_size()))
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # by srun, and not in a line beside it
        tasks, nodes = os.environ["SLURM_NTASKS"], os.environ.get("SLURM_NNODES", "1")
        per_node = int(os.environ.get("SLURM_NTASKS_PER_NODE", "0"))
        if per_node * int(nodes) != int(tasks):
            raise UserError(
                f"SLURM gives {tasks} tasks to {nodes} nodes: every node needs as many, say so with --ntasks-per-node"
            )
        # A job that is stopped saves at SIGTERM and goes on when its command runs again: see docs/training.md.
        environment = SLURMEnvironment(auto_requeue=False)
    else:
        return Processes()
    return Processes(
        rank=environment.global_rank(),
        world_size=environment.world_size(),
        local_rank=environment.local_rank(),
        per_node=per_node,
        environment=environment,
    )


def join(device: str) -> Processes:
    """Finds out who trains together, and connects them if they are several; further calls do nothing more.

    Args:
        device: the configured one; processes on GPUs take the one of their local rank.

    Raises:
        UserError: if a device is named that all processes of a machine would share.
    """
    processes = read_environment()
    if processes.world_size == 1:
        return processes
    if device.startswith("cuda:"):
        raise UserError(f"trainer.device={device} is one GPU for {processes.world_size} processes: use cuda or auto")
    on_gpus = device in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpus and processes.per_node > torch.cuda.device_count():
        raise UserError(
            f"{processes.per_node} processes on a machine with {torch.cuda.device_count()} GPUs: start one per GPU, "
            "or use trainer.device=cpu"
        )
    if on_gpus:
        torch.cuda.set_device(processes.local_rank)
    if not distributed.is_initialized():
        environment = processes.environment
        assert environment is not None
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
        # gloo as well beside nccl: what processes agree upon lies in main memory, and must not wait for the GPU
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
            rank=processes.rank,
            world_size=processes.world_size,
            timeout=_TIMEOUT,
        )
        atexit.register(_leave)
    return processes


@contextlib.contextmanager
def first_goes_ahead() -> Iterator[None]:
    """Lets the first process through while the others wait, then them: they find what it has written.

    Every process must come here. A mistake of the user's that the first one finds ends all of them, and is told once.
    """
    if not _are_several():
        yield
    elif distributed.get_rank() == 0:
        try:
            yield
        except UserError:
            gather(True)
            raise
        gather(False)
    else:
        if gather(False)[0]:
            raise SystemExit(2)
        yield


def on_first(function: Callable[[], ValueT]) -> ValueT:
    """Calls a function in the first process and gives its result to all of them, each of which must come here.

    A mistake of the user's that it finds ends all of them, and is told once.
    """
    value = None
    if is_first():
        try:
            value = function()
        except UserError:
            gather(_FAILED)
            raise
    first = gather(value)[0]
    if first == _FAILED:
        raise SystemExit(2)
    return first


def refuse_several(what: str, instead: str) -> None:
    """Raises UserError if a launcher has started several processes of something that is for one."""
    count = read_environment().world_size
    if count > 1:
        raise UserError(f"{what} is for one process and was started in {count}: {instead}")


def is_first() -> bool:
    """Whether this process writes files and talks to the user."""
    return not _are_several() or distributed.get_rank() == 0


def largest(*values: float) -> tuple[float, ...]:
    """The largest that any process has, of each value; in one process the values themselves. Each must ask for it."""
    if not _are_several():
        return values
    shared = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(shared, distributed.ReduceOp.MAX)
    return tuple(shared.tolist())


def gather(value: Any) -> list[Any]:
    """What each process has, in the order of ranks; each must bring something."""
    if not _are_several():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def join_rows(tensor: Tensor) -> Tensor:
    """The rows [n, ...] of all processes as [world size x n, ...], for a loss that compares every row with every other.

    Every process must bring equally many, and gets them in the order of ranks. All processes then compute the same
    loss. Each knows the gradient of its own rows alone, and makes up for the mean over processes that is taken of it
    afterwards.
    """
    if not _are_several():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, tensor.detach().contiguous())
    if tensor.requires_grad:
        own = tensor.detach() + len(parts) * (tensor - tensor.detach())
        parts[distributed.get_rank()] = own
    return torch.cat(parts)


def mean_over_processes(tensor: Tensor) -> Tensor:
    """The mean of a tensor without gradient over all processes, in floating point."""
    if not _are_several():
        return tensor.float()
    mean = tensor.detach().float() / distributed.get_world_size()
    distributed.all_reduce(mean)
    return mean


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may hold a part, as one; every process has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_here(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, in parts like a parameter's, or as it is where that has none."""
    if isinstance(parameter, DTensor):
        # without a source: every process has the tensor, and cuts its part out of it
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor


def whole_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """A state dict whose tensors are whole, in every process."""
    return {name: whole(tensor) for name, tensor in module.state_dict().items()}


def _are_several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
