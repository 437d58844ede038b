"""Torch gets the threads that other processes leave free, at most the caller's, and the caller's number comes back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.core import free_threads
from tdcompile.core.free_threads import FreeThreads
from tdcompile.core.pipeline import Pipeline
from tdcompile.support import processors
from tdcompile.support.processors import ProcessorWatch


@pytest.fixture(autouse=True)
def _four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


class Load:
    """The free processors that a test sets, in place of the machine's."""

    free = 4

    def __call__(self) -> int:
        return self.free


class Watch(ProcessorWatch):
    def __init__(self, load: Load) -> None:
        self._load = load

    def free(self) -> int:
        return self._load.free


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    load = Load()
    monkeypatch.setattr(free_threads, "free_processors", load)
    monkeypatch.setattr(free_threads, "ProcessorWatch", lambda: Watch(load))
    return load


@pytest.mark.parametrize(("free", "threads"), [(1, 1), (3, 3), (16, 4)])
def test_threads_are_those_that_are_free_and_at_most_the_callers(load: Load, free: int, threads: int) -> None:
    load.free = free
    with FreeThreads():
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 4


def test_the_callers_number_comes_back_after_an_error(load: Load) -> None:
    load.free = 2
    with pytest.raises(RuntimeError), FreeThreads():
        raise RuntimeError
    assert torch.get_num_threads() == 4


def test_the_number_follows_the_load_at_each_pass_and_at_progress(load: Load) -> None:
    seen = []
    program = tdcompile.trace(nn.Linear(4, 3).eval(), (torch.randn(2, 4),))
    step = Pipeline.parse("fold-batchnorm").steps[0]
    with FreeThreads() as threads:
        for load.free in (1, 3):
            threads.around(step, 0, program, lambda: (seen.append(torch.get_num_threads()), program)[1])
        load.free = 2
        threads.advanced(step, 1, 2, "")
        seen.append(torch.get_num_threads())
    assert seen == [1, 3, 2]
    load.free = 1
    threads.advanced(step, 2, 2, "")  # a late report changes nothing after the context
    assert torch.get_num_threads() == 4


def test_one_thread_takes_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise AssertionError

    monkeypatch.setattr(free_threads, "free_processors", fail)
    torch.set_num_threads(1)
    with FreeThreads():
        assert torch.get_num_threads() == 1


def test_compile_keeps_the_callers_number(load: Load) -> None:
    load.free = 2
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    tdcompile.compile(network, torch.randn(2, 64), budget={"macs": 0.6})
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    ("passed", "busy", "own", "free"),
    [
        (10.0, 10.0, 10.0, 4),  # this process alone
        (10.0, 30.0, 10.0, 2),  # others keep two of four processors busy
        (10.0, 40.0, 2.0, 1),  # others would use all of them
        (0.5, 2.0, 0.0, None),  # too short a time to judge
    ],
)
def test_the_watch_counts_what_others_take(
    monkeypatch: pytest.MonkeyPatch, passed: float, busy: float, own: float, free: int | None
) -> None:
    monkeypatch.setattr(processors, "_own", lambda: {0, 1, 2, 3})
    times = iter([(100.0, 50.0, 20.0), (100.0 + passed, 50.0 + busy, 20.0 + own)])
    monkeypatch.setattr(processors, "_now", lambda: next(times))
    assert ProcessorWatch().free() == free


def test_the_watch_reads_the_machine() -> None:
    now, busy, own = processors._now()
    assert now > 0
    assert busy > 0
    assert own > 0


def test_only_the_processors_that_this_process_may_use_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "_own", lambda: {1, 2})
    monkeypatch.setattr(processors.psutil, "cpu_percent", lambda **_: [100.0, 100.0, 20.0, 0.0])
    assert processors.idle_processors() == pytest.approx(0.8)
    assert processors.free_processors() == 1
