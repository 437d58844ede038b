"""``Clock``: time single runs by the clock that other processes move least."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from scipy import stats

from tdcompile.ir.target import Target

# A run on an idle machine gets at least this share of its processor; profiling and interrupts take the rest.
CLEAN_SHARE = 0.9
_CONFIDENCE = 0.95
_FEWEST_FOR_INTERVAL = 6  # below it no order statistics enclose the median at 95 % confidence


class Lap(NamedTuple):
    """One run.

    Attributes:
        seconds: duration by the clock of the target.
        share: processor seconds over threads times wall seconds, at most 1; 1 where the processor tells nothing.
    """

    seconds: float
    share: float = 1.0


class Interval(NamedTuple):
    """A median and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of_median(cls, values: Sequence[float]) -> Self:
        """Return the median with its order-statistic interval; with fewer than 6 values, from least to largest."""
        low, high = min(values), max(values)
        median = float(np.median(values))
        if len(values) >= _FEWEST_FOR_INTERVAL:
            found = stats.quantile_test(values, q=median, p=0.5).confidence_interval(_CONFIDENCE)
            low, high = float(found.low), float(found.high)
        return cls(median, low, high)

    def narrow(self, half_width: float) -> bool:
        """Return whether half of the interval's width is at most this share of the median."""
        return self.high - self.low <= 2 * half_width * self.value


@dataclass(frozen=True)
class Clock:
    """The clock of a target.

    One thread on a CPU computes in the calling thread: its processor time counts, which leaves out the time that other
    processes take. Several threads are timed by the wall clock, and the share of processor time tells which runs were
    disturbed. A GPU is timed by the wall clock.

    Attributes:
        threads: threads of the session.
        wall: the wall clock, in seconds.
        cpu: processor seconds of the calling thread, or of the process if there are several threads; None if the
            system does not count them finely enough.
    """

    threads: int = 1
    wall: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] | None = None

    @classmethod
    def of(cls, target: Target) -> Self:
        """Return the clock of a target. Windows counts processor time in steps of 16 ms, too coarse for runs."""
        if target.device != "cpu" or sys.platform == "win32":
            return cls(target.threads)
        return cls(target.threads, cpu=time.thread_time if target.threads == 1 else time.process_time)

    @property
    def by_cpu(self) -> bool:
        """Whether a lap's seconds are processor time."""
        return self.cpu is not None and self.threads == 1

    def time(self, run: Callable[[], None]) -> Lap:
        """Run once and return the lap."""
        if self.cpu is None:
            began = self.wall()
            run()
            return Lap(self.wall() - began)
        began, used = self.wall(), self.cpu()
        run()
        own, wall = self.cpu() - used, self.wall() - began
        share = min(own / (self.threads * wall), 1.0) if wall > 0 else 1.0
        return Lap(own if self.by_cpu else wall, share)

    def clean(self, laps: Sequence[Lap]) -> list[bool]:
        """Return which runs were not disturbed.

        A run of one thread was not if it got nearly all of its processor. How much several threads can get depends on
        the model, so their runs are compared with the best ones.
        """
        if not laps:
            return []
        best = 1.0 if self.threads == 1 else float(np.quantile([lap.share for lap in laps], 0.9))
        return [lap.share >= CLEAN_SHARE * best for lap in laps]


def undisturbed(rounds: Sequence[Sequence[Lap]], clock: Clock) -> list[Sequence[Lap]]:
    """Return the rounds that count: all by processor time, otherwise those of which no run was disturbed."""
    if clock.by_cpu:
        return list(rounds)
    clean = zip(*(clock.clean(laps) for laps in zip(*rounds, strict=True)), strict=True)
    return [laps for laps, fine in zip(rounds, clean, strict=True) if all(fine)]
