"""Where the cells of a study are measured: in turn, side by side over processes, or over machines with Ray."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch

from tdcompile.errors import InputError, TdcompileError
from tdcompile.studies.cell import Bench, Load, Point
from tdcompile.studies.findings import Cell, Failure
from tdcompile.support.optional_import import import_optional

Work = Sequence[tuple[Point, str]]  # points of the grid, each with its cell's key
Outcomes = Iterator[Cell | Failure]

_DIED = "a process of the study died, as a rule for want of memory: go on with --resume and fewer --jobs"
_benches: dict[str, Bench] = {}  # of this process, by the study that it works for
_load: Load | None = None


def in_turn(bench: Bench, work: Work) -> Outcomes:
    """In this process, one after another."""
    for point, key in work:
        yield bench.attempt(point, key)


def over_processes(load: Load, work: Work, jobs: int) -> Outcomes:
    """Over so many processes, which share the threads out; the cells come as they are finished.

    A process that the iterator leaves at work when it is closed is ended.

    Raises:
        InputError: the network cannot be sent to another process.
        TdcompileError: a process died.
    """
    try:
        pickle.dumps(load)
    except Exception as error:  # pickling a user's objects runs into whatever they raise
        raise InputError(
            f"the network or its data cannot be sent to other processes ({error}): define them at the top of a "
            "module, or study with one job"
        ) from error
    threads = max(1, torch.get_num_threads() // jobs)
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may stand still
    pool = ProcessPoolExecutor(min(jobs, max(len(work), 1)), context, _begin, (load, threads))
    try:
        for future in as_completed([pool.submit(_measure, point, key) for point, key in work]):
            yield future.result()
    except BrokenProcessPool as error:
        raise TdcompileError(_DIED) from error
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def over_ray(load: Load, work: Work, jobs: int) -> Outcomes:
    """Over the Ray cluster that ``RAY_ADDRESS`` names, else one of this machine with so many jobs at a time.

    Every machine needs this project and sees the files under the paths by which this one does. What the iterator leaves
    undone when it is closed is cancelled.

    Raises:
        UnavailableError: Ray is not installed.
        TdcompileError: a process died.
    """
    ray = import_optional("ray", "ray")
    started = not ray.is_initialized()
    if started:
        local = {} if os.environ.get("RAY_ADDRESS") else {"address": "local", "num_cpus": jobs}
        ray.init(**local, log_to_driver=False, logging_level="ERROR")
    waiting: list[object] = []
    try:
        shared = [ray.put(load)]  # in a list a reference stays one, to be fetched once a process and not for each cell
        measure = ray.remote(num_cpus=1)(_measure_there)
        waiting = [measure.remote(shared, os.getcwd(), point, key) for point, key in work]
        while waiting:
            ready, waiting = ray.wait(waiting)
            try:
                yield ray.get(ready[0])
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayError as error:
                raise TdcompileError(_DIED) from error
    finally:
        if started:
            ray.shutdown()
        else:
            for undone in waiting:
                ray.cancel(undone, force=True)


def _begin(load: Load, threads: int) -> None:
    """Prepare a process; what can fail waits for the first cell, whose failure is told in a sentence."""
    global _load
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the first process ends the others
    torch.set_num_threads(threads)
    _load = load


def _measure(point: Point, key: str) -> Cell | Failure:
    assert _load is not None  # ``_begin`` has run
    if "" not in _benches:
        _benches[""] = _load()
    return _benches[""].attempt(point, key)


def _measure_there(shared: list[object], folder: str, point: Point, key: str) -> Cell | Failure:
    """In a process of Ray's, which may work for several studies one after another."""
    name = str(shared[0])
    if name not in _benches:
        torch.set_num_threads(1)
        if os.path.isdir(folder):
            os.chdir(folder)
        load: Load = import_optional("ray", "ray").get(shared[0])
        _benches[name] = load()
    return _benches[name].attempt(point, key)
