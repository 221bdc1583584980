"""Which device and which number format to compute in, why, and what the machine is.

bf16 pays where the hardware multiplies it: CUDA GPUs from compute capability 8.0, CPUs with AMX tiles, and CPUs with
AVX512-BF16 (400 against 120 GFLOP/s in fp32 for large matrices on two cores of an EPYC 9004). Elsewhere it is emulated
and slower than fp32.
"""

import contextlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

import tessera
from tessera.errors import UserError

PrecisionName = Literal["bf16", "fp32"]

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

_PACKAGES = ["torch", "torchvision", "triton", "lightning", "sentencepiece", "omegaconf", "safetensors"]
_PACKAGES += ["numpy", "pillow"]


class Precision(NamedTuple):
    """The number format of matrix products and convolutions; weights and optimizer state stay fp32."""

    name: PrecisionName
    reason: str  # one phrase for the user


def resolve_device(device: str = "auto") -> torch.device:
    """Chooses the device to compute on.

    Args:
        device: `auto` (the first CUDA GPU, else the CPU), or torch's name for one: `cpu`, `cuda`, `cuda:1`, `mps`.

    Raises:
        UserError: for an unknown name, or a device that this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device {device!r} is unknown; use auto, cpu, cuda, cuda:N or mps") from error
    if chosen.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (chosen.index or 0) >= count:
            raise UserError(f"device {device!r} is not there: torch sees {count} CUDA GPUs; use auto or cpu")
    elif chosen.type == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device 'mps' is not there: torch sees no Apple GPU; use auto or cpu")
    elif chosen.type != "cpu":
        raise UserError(f"device {device!r} is not supported; use auto, cpu, cuda, cuda:N or mps")
    return chosen


def resolve_precision(precision: str = "auto", device: torch.device | str = "cpu") -> Precision:
    """Chooses the number format for a device.

    Args:
        precision: `bf16`, `fp32`, or `auto`: bf16 where the hardware multiplies it, else fp32.
        device: where the computation will run.

    Returns:
        The format and the reason for it, e.g. `Precision("fp32", "this CPU has no bf16 units")`.

    Raises:
        UserError: for another name.
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"precision {precision!r} is unknown; use auto, bf16 or fp32")
    units = _bf16_units(torch.device(device))
    if precision == "fp32":
        return Precision("fp32", "as asked")
    if precision == "bf16":
        return Precision("bf16", f"as asked, {units}" if units else "as asked, emulated here: fp32 is faster")
    if units:
        return Precision("bf16", units)
    return Precision("fp32", f"no bf16 units in this {'CPU' if torch.device(device).type == 'cpu' else 'GPU'}")


def autocast(precision: Precision, device: torch.device | str) -> contextlib.AbstractContextManager[Any]:
    """A context in which matrix products and convolutions run in the chosen format."""
    kind = torch.device(device).type
    if precision.name == "fp32":
        # Not nullcontext: an outer autocast must not reach code that asked for fp32.
        return torch.autocast(kind, enabled=False)
    return torch.autocast(kind, dtype=torch.bfloat16)


def describe_hardware() -> dict[str, Any]:
    """Describes this machine in plain values for reports and model cards.

    Returns:
        `cpu` name, `cores` that this process may use, `memory_gib` that it may use, `bf16` units of the CPU or None,
        `gpu` name or None, `gpu_count`, `gpu_memory_gib` of one GPU or None, `system`.
    """
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "memory_gib": round(usable_memory_bytes() / 2**30, 1),
        "bf16": _bf16_units(torch.device("cpu")),
        "gpu": gpu.name if gpu else None,
        "gpu_count": torch.cuda.device_count(),
        "gpu_memory_gib": round(gpu.total_memory / 2**30, 1) if gpu else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of Python, CUDA (where torch has it) and the packages that results depend on."""
    found = {"tessera": tessera.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def usable_cores() -> int:
    """How many CPU cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_memory_bytes() -> int:
    """How much main memory this process may take: the machine's, or less inside a container with a limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * 2**30
    for limit_file in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            total = min(total, int(limit_file.read_text()))
    return total


def _bf16_units(device: torch.device) -> str | None:
    """What multiplies bf16 on a device, or None where it would be emulated."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"GPU of compute capability {major}.{minor}" if (major, minor) >= (8, 0) else None
    if device.type == "cpu":
        # torch offers no public query on every version that we support.
        if torch.cpu._is_amx_tile_supported():
            return "CPU with AMX"
        if torch.cpu._is_avx512_bf16_supported():
            return "CPU with AVX512-BF16"
    return None


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
