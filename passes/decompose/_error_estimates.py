"""Estimate the errors of a whole rank space from a cheap bound for each rank and a factorisation of a few ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from torch import Tensor

from tdcompile.ir.layer import Ranks
from tdcompile.numerics.tensor_train import tail


def spread(costs: Sequence[float], budget: float, least: int) -> list[int]:
    """Return evenly spaced indices, including the first and the last: as many as the budget pays for.

    Args:
        costs: the cost of each member.
        budget: upper bound of the total cost of the chosen members.
        least: the number of members that are chosen at any cost, if there are that many.

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
    """Return errors that equal the truth at the anchors and follow the bound in between.

    The ratio of truth to bound changes slowly, so the ratio is interpolated; beyond the last anchor it is constant.

    Args:
        sizes: sizes of the members, in rising order: the axis of the interpolation.
        bounds: bounds of their errors.
        anchors: indices of the members to factorise.
        truth: returns the error of the member with this index.
    """
    if not anchors:
        return list(bounds)
    ratios = [truth(i) / bounds[i] if bounds[i] > 0 else 1.0 for i in anchors]
    errors = np.asarray(bounds) * np.interp(sizes, [sizes[i] for i in anchors], ratios)
    return [float(error) for error in errors]


def train_bounds(
    tensor: Tensor, space: Sequence[Ranks], energy: float, join: Callable[[Iterable[float]], float]
) -> list[float]:
    """Return bounds of a tensor train's relative error, from the energy that each unfolding loses at its rank.

    Args:
        tensor: the tensor to decompose, one axis for each core.
        space: ranks, one for each bond.
        energy: squared norm of the tensor.
        join: ``sum`` for upper bounds of the error of a TT-SVD (Oseledets 2011), ``max`` for lower bounds of the error
            of any train.
    """
    if not space:
        return []
    most = [max(ranks) for ranks in zip(*space, strict=True)]
    tails = [tail(tensor.flatten(0, i).flatten(1), rank) for i, rank in enumerate(most)]
    return [math.sqrt(join(float(t[r]) for t, r in zip(tails, ranks, strict=True)) / energy) for ranks in space]


def _even(length: int, count: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, length - 1, count)})
