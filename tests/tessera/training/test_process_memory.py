"""What the process itself takes is told by the kind of device."""

from tessera.training.process_memory import process_gib


def test_cuda_keeps_less_of_a_gpu_than_python_of_the_memory() -> None:
    assert 0 < process_gib("cuda") < process_gib("cpu")


def test_what_is_not_known_counts_as_nothing() -> None:
    assert process_gib("mps") == 0.0
