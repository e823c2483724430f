"""Give freed memory back to the system."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def return_freed_memory(threshold: int = 1 << 17) -> None:
    """Have glibc map blocks of `threshold` bytes and more by themselves, so that freeing them shrinks the process.

    By default glibc raises that limit as tensors come and go, and a run's peak is then mostly holes. A setting of the
    whole process: the command line makes it, the library does not. Elsewhere than on glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_MMAP_THRESHOLD, threshold)
    mallopt(_M_TRIM_THRESHOLD, threshold)
