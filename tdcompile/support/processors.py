"""Processors that other processes leave free."""

from __future__ import annotations

import os
import time
from typing import Any

import psutil

# Seconds over which the load is sampled: ten ticks of the kernel's clock.
_INTERVAL = 0.1
# Seconds that lie at least between two readings of a watch: shorter ones would follow every short task of the machine.
_APART = 1.0


def free_processors() -> int:
    """Return how many processors this process may use and others leave idle; at least 1."""
    return _whole(idle_processors())


def idle_processors() -> float:
    """Return how many of the processors that this process may use are left idle by others.

    This process sleeps while the load is sampled, so that all of it belongs to others.
    """
    own = _own()
    busy: list[float] = psutil.cpu_percent(interval=_INTERVAL, percpu=True)
    return len(own) - sum(share for place, share in enumerate(busy) if place in own) / 100


class ProcessorWatch:
    """Says how many processors were free since it was last asked, without sleeping.

    The time that this process and its finished children took is subtracted from the time that all processes took.
    """

    def __init__(self) -> None:
        self._then, self._busy, self._taken = _now()

    def free(self) -> int | None:
        """Return how many processors this process could have used; None within a second of the last number."""
        now, busy, taken = _now()
        passed = now - self._then
        if passed < _APART:
            return None
        others = max(0.0, (busy - self._busy) - (taken - self._taken)) / passed
        self._then, self._busy, self._taken = now, busy, taken
        return _whole(len(_own()) - others)


def _whole(idle: float) -> int:
    return max(1, int(idle + 0.5))


def _own() -> set[int]:
    """Return the numbers of the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        own: set[int] = os.sched_getaffinity(0)
        return own
    return set(range(os.cpu_count() or 1))


def _now() -> tuple[float, float, float]:
    """Return the time, the seconds that this process's processors have computed up to now, and its own seconds."""
    own, taken = _own(), os.times()
    busy = sum(_computed(times) for place, times in enumerate(psutil.cpu_times(percpu=True)) if place in own)
    return time.monotonic(), busy, taken.user + taken.system + taken.children_user + taken.children_system


def _computed(times: Any) -> float:
    """Return the seconds of a processor that were not idle."""
    # The kernel counts a guest's time twice: as a field of its own, and as time of a user.
    others = ("idle", "iowait", "guest", "guest_nice")
    return float(sum(times)) - sum(float(getattr(times, name, 0.0)) for name in others)
