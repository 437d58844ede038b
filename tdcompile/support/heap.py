"""Memory of the process: what one step of a computation frees, the next one asks for again."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # the numbers of mallopt(3)
_NEVER = -1
# The largest that glibc takes, and where its own adjustment ends, which ceases once it is told a threshold. Blocks
# above it are the system's at once in any case: in a heap of aligned blocks each would leave a hole too small for the
# next one of its size.
_LARGEST_IN_HEAP = 32 << 20

_keeping = False


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """While it lasts, the heap's freed memory stays with the process; after the outermost one the system has it back.

    glibc returns the end of the heap to the system as soon as it is free, so that the pages of every batch's
    activations are mapped and zeroed again (mallopt(3)). With another C library nothing happens.
    """
    global _keeping
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if _keeping or libc is None or not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    _keeping = True
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_IN_HEAP)
        libc.malloc_trim(0)
        _keeping = False
