"""Several processes train like one: the same gradients, losses, weights and order of samples, and one run folder."""

import multiprocessing
import runpy
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.errors import UserError
from tessera.training.processes import join, refuse_several

SCRIPT = Path(__file__).with_name("one_process.py")


@pytest.fixture(scope="module")
def server() -> Any:
    """Forks processes from one that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dvae.train", "scorer.train", "transformer.train"])
    return context


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launched(rank: int, world_size: int, port: int, *, launcher: str) -> dict[str, str]:
    """What a launcher sets in the environment of a process."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if launcher == "slurm":
        return {
            **address,
            "SLURM_NTASKS": str(world_size),
            "SLURM_STEP_NUM_TASKS": str(world_size),
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": "0",
            "SLURM_NNODES": "1",
            "SLURM_NTASKS_PER_NODE": str(world_size),
            "SLURM_JOB_NAME": "tessera",
            "SLURM_JOB_ID": "1",
        }
    return {
        **address,
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }


def run(
    server: Any, tmp_path: Path, world_size: int, scenario: str, *, launcher: str = "torchrun", **options: Any
) -> list[Any]:
    """What each of several processes has to say of a scenario of one_process.py."""
    port = free_port()
    outs = [tmp_path / f"{scenario}-{world_size}-{port}-{rank}.pt" for rank in range(world_size)]
    started = []
    for rank, out in enumerate(outs):
        environment = launched(rank, world_size, port, launcher=launcher) if world_size > 1 else {}
        given = {"environment": environment, "scenario": scenario, "options": options, "out": str(out)}
        started.append(server.Process(target=runpy.run_path, args=(str(SCRIPT), given, "__main__")))
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=120)
        assert process.exitcode == 0
    return [torch.load(out, weights_only=True) for out in outs]


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


def check_equal(found: list[Any], expected: Any) -> None:
    for one in found:
        assert one["losses"] == pytest.approx(expected["losses"], abs=1e-6)
        for gradients, those in zip(one["gradients"], expected["gradients"], strict=True):
            assert largest_difference(gradients, those) < 1e-6
        # The first steps of Adam divide gradients by their own size: of the smallest, rounding turns the sign.
        assert largest_difference(one["weights"], expected["weights"]) < 2e-5


SHARED = {"max_steps": 6, "batch_size": 8, "checkpoint_every_steps": 4}


@pytest.mark.parametrize("stage", ["prior", "prior, checkpointed", "fsq", "scorer"])
def test_two_processes_make_the_steps_of_one(server: Any, tmp_path: Path, stage: str) -> None:
    (expected,) = run(server, tmp_path, 1, "train", stage=stage, run_dir=str(tmp_path / "one"), **SHARED)
    found = run(server, tmp_path, 2, "train", stage=stage, run_dir=str(tmp_path / "two"), **SHARED)
    check_equal(found, expected)


def test_processes_keep_one_codebook(server: Any, tmp_path: Path) -> None:
    """Its first codes are drawn among the latents of all of them."""
    first, second = run(server, tmp_path, 2, "train", stage="vq", run_dir=str(tmp_path / "two"), **SHARED)
    assert first["losses"] == second["losses"]
    assert largest_difference(first["weights"], second["weights"]) == 0


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_that_hold_parts_of_the_weights_make_the_steps_of_one(
    server: Any, tmp_path: Path, world_size: int
) -> None:
    (expected,) = run(server, tmp_path, 1, "train", stage="prior", run_dir=str(tmp_path / "one"), **SHARED)
    options = {**SHARED, "strategy": "fsdp", "checkpoint_activations": True}
    found = run(server, tmp_path, world_size, "train", stage="prior", run_dir=str(tmp_path / "all"), **options)
    check_equal(found, expected)


def test_processes_accumulate_parts_of_a_batch(server: Any, tmp_path: Path) -> None:
    (expected,) = run(server, tmp_path, 1, "train", stage="prior", run_dir=str(tmp_path / "one"), **SHARED)
    found = run(server, tmp_path, 2, "train", stage="prior", run_dir=str(tmp_path / "two"), accumulate=2, **SHARED)
    for one in found:
        losses = one.pop("losses")
        one["losses"] = [sum(losses[at : at + 2]) for at in range(0, len(losses), 2)]
    check_equal(found, expected)


