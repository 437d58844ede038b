"""Errors of a whole rank space from a cheap bound for each member and a factorisation of a few."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def spread(costs: Sequence[float], budget: float, least: int) -> list[int]:
    """Evenly spaced indices, the first and the last among them: as many as the budget pays for.

    Args:
        costs: of each member.
        budget: what the chosen ones may cost together.
        least: so many are chosen whatever they cost, where there are so many.

    >>> spread([1.0] * 10, 4.0, 2)
    [0, 3, 6, 9]
    """
    for count in range(len(costs), least, -1):
        chosen = _even(len(costs), count)
        if sum(costs[i] for i in chosen) <= budget:
            return chosen
    return _even(len(costs), min(least, len(costs)))


def anchored(
    sizes: Sequence[float], bounds: Sequence[float], anchors: Sequence[int], truth: Callable[[int], float]
) -> list[float]:
    """Errors that meet the truth at the anchors and follow the bound in between.

    The ratio of truth to bound changes slowly, so it is what is interpolated; beyond the last anchor it is held.

    Args:
        sizes: of the members, rising: what is interpolated over.
        bounds: of their errors.
        anchors: indices of the members to factorise.
        truth: the error of the member with this index.
    """
    if not anchors:
        return list(bounds)
    ratios = [truth(i) / bounds[i] if bounds[i] > 0 else 1.0 for i in anchors]
    errors = np.asarray(bounds) * np.interp(sizes, [sizes[i] for i in anchors], ratios)
    return [float(error) for error in errors]


def _even(length: int, count: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, length - 1, count)})
