"""Memory of the process: keep what one step of a computation frees for the next step, which asks for it again."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # the numbers of mallopt(3)
_NEVER = -1
# The largest threshold that glibc accepts, and where its own adjustment of the threshold ends; setting one stops that
# adjustment. The system takes larger blocks back at once in any case: among aligned blocks each would leave a hole too
# small for the next block of its size.
_LARGEST_IN_HEAP = 32 << 20


@dataclass
class Heap:
    """The process's heap; mallopt(3) acts on all of it.

    Attributes:
        keeping: whether freed memory stays with the process now.
    """

    keeping: bool = False

    @contextmanager
    def keep_freed_memory(self) -> Iterator[None]:
        """Keep freed memory with the process for a while; the outermost call returns it to the system at its end.

        glibc returns the end of the heap to the system as soon as it is free. The pages of every batch's activations
        are then mapped and zeroed again (mallopt(3)). With another C library nothing happens.
        """
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        if self.keeping or libc is None or not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
            yield
            return
        self.keeping = True
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
        libc.mallopt(_TRIM_THRESHOLD, _NEVER)
        try:
            yield
        finally:
            libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_IN_HEAP)
            libc.malloc_trim(0)
            self.keeping = False


HEAP = Heap()
keep_freed_memory = HEAP.keep_freed_memory
