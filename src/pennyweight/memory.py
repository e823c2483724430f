"""What becomes of freed memory: settings of the whole process, which the command line makes and the library does not.

Elsewhere than on glibc nothing happens.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 1 << 25  # glibc takes no more


def return_freed_memory(threshold: int = 1 << 17) -> None:
    """Have glibc map blocks of `threshold` bytes and more by themselves, so that freeing them shrinks the process.

    By default glibc raises that limit as tensors come and go, and a run's peak is then mostly holes.
    """
    _set_thresholds(threshold, threshold)


def keep_freed_memory() -> None:
    """Undo `return_freed_memory` for work that makes and frees the same tensors again and again.

    A training step is two to three times slower where each of them is mapped, and its pages cleared, anew.
    """
    _set_thresholds(_LARGEST_MMAP_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)


def _set_thresholds(mmap: int, trim: int) -> None:
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_MMAP_THRESHOLD, mmap)
    mallopt(_M_TRIM_THRESHOLD, trim)
