"""Every shipped kernel compiles for GPUs that are not there, and the checks of what came out can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from transformer.kernels.launch_config import Format, KernelName, LaunchConfig
from transformer.masks import AttentionMask

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
ROW = AttentionMask(kind="row", text_len=256, grid_height=32, grid_width=32)

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from transformer.kernels.ahead_of_time import (  # noqa: E402 -- after the checks that it can be imported
    SHARED_BYTES,
    Build,
    Compiled,
    compile_build,
    one_mask_each,
    problems,
    shipped,
)

SOUND = Compiled(
    registers=128, stack_bytes=0, spills=0, shared_bytes=65536, tensor_core_instructions=8, asynchronous_copies=8
)


def build_of(kernel: KernelName, config: LaunchConfig, number_format: Format = "half") -> Build:
    return Build(kernel, ROW, config, head_dim=64, number_format=number_format, capability=(9, 0))


@pytest.mark.slow
def test_every_shipped_kernel_compiles_without_spills_for_every_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.kernel_aot", "--quick", "--out", str(tmp_path / "aot.json")]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "aot.json").read_text())
    assert len(result["raw"]) == len(one_mask_each(shipped()))
    assert {name.split()[0] for name in result["raw"]} == {"sm_80", "sm_90"}
    for name, compiled in result["raw"].items():
        assert compiled["spills"] == compiled["stack_bytes"] == 0, name
        assert compiled["asynchronous_copies"] > 0, name
        assert compiled["tensor_core_instructions"] > 0 or " float32 " in name, name


def test_all_kernels_formats_and_gpus_are_shipped() -> None:
    builds = shipped()
    for kernel in get_args(KernelName):
        for number_format in get_args(Format):
            for capability in SHARED_BYTES:
                chosen = [build for build in builds if build[0] == kernel and build[4:6] == (number_format, capability)]
                assert {32, 64, 128} <= {build.head_dim for build in chosen}
                assert {build.group for build in chosen} == ({1, 4} if kernel == "key_value_gradient" else {1})
    assert len(set(builds)) == len(builds)


def test_the_quick_selection_leaves_no_configuration_out() -> None:
    def rows(builds: list[Build]) -> set[Build]:
        return {build._replace(mask=ROW) for build in builds}

    assert rows(one_mask_each(shipped())) == rows(shipped())
    assert len(one_mask_each(shipped())) == len(rows(shipped()))


def test_a_kernel_that_spills_is_caught() -> None:
    compiled = compile_build(build_of("key_value_gradient", LaunchConfig(128, 64, 8, 3)))
    assert compiled.spills > 0
    assert any(
        "spills registers" in problem for problem in problems(build_of("forward", LaunchConfig(16, 16, 4, 1)), compiled)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills": 3}, "spills registers: 0 bytes of stack, 3 instructions"),
        ({"stack_bytes": 16}, "spills registers: 16 bytes of stack"),
        ({"shared_bytes": 300_000}, "takes 300000 bytes of shared memory, the GPU has 232448"),
        ({"tensor_core_instructions": 0}, "has no tensor core instructions"),
        ({"asynchronous_copies": 0}, "has no asynchronous copies"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_fault_is_named(change: dict[str, int], message: str) -> None:
    build = build_of("forward", LaunchConfig(64, 64, 4, 3))
    assert problems(build, SOUND) == []
    (problem,) = problems(build, SOUND._replace(**change))
    assert problem.startswith(message)


def test_float32_needs_no_tensor_cores() -> None:
    build = build_of("forward", LaunchConfig(16, 32, 4, 2), "float32")
    assert problems(build, SOUND._replace(tensor_core_instructions=0)) == []
