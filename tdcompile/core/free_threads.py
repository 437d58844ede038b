"""``FreeThreads``: torch computes with as many threads as there are processors that other processes leave free."""

from __future__ import annotations

from types import TracebackType

import torch

from tdcompile.core.hooks import Hook, Work
from tdcompile.core.passes import Pass
from tdcompile.ir.program import Program
from tdcompile.support.processors import ProcessorWatch, free_processors


class FreeThreads(Hook):
    """A context, and a hook within it, that fits torch's number of threads to the free processors.

    Threads that share a processor wait for each other at the end of every operation. Beside two busy processes on two
    processors, two threads are slower than one. The number is chosen at the start, and again before each pass and as
    passes report progress. It is at most the number that the caller has set, by ``torch.set_num_threads`` or by
    ``OMP_NUM_THREADS``, and the context restores that number.
    """

    def __init__(self) -> None:
        self._most = torch.get_num_threads()
        self._watch: ProcessorWatch | None = None

    def __enter__(self) -> FreeThreads:
        """Choose the number from a sample of a tenth of a second; one thread needs no sample."""
        if self._most > 1:
            self._set(free_processors())
            self._watch = ProcessorWatch()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the caller's number."""
        if self._watch is not None:
            torch.set_num_threads(self._most)
            self._watch = None

    def around(self, step: Pass, position: int, program: Program, work: Work) -> Program:
        """Choose the number again, then run the pass."""
        self._choose()
        return work()

    def advanced(self, step: Pass, done: int, of: int, note: str) -> None:
        """Choose the number again: a pass that trains takes hours."""
        self._choose()

    def _choose(self) -> None:
        free = None if self._watch is None else self._watch.free()
        if free is not None:
            self._set(free)

    def _set(self, free: int) -> None:
        threads = min(self._most, free)
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