@pytest.mark.parametrize(("strategy", "goes_on_as"), [("ddp", "ddp"), ("fsdp", "fsdp"), ("fsdp", "one process")])
def test_an_interrupted_run_of_several_processes_goes_on(
    server: Any, tmp_path: Path, strategy: str, goes_on_as: str
) -> None:
    options = {**SHARED, "strategy": strategy}
    (expected, _) = run(server, tmp_path, 2, "train", stage="prior", run_dir=str(tmp_path / "whole"), **options)
    run_dir = str(tmp_path / "interrupted")
    stopped = run(server, tmp_path, 2, "train", stage="prior", run_dir=run_dir, interrupt_rank=1, **options)
    assert [one["interrupted"] for one in stopped] == [True, True]
    assert [len(one["losses"]) for one in stopped] == [4, 4], "all stop after the same step"
    if goes_on_as == "one process":
        (resumed,) = run(server, tmp_path, 1, "train", stage="prior", run_dir=run_dir, **SHARED)
        assert resumed["losses"] == pytest.approx(expected["losses"][4:], abs=1e-6)
        assert largest_difference(resumed["weights"], expected["weights"]) < 2e-5
    else:
        (resumed, _) = run(server, tmp_path, 2, "train", stage="prior", run_dir=run_dir, **options)
        assert resumed["losses"] == expected["losses"][4:]
        assert largest_difference(resumed["weights"], expected["weights"]) == 0
    checkpoints = [file for file in resumed["files"] if file.endswith(".ckpt")]
    assert checkpoints == ["checkpoints/step-000000004.ckpt", "checkpoints/step-000000006.ckpt"], "one of them writes"


def test_the_order_is_the_same_for_any_number_of_processes_and_workers(server: Any, tmp_path: Path) -> None:
    options = {"steps": 10, "start_step": 0, "batch_size": 8}
    (expected,) = run(server, tmp_path, 1, "order", num_workers=0, **options)
    assert len({str(codes) for batch in expected[:8] for codes in batch}) == 64, "an epoch"
    for world_size, num_workers in ((2, 0), (2, 2), (4, 0)):
        assert run(server, tmp_path, world_size, "order", num_workers=num_workers, **options)[0] == expected
    resumed = {"steps": 3, "start_step": 7, "batch_size": 8, "num_workers": 0}
    assert run(server, tmp_path, 2, "order", **resumed)[1] == expected[7:]


def test_the_tasks_of_slurm_find_each_other(server: Any, tmp_path: Path) -> None:
    found = run(server, tmp_path, 2, "who", launcher="slurm")
    assert found == [{"rank": rank, "world_size": 2, "per_node": 2} for rank in range(2)]


def test_a_line_of_a_job_beside_srun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in launched(0, 32, 1, launcher="slurm").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    assert join("cpu").world_size == 1


def test_a_mistake_that_the_first_process_finds_ends_all(server: Any, tmp_path: Path) -> None:
    assert run(server, tmp_path, 2, "mistaken") == ["told: wrong data", "ended quietly"]


def test_one_process_needs_no_launcher() -> None:
    processes = join("cpu")
    assert (processes.rank, processes.world_size, processes.num_nodes) == (0, 1, 1)


def test_what_is_for_one_process_is_refused_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_several("tessera fit", "start one")
    for name, value in launched(1, 4, 1, launcher="torchrun").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="tessera fit is for one process and was started in 4: start one"):
        refuse_several("tessera fit", "start one")


def test_one_gpu_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in launched(0, 2, 1, launcher="torchrun").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="trainer.device=cuda:1 is one GPU for 2 processes: use cuda or auto"):
        join("cuda:1")


def test_uneven_nodes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        **launched(0, 3, 1, launcher="slurm"),
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "2",
    }.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings(), pytest.raises(UserError, match="3 tasks to 2 nodes"):
        warnings.simplefilter("ignore")  # that srun is not installed here
        join("cpu")
