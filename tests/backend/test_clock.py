"""Clocks and rounds: what other processes take does not count, and rounds go on until the ratio is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tdcompile.backend import profile, session
from tdcompile.backend.clock import Clock, Interval, Lap, undisturbed
from tdcompile.ir.target import Target


class Machine:
    """A processor with a clock of its own; a run takes ``own`` seconds, and others take time in between."""

    def __init__(self, threads: int = 1) -> None:
        self.wall = self.cpu = 0.0
        self.clock = Clock(threads, wall=lambda: self.wall, cpu=lambda: self.cpu)

    def run(self, own, others=None):
        own, others = iter(own), iter(others or itertools.repeat(0.0))

        def one() -> None:
            seconds = next(own)
            self.cpu += self.clock.threads * seconds
            self.wall += seconds + next(others)

        return one


def test_one_thread_is_timed_by_its_processor_time():
    machine = Machine()
    run = machine.run(itertools.repeat(2.0), itertools.cycle([0.0, 6.0]))
    assert [machine.clock.time(run) for _ in range(2)] == [Lap(2.0, 1.0), Lap(2.0, 0.25)]


def test_several_threads_are_timed_by_the_wall_and_their_share_is_told():
    machine = Machine(threads=4)
    run = machine.run(itertools.repeat(2.0), itertools.cycle([0.0, 6.0]))
    assert [machine.clock.time(run) for _ in range(2)] == [Lap(2.0, 1.0), Lap(8.0, 0.25)]


def test_without_processor_time_the_wall_counts_and_every_run():
    machine = Machine()
    clock = Clock(1, wall=lambda: machine.wall)
    laps = [clock.time(machine.run(itertools.repeat(2.0), itertools.repeat(6.0)))]
    assert laps == [Lap(8.0)]
    assert clock.clean(laps) == [True]
    assert undisturbed([laps], clock) == [laps]


def test_the_clock_of_a_target(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    assert Clock.of(Target()).by_cpu
    assert Clock.of(Target(threads=2)).cpu is not None
    assert not Clock.of(Target(threads=2)).by_cpu
    assert Clock.of(Target("cuda")).cpu is None
    monkeypatch.setattr("sys.platform", "win32")  # counts processor time in steps of 16 ms
    assert Clock.of(Target()).cpu is None


def test_busy_processes_do_not_move_the_ratio():
    machine, random = Machine(), np.random.default_rng(0)
    dense = machine.run(itertools.repeat(2.0), iter(lambda: random.exponential(5.0), None))
    compiled = machine.run(itertools.repeat(1.0), iter(lambda: random.exponential(5.0), None))
    first, second = session.time_rounds([dense, compiled], machine.clock, seconds=100.0, min_runs=5)
    assert (first.median, second.median) == (2.0, 1.0)
    assert second.speedup == Interval(2.0, 2.0, 2.0)
    assert second.share < 0.5


def test_disturbed_rounds_of_several_threads_do_not_count():
    machine = Machine(threads=2)
    dense = machine.run(itertools.repeat(2.0), itertools.cycle([0.0, 0.0, 8.0]))
    compiled = machine.run(itertools.repeat(1.0), itertools.cycle([0.0, 9.0, 0.0]))
    _, timing = session.time_rounds([dense, compiled], machine.clock, seconds=60.0, min_runs=5)
    assert timing.speedup == Interval(2.0, 2.0, 2.0)
    assert timing.runs >= 5


def test_where_every_round_is_disturbed_the_least_disturbed_ones_count():
    machine = Machine(threads=2)
    times = itertools.cycle([0.0, 9.0])
    runs = [machine.run(itertools.repeat(2.0), times), machine.run(itertools.repeat(1.0), times)]
    _, timing = session.time_rounds(runs, machine.clock, seconds=10.0, min_runs=4)
    assert timing.runs == 4


def test_rounds_go_on_until_the_ratio_is_known_but_not_for_ever():
    random = np.random.default_rng(0)

    def rounds(spread: float) -> tuple[float, session.Timing]:
        machine = Machine()
        noisy = machine.run(iter(lambda: max(random.normal(1.0, spread), 0.1), None))
        _, timing = session.time_rounds([machine.run(itertools.repeat(1.0)), noisy], machine.clock, 200.0, min_runs=5)
        return machine.wall, timing

    still, _ = rounds(1e-3)
    assert 200 <= still < 204
    longer, timing = rounds(0.06)
    assert 220 <= longer < 590
    assert timing.speedup.narrow(0.01)
    longest, timing = rounds(0.5)
    assert 600 <= longest < 604
    assert not timing.speedup.narrow(0.01)
    assert timing.speedup.low <= timing.speedup.value <= timing.speedup.high


def test_the_interval_of_a_median_holds_the_median_of_the_distribution():
    random = np.random.default_rng(0)
    found = [Interval.of_median(random.exponential(1.0, 40)) for _ in range(200)]
    assert sum(one.low <= np.log(2) <= one.high for one in found) >= 0.93 * 200
    assert Interval.of_median([3.0, 1.0, 2.0]) == Interval(2.0, 1.0, 3.0)


def kernels_of(machine: Machine, disturbed: list[float], runs: int):
    """Two kernels of 1 s and 3 s, and 0.5 s between them; other processes lengthen the second one."""
    laps = [
        machine.clock.time(machine.run([4.5], [late])) for late in itertools.islice(itertools.cycle(disturbed), runs)
    ]
    late = np.array([lap.seconds / lap.share - 4.5 for lap in laps])
    kernels = np.stack([np.ones(runs), 3.0 + late])
    return profile._typical(kernels, kernels.sum(axis=0) + 0.5, laps, machine.clock)


@pytest.mark.parametrize(
    ("disturbed", "quiet"),
    [([0.0], True), ([0.0, 9.0, 9.0], True), ([3.0, 9.0, 9.0], False), ([0.0] + [9.0] * 8, False)],
)
def test_kernels_take_what_they_take_in_undisturbed_runs_or_what_sums_to_processor_time(disturbed, quiet):
    seconds, told = kernels_of(Machine(), disturbed, 9)
    assert told == quiet
    assert seconds.sum() == pytest.approx(4.0)
    assert not quiet or seconds == pytest.approx([1.0, 3.0])


def test_kernels_are_counted_by_run():
    def event(name: str, start: int, took: int, cat: str = "Node") -> dict[str, object]:
        return {"cat": cat, "name": name, "ts": start, "dur": took, "args": {"op_name": "Conv", "node_index": "0"}}

    events = [
        event("a_kernel_time", 1, 10),
        event("a_kernel_time", 12, 30),  # twice in one run, as in a loop
        event("model_run", 0, 50, "Session"),
        event("a_kernel_time", 101, 20),
        event("model_run", 100, 40, "Session"),
    ]
    kernels, walls = profile._by_run(events)
    assert list(kernels.values()) == [pytest.approx([40e-6, 20e-6])]
    assert walls == pytest.approx([50e-6, 40e-6])
