import json
from pathlib import Path

import pytest
import torch

import tessera
from tessera.errors import UserError
from tessera.precision import (
    Precision,
    autocast,
    describe_hardware,
    resolve_device,
    resolve_precision,
    usable_memory_bytes,
    versions,
)


@pytest.fixture
def cpu_units(monkeypatch):
    def pretend(*, amx: bool, avx512: bool) -> None:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)

    return pretend


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"),
    [
        (True, True, Precision("bf16", "CPU with AMX")),
        (False, True, Precision("bf16", "CPU with AVX512-BF16")),
        (False, False, Precision("fp32", "no bf16 units in this CPU")),
    ],
)
def test_auto_on_a_cpu_follows_its_units(cpu_units, amx, avx512, expected):
    cpu_units(amx=amx, avx512=avx512)
    assert resolve_precision("auto", "cpu") == expected


@pytest.mark.parametrize(("capability", "name"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_on_a_gpu_follows_its_compute_capability(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    precision = resolve_precision("auto", torch.device("cuda"))
    assert precision.name == name
    assert ("9.0" in precision.reason) == (capability == (9, 0))


def test_auto_on_this_machine_agrees_with_the_processor_flags():
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("no /proc/cpuinfo here")
    flags = set(cpuinfo.read_text().split())
    expected = "bf16" if flags & {"amx_tile", "avx512_bf16"} else "fp32"
    assert resolve_precision("auto", "cpu").name == expected


def test_what_is_asked_for_is_given_and_emulation_is_said(cpu_units):
    cpu_units(amx=False, avx512=False)
    assert resolve_precision("bf16", "cpu") == Precision("bf16", "as asked, emulated here: fp32 is faster")
    cpu_units(amx=True, avx512=False)
    assert resolve_precision("bf16", "cpu").reason == "as asked, CPU with AMX"
    assert resolve_precision("fp32", "cpu") == Precision("fp32", "as asked")


def test_unknown_precision_is_refused():
    with pytest.raises(UserError, match="precision 'fp16' is unknown; use auto, bf16 or fp32"):
        resolve_precision("fp16", "cpu")


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_autocast_computes_products_in_the_chosen_format(name, dtype):
    weight = torch.randn(4, 4)
    with autocast(Precision(name, ""), "cpu"):
        assert (weight @ weight).dtype == dtype
    assert weight.dtype == torch.float32


def test_fp32_holds_inside_an_outer_autocast():
    weight = torch.randn(4, 4)
    with autocast(Precision("bf16", ""), "cpu"), autocast(Precision("fp32", ""), "cpu"):
        assert (weight @ weight).dtype == torch.float32


def test_auto_device_prefers_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:5", "torch sees 1 CUDA GPUs"),
        ("gpu", "device 'gpu' is unknown; use auto, cpu, cuda"),
        ("", "is unknown"),
        ("meta", "device 'meta' is not supported"),
    ],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=message):
        resolve_device(device)


def test_the_description_of_the_machine_is_plain_and_plausible():
    hardware = describe_hardware()
    assert json.loads(json.dumps(hardware)) == hardware
    assert hardware["cpu"]
    assert hardware["cores"] >= 1
    assert 0.1 < hardware["memory_gib"] < 100_000
    assert (hardware["gpu"] is None) == (hardware["gpu_count"] == 0)


def test_a_container_limit_counts_as_the_memory(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("tessera.precision.CGROUP_LIMITS", (tmp_path / "absent", limit))
    limit.write_text("max\n")
    whole = usable_memory_bytes()
    limit.write_text("1000000\n")
    assert usable_memory_bytes() == 1_000_000 < whole


def test_versions_name_what_results_depend_on():
    found = versions()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert {"python", "torch", "numpy", "omegaconf", "safetensors"} <= set(found)
    assert found["tessera"] == tessera.__version__
