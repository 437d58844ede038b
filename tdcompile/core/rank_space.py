"""Grids of candidate ranks: multiples of a grain up to the exact ranks."""

from __future__ import annotations

import math

from tdcompile.ir.layer import Ranks

_STEPS = 64  # maximum size of one grid, so that a wide layer does not have thousands of candidates


def grid(full: int, grain: int) -> list[int]:
    """Return ranks from the grain to the full rank: multiples of the grain, at most about 64, and the full rank last.

    >>> grid(40, 16)
    [16, 32, 40]
    """
    step = grain * max(1, math.ceil(full / grain / _STEPS))
    return [*range(step, full, step), full]


def tied(exact: Ranks, rank: int) -> Ranks:
    """Return one rank for all, each limited to its exact rank.

    A tensor train with these ranks exists: no rank exceeds the one before it times the mode between them. At equal
    weights its error is smaller than with ranks in proportion to the exact ones, where the middle ranks are largest.

    >>> tied((16, 48, 32), 24)
    (16, 24, 24)
    """
    return tuple(min(rank, most) for most in exact)
