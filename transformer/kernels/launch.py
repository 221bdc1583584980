"""What every launch of a sparse kernel needs: block sizes, the schedule on the device, and compile-time constants."""

import os
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transformer.kernels import rule
from transformer.kernels.launch_config import (
    Format,
    KernelName,
    LaunchConfig,
    launch_config,
    number_format,
    padded_head_dim,
    text_parts,
)
from transformer.kernels.schedule import Schedule, key_schedule, query_schedule
from transformer.masks import AttentionMask

LOG2_E = 1.4426950408889634

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read where Triton reads it: when kernels are defined


class Launch(NamedTuple):
    """Arguments of one launch.

    Attributes:
        tiles: programs per batch entry and head.
        table: int32 [tiles, COLUMNS] on the device.
        entries: int32 [entries] on the device.
        parts: rows into which each text tile of the key-value gradient is split.
        constants: the kernel's compile-time constants.
        options: the compiler's options.
    """

    tiles: int
    table: Tensor
    entries: Tensor
    parts: int
    constants: dict[str, Any]
    options: dict[str, Any]


def prepare(kernel: KernelName, query: Tensor, key: Tensor, mask: AttentionMask, config: LaunchConfig | None) -> Launch:
    """Collects what a launch over query [B, H, N, D] and key [B, Hkv, N, D] needs; all but the tensors is cached."""
    head_dim = query.shape[3]
    gpu = gpu_of(query)
    config = config or config_of(kernel, query, mask, group=query.shape[1] // key.shape[1])
    parts = 1
    if kernel == "key_value_gradient":
        batch_heads = key.shape[0] * key.shape[1]
        parts = text_parts(batch_heads, text_len=mask.text_len, block_k=config.block_k, processors=gpu.processors)
    table, entries, schedule = _schedule_on(query.device, kernel, mask, query.shape[2], config, parts)
    constants = {
        **rule.constants(mask),
        **compile_constants(head_dim, number_format(query.dtype), config),
        # the interpreter computes on bf16's bits as if they were integers
        "UPCAST": INTERPRETED and query.dtype == torch.bfloat16,
        "GROUP": query.shape[1] // key.shape[1],
        "LISTED": schedule.is_listed,
        "TILE_WIDTH": schedule.tile_width,
        "WINDOW_WIDTH": schedule.window_width,
    }
    return Launch(len(schedule.table), table, entries, parts, constants, compile_options(config))


class GPU(NamedTuple):
    """What launches depend on."""

    capability: tuple[int, int]
    processors: int


def gpu_of(tensor: Tensor) -> GPU:
    """The GPU of a tensor; for the interpreter's CPU tensors one with a single processor."""
    if tensor.device.type != "cuda":
        return GPU((9, 0), 1)
    properties = torch.cuda.get_device_properties(tensor.device)
    return GPU((properties.major, properties.minor), properties.multi_processor_count)


def config_of(kernel: KernelName, query: Tensor, mask: AttentionMask, *, group: int = 1) -> LaunchConfig:
    """The block sizes for queries [B, H, N, D] on their GPU."""
    return launch_config(
        kernel,
        head_dim=query.shape[3],
        number_format=number_format(query.dtype),
        capability=gpu_of(query).capability,
        text_len=mask.text_len,
        group=group,
    )


def compile_constants(head_dim: int, products: Format, config: LaunchConfig) -> dict[str, Any]:
    """The constants that follow from head width, number format and block sizes."""
    return {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_head_dim(head_dim),
        "BLOCK_Q": config.block_q,
        "BLOCK_K": config.block_k,
        "PRECISION": "tf32" if products == "tf32" else "ieee",  # of no effect on half precision
        "UPCAST": False,
    }


def compile_options(config: LaunchConfig) -> dict[str, Any]:
    """The compiler's options; fused multiply-adds are asked for by name, as their default is about to change."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


def strides_of(*tensors: Tensor) -> list[int]:
    """Strides in elements of batch, head and position, tensor by tensor."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


@cache  # a few KB each; a CUDA graph may hold on to any of them
def _schedule_on(
    device: torch.device, kernel: KernelName, mask: AttentionMask, length: int, config: LaunchConfig, parts: int
) -> tuple[Tensor, Tensor, Schedule]:
    if kernel == "key_value_gradient":
        schedule = key_schedule(mask, length, block_q=config.block_q, block_k=config.block_k, parts=parts)
    else:
        schedule = query_schedule(mask, length, block_q=config.block_q, block_k=config.block_k)
    return torch.from_numpy(schedule.table).to(device), torch.from_numpy(schedule.entries).to(device), schedule
