"""Pools of worker processes: ``parallel_map`` for independent work, ``process_pool`` and ``LazyValues`` beneath it."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

from tdcompile.errors import TdcompileError

Item = TypeVar("Item")
Result = TypeVar("Result")
Value = TypeVar("Value")

_ITEMS_PER_PROCESS = 2  # pickled ahead for each process: more would be copies of weights that wait
_DIED = (
    "a process died, as a rule for want of memory: go on with fewer jobs (--jobs); in a script of your own "
    "call tdcompile below 'if __name__ == \"__main__\":', since each process reads the script anew"
)


class LazyValues(Generic[Value]):
    """Values of one process, by key, each made at its first use and kept from then on."""

    def __init__(self) -> None:
        self._makers: dict[str, Callable[[], Value]] = {}
        self._made: dict[str, Value] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._makers or key in self._made

    def __getitem__(self, key: str) -> Value:
        if key not in self._made:
            self._made[key] = self._makers[key]()
            del self._makers[key]  # frees what the maker holds
        return self._made[key]

    def register(self, key: str, make: Callable[[], Value]) -> None:
        """Set how the value of a key is made; a failure of ``make`` is raised where the value is used."""
        self._makers[key] = make

    def clear(self) -> None:
        """Forget all values."""
        self._makers.clear()
        self._made.clear()


def parallel_map(work: Callable[[Item], Result], items: Iterable[Item], jobs: int) -> Iterator[Result]:
    """Return the work's result for each item, in order, computed by ``jobs`` processes that share the threads.

    With one job the work is done in this process and nothing is copied. Items are read only as they are needed, so a
    generator may make them, and each is copied to the process that works on it.

    Args:
        work: a function defined at the top of a module.

    Raises:
        TdcompileError: a process died.
    """
    if jobs <= 1:
        yield from map(work, items)
        return
    waiting: deque[Future[bytes]] = deque()
    with process_pool(jobs, _DIED) as pool:
        for item in items:
            waiting.append(pool.submit(_run_packed, pickle.dumps((work, item))))
            if len(waiting) >= _ITEMS_PER_PROCESS * jobs:
                yield pickle.loads(waiting.popleft().result())
        while waiting:
            yield pickle.loads(waiting.popleft().result())


@contextmanager
def process_pool(
    jobs: int, died: str, prepare: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """Open a pool of processes that share the threads; processes still at work after an error or an early end stop.

    Args:
        jobs: number of processes.
        died: message of the error if a process dies.
        prepare: called in each process before its first item; an exception in it counts as a death.
        arguments: of ``prepare``, pickled once for each process.

    Raises:
        TdcompileError: a process died.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may deadlock
    pool = ProcessPoolExecutor(jobs, context, _prepare_worker, (threads, prepare, arguments))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise TdcompileError(died) from error
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare_worker(threads: int, prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the first process ends the others
    torch.set_num_threads(threads)
    if prepare is not None:
        prepare(*arguments)


def _run_packed(packed: bytes) -> bytes:
    """Run pickled work and pickle its result: tensors then go through a pipe, not through scarce shared memory."""
    work, item = pickle.loads(packed)
    return pickle.dumps(work(item))
