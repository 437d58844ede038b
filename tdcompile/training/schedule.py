"""Learning-rate schedules."""

from __future__ import annotations

import math


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Return the share of the highest rate at a step: a linear rise, then a cosine to zero.

    Args:
        step: counted from 0.
        warmup: number of steps in which the rate rises.
        total: number of steps.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
