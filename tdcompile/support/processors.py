"""Processors that other processes leave free."""

from __future__ import annotations

import os

import psutil

# Seconds over which the load is sampled: ten ticks of the kernel's clock.
_INTERVAL = 0.1


def free_processors() -> int:
    """Return how many processors this process may use and others leave idle; at least 1.

    This process sleeps while the load is sampled, so that all of it belongs to others.
    """
    own: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    every: int = psutil.cpu_count() or own
    busy: float = psutil.cpu_percent(interval=_INTERVAL) / 100 * every
    return max(1, min(own, int(every - busy + 0.5)))
