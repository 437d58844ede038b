"""Memory of the process: what one step of a computation frees, the next one asks for again."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # the numbers of mallopt(3)
_NEVER = -1
# glibc ceases to adjust its thresholds once it is told one: these are where its own adjustment would end.
_LARGEST_MMAP_THRESHOLD, _DEFAULT_MMAP_MAX = 32 << 20, 65_536

_keeping = False


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """While it lasts, memory that is freed stays with the process; at the end of the outermost the system has it back.

    glibc returns large blocks to the system as soon as they are free, so that the pages of every batch's activations
    are mapped and zeroed again (mallopt(3)). With another C library nothing happens.
    """
    global _keeping
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if _keeping or libc is None or not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    _keeping = True
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
        libc.malloc_trim(0)
        _keeping = False
