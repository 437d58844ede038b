"""Run the cells of a study: one after another, in several processes, or on several machines with Ray."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed

import torch

from tdcompile.errors import InputError, TdcompileError
from tdcompile.studies.cell import Bench, Load, Point
from tdcompile.studies.findings import Cell, Failure
from tdcompile.support.optional_import import import_optional
from tdcompile.support.process_pool import LazyValues, process_pool

Work = Sequence[tuple[Point, str]]  # points of the grid with the keys of their cells
Outcomes = Iterator[Cell | Failure]

_DIED = "a process of the study died, probably for lack of memory: go on with --resume and fewer --jobs"
_POOL = "pool"  # key of the one study that a process of the pool works for; Ray's processes may work for several
BENCHES = LazyValues[Bench]()  # of this process, by study


def in_turn(bench: Bench, work: Work) -> Outcomes:
    """Measure the cells in this process, one after another."""
    for point, key in work:
        yield bench.attempt(point, key)


def over_processes(load: Load, work: Work, jobs: int) -> Outcomes:
    """Measure the cells in several processes that share the threads; yield cells as they finish.

    Closing the iterator ends all processes.

    Raises:
        InputError: the network cannot be sent to another process.
        TdcompileError: a process died.
    """
    try:
        pickle.dumps(load)
    except Exception as error:  # pickling a user's objects may raise anything
        raise InputError(
            f"the network or its data cannot be sent to other processes ({error}): define them at the top level of "
            "a module, or use one job"
        ) from error
    processes = min(jobs, max(len(work), 1))
    with process_pool(processes, _DIED, _register, (load,)) as pool:
        for future in as_completed([pool.submit(_measure, point, key) for point, key in work]):
            yield future.result()


def over_ray(load: Load, work: Work, jobs: int) -> Outcomes:
    """Measure the cells on the Ray cluster at ``RAY_ADDRESS``, or on a local one with this number of jobs.

    Every machine needs this project, and the files at the same paths as on this machine. Closing the iterator cancels
    the cells that are not finished.

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
        shared = [ray.put(load)]  # Ray resolves a bare reference for each cell; in a list each process fetches it once
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


def _register(load: Load) -> None:
    """Prepare a process; its first cell loads the bench, so that a failure is reported as that cell's."""
    BENCHES.register(_POOL, load)


def _measure(point: Point, key: str) -> Cell | Failure:
    return BENCHES[_POOL].attempt(point, key)


def _measure_there(shared: list[object], folder: str, point: Point, key: str) -> Cell | Failure:
    """Measure a cell in a process of Ray, which may serve several studies in succession."""
    name = str(shared[0])
    if name not in BENCHES:
        torch.set_num_threads(1)
        if os.path.isdir(folder):
            os.chdir(folder)
        BENCHES.register(name, import_optional("ray", "ray").get(shared[0]))
    return BENCHES[name].attempt(point, key)
