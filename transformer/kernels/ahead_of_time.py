"""Compiling the kernels for GPUs that are not there, and reading what the compiler made of them.

Triton's wheel brings NVIDIA's assembler and disassembler, so that registers, spills, shared memory and instructions of
every shipped configuration can be checked on any machine. Only timing needs the GPU.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, get_args

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from transformer.kernels import backward, decode, forward, int8_linear, rule
from transformer.kernels.launch import compile_constants, compile_options
from transformer.kernels.launch_config import Format, KernelName, LaunchConfig, launch_config
from transformer.kernels.schedule import key_schedule, query_schedule
from transformer.masks import AttentionMask

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_FLOAT32_TENSORS = ("logsumexp", "delta", "part_key", "part_value", "part_mean", "part_peak", "part_total", "scales")
_INT32_TENSORS = ("table", "entries", "position")
_ANY_COUNTS = ("length", "tiles", "heads", "key_heads", "rows")
_COUNTS_OF_16 = ("channels", "inputs")
_WARP = 32

# Bytes of shared memory that one program may take. The table for 8.0 also serves 8.6 and 8.9, which have less.
SHARED_BYTES = {(8, 0): 99 * 1024, (9, 0): 227 * 1024}

_ROW = AttentionMask(kind="row", text_len=256, grid_height=32, grid_width=32)
_COLUMN = AttentionMask(kind="column", text_len=256, grid_height=32, grid_width=32)
_CONV = AttentionMask(kind="conv", text_len=256, grid_height=32, grid_width=32)
_HALO = AttentionMask(kind="conv", conv_mode="clip", text_len=256, grid_height=64, grid_width=64)
_LISTED = AttentionMask(kind="conv", conv_mode="torus", text_len=256, grid_height=32, grid_width=32)


class Build(NamedTuple):
    """One kernel as it is compiled for one GPU.

    Attributes:
        kernel: which kernel.
        mask: the mask, which is compiled in.
        config: block sizes.
        head_dim: D.
        number_format: of the products.
        capability: the GPU's compute capability.
        group: queries' heads per head of keys and values.
    """

    kernel: KernelName
    mask: AttentionMask
    config: LaunchConfig
    head_dim: int
    number_format: Format
    capability: tuple[int, int]
    group: int = 1


class LinearBuild(NamedTuple):
    """The product with an int8 weight as it is compiled for one GPU.

    Attributes:
        rows: R.
        number_format: of the products.
        capability: the GPU's compute capability.
    """

    rows: int
    number_format: Format
    capability: tuple[int, int]


class Compiled(NamedTuple):
    """What the compiler made of a kernel.

    Attributes:
        registers: per thread.
        stack_bytes: per thread; above 0 where registers did not suffice.
        spills: instructions that store to or load from local memory.
        shared_bytes: per program.
        tensor_core_instructions: HGMMA and HMMA.
        asynchronous_copies: from global to shared memory, past the registers.
    """

    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    tensor_core_instructions: int
    asynchronous_copies: int


def shipped() -> list[Build]:
    """Every row of the tables in `launch_config`, with the masks that ask most of the compiler.

    Half precision with heads of 64 is compiled for every kind of mask, the rest for those with rectangular windows;
    gradients of keys and values for grouped queries, too; and half precision once with heads that are padded.
    """
    builds = []
    for capability in SHARED_BYTES:
        for number_format in get_args(Format):
            for head_dim in (32, 64, 128):
                masks = [_HALO]
                if number_format == "half":
                    masks = [_ROW, _COLUMN, _CONV, _HALO, _LISTED] if head_dim == 64 else [_COLUMN, _HALO]
                for kernel in get_args(KernelName):
                    for mask in masks:
                        builds += _rows(kernel, mask, head_dim, number_format, capability)
                builds += _rows("key_value_gradient", _HALO, head_dim, number_format, capability, group=4)
        for kernel in get_args(KernelName):
            builds += _rows(kernel, _COLUMN, 96, "half", capability)
    return builds


def shipped_linear() -> list[LinearBuild]:
    """Every row of the table in `int8_linear`, for few rows and for many."""
    return [
        LinearBuild(rows, number_format, capability)
        for capability in SHARED_BYTES
        for number_format in get_args(Format)
        for rows in (8, 16)
    ]


def one_mask_each(builds: list[Build]) -> list[Build]:
    """Every row of the tables once, with the mask that asks most of the compiler: tiles of the grid with a margin."""
    chosen: dict[Build, Build] = {}
    for build in builds:
        row = build._replace(mask=_ROW)
        if row not in chosen or build.mask == _HALO:
            chosen[row] = build
    return list(chosen.values())


def _rows(
    kernel: KernelName,
    mask: AttentionMask,
    head_dim: int,
    number_format: Format,
    capability: tuple[int, int],
    group: int = 1,
) -> list[Build]:
    """The builds of one launch: short and long text may have rows of their own."""
    configs = {
        launch_config(
            kernel,
            head_dim=head_dim,
            number_format=number_format,
            capability=capability,
            text_len=text_len,
            group=group,
        )
        for text_len in (64, 256)
    }
    return [Build(kernel, mask, config, head_dim, number_format, capability, group) for config in sorted(configs)]


def problems(build: Build | LinearBuild, compiled: Compiled) -> list[str]:
    """What is wrong with a compiled kernel, in words; empty where nothing is."""
    found = []
    if compiled.stack_bytes or compiled.spills:
        found.append(f"spills registers: {compiled.stack_bytes} bytes of stack, {compiled.spills} instructions")
    limit = SHARED_BYTES[build.capability]
    if compiled.shared_bytes > limit:
        found.append(f"takes {compiled.shared_bytes} bytes of shared memory, the GPU has {limit}")
    if compiled.tensor_core_instructions == 0 and build.number_format != "float32":
        found.append("has no tensor core instructions")
    if compiled.asynchronous_copies == 0:
        found.append("has no asynchronous copies")
    return found


def compile_build(build: Build) -> Compiled:
    """Compiles a kernel, without a GPU.

    Strides count as divisible by 16, as those of heads of 16 channels or more are: asynchronous copies depend on it.
    """
    function = {
        "forward": forward.forward_kernel,
        "query_gradient": backward.query_gradient_kernel,
        "key_value_gradient": backward.key_value_gradient_kernel,
        "decode": decode.decode_kernel,
    }[build.kernel]
    mask, config = build.mask, build.config
    constants: dict[str, Any] = {
        **rule.constants(mask),
        **compile_constants(build.head_dim, build.number_format, config),
        "GROUP": build.group,
        "PARTS": 2,  # with the code for split tiles and for whole ones
    }
    if build.kernel == "decode":
        constants |= decode.constants(mask, config, build.group, splits=2)
    else:
        build_schedule = key_schedule if build.kernel == "key_value_gradient" else query_schedule
        schedule = build_schedule(mask, mask.seq_len, block_q=config.block_q, block_k=config.block_k)
        constants |= {
            "LISTED": schedule.is_listed,
            "TILE_WIDTH": schedule.tile_width,
            "WINDOW_WIDTH": schedule.window_width,
        }
    names: list[str] = function.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    return _compile(function, constants, build.number_format, build.capability, compile_options(config))


def compile_linear_build(build: LinearBuild) -> Compiled:
    """Compiles the product with an int8 weight, without a GPU, for channels that are multiples of 16."""
    constants = int8_linear.constants(build.rows, build.number_format)
    options = int8_linear.options(build.number_format)
    return _compile(int8_linear.int8_linear_kernel, constants, build.number_format, build.capability, options)


def _compile(
    function: Any,
    constants: dict[str, Any],
    number_format: Format,
    capability: tuple[int, int],
    options: dict[str, Any],
) -> Compiled:
    names: list[str] = function.arg_names
    tensor = "*bf16" if number_format == "half" else "*fp32"
    signature = {name: "constexpr" if name in constants else _type_of(name, tensor) for name in names}
    aligned = [
        place
        for place, name in enumerate(names)
        if signature[name] not in ("constexpr", "fp32") and name not in _ANY_COUNTS
    ]
    source = ASTSource(
        function,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place in aligned},
    )
    major, minor = capability
    compiled = triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, _WARP), options=options)
    return _read(compiled)


def _type_of(argument: str, tensor: str) -> str:
    if argument in _FLOAT32_TENSORS:
        return "*fp32"
    if argument in _INT32_TENSORS:
        return "*i32"
    if argument == "weight":
        return "*i8"
    if argument.startswith("scale"):
        return "fp32"
    is_count = argument in _ANY_COUNTS + _COUNTS_OF_16
    is_stride = argument.endswith(("_batch", "_head", "_position", "_slot", "_row"))
    return "i32" if is_count or is_stride else tensor


def _read(compiled: Any) -> Compiled:
    """Asks NVIDIA's tools about the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Compiled(
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared_bytes=compiled.metadata.shared,
        tensor_core_instructions=len(re.findall(r"\b(?:HGMMA|HMMA)\b", code)),
        asynchronous_copies=len(re.findall(r"\b(?:LDGSTS|UTMALDG)\b", code)),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *arguments], check=True, capture_output=True, text=True).stdout
