"""What a process that trains takes of a device's memory before it has a tensor there."""

_GIB = {"cpu": 1.2, "cuda": 0.8}  # Python with torch and lightning; what CUDA keeps for itself


def process_gib(kind: str) -> float:
    """The memory of the process itself in GiB; 0 for devices of other kinds than cpu and cuda."""
    return _GIB.get(kind, 0.0)
