"""``parallel_map``: independent work over processes, its results in order."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from tdcompile.errors import TdcompileError

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 2  # pieces of work for each process that lie ready: more would be copies of weights that wait


def parallel_map(work: Callable[[Item], Result], items: Iterable[Item], jobs: int) -> Iterator[Result]:
    """The work's result for each item, in their order; over so many processes, which share the threads out.

    With one job it is done here, and nothing is copied. An item is copied to the process that works on it, and read
    only when its turn comes, so that items may be made as they are needed.

    Args:
        work: defined at the top of a module.

    Raises:
        TdcompileError: a process died.
    """
    if jobs <= 1:
        yield from map(work, items)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may stand still
    waiting: deque[Future[bytes]] = deque()
    pool = ProcessPoolExecutor(jobs, context, _begin, (threads,))
    try:
        for item in items:
            waiting.append(pool.submit(_run, pickle.dumps((work, item))))
            if len(waiting) >= _AHEAD * jobs:
                yield _read(waiting.popleft())
        while waiting:
            yield _read(waiting.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _begin(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the first process ends the others
    torch.set_num_threads(threads)


def _run(packed: bytes) -> bytes:
    """As bytes, so that tensors go through a pipe and not through shared memory, of which there may be little."""
    work, item = pickle.loads(packed)
    return pickle.dumps(work(item))


def _read(future: Future[bytes]) -> Any:
    try:
        return pickle.loads(future.result())
    except BrokenProcessPool as error:
        raise TdcompileError(
            "a process died, as a rule for want of memory: go on with fewer jobs (--jobs); in a script of your own "
            "call tdcompile below 'if __name__ == \"__main__\":', since each process reads the script anew"
        ) from error
