"""Processors that other processes leave free."""

from __future__ import annotations

import os

import psutil

# Seconds over which the load is sampled: ten ticks of the kernel's clock.
_INTERVAL = 0.1


def free_processors() -> int:
    """Return how many processors this process may use and others leave idle; at least 1."""
    own: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(own, int(idle_processors() + 0.5)))


def idle_processors() -> float:
    """Return how many processors of the machine other processes leave idle.

    This process sleeps while the load is sampled, so that all of it belongs to others.
    """
    every: int = psutil.cpu_count() or 1
    busy: float = psutil.cpu_percent(interval=_INTERVAL) / 100 * every
    return every - busy
