"""Keeps the C allocator from giving tensors' memory back to the system after every step."""

import ctypes
import sys

# glibc's mallopt parameters, from malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER = 2**31 - 1
_PAD_BYTES = 256 * 2**20


def reuse_freed_memory() -> bool:
    """Makes glibc serve large blocks from the heap and keep them when they are freed.

    By default every block above 32 MiB at most, and often above 128 KiB, is mapped afresh and unmapped when freed, so
    that each step of training on a CPU touches all of its activations for the first time. Reusing them made a training
    step of the prior a fifth faster. Other C libraries and systems are left as they are.

    Returns:
        Whether it took effect.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _PAD_BYTES))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
