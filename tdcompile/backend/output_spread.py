"""``OutputSpread``: how far outputs vary over samples, the unit of quantisation errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A spread below this share of the magnitude is rounding of floats: the outputs are constant.
_CONSTANT = 1e-5


class OutputSpread:
    """Root sum of squares of outputs around their mean over samples, accumulated over batches.

    Batches may hold one sample each.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], tuple[int, NDArray[np.float64], NDArray[np.float64]]] = {}
        self._power = 0.0

    def add(self, place: int, output: NDArray[Any]) -> None:
        """Add a batch.

        Args:
            place: index of the output.
            output: values ``(N, ...)`` or a single number.
        """
        rows = values_of(output)
        power = float((rows**2).sum())
        self._power += power
        # Chan et al. 1983: counts, means and sums of squares around the mean of two batches are combined.
        count, mean, squares = len(rows), rows.mean(0), ((rows - rows.mean(0)) ** 2).sum(0)
        key = place, rows.shape[1]
        if key in self._seen:
            before, old, sums = self._seen[key]
            both = before + count
            squares = sums + squares + (mean - old) ** 2 * (before * count / both)
            mean, count = old + (mean - old) * (count / both), both
        self._seen[key] = count, mean, squares

    @property
    def magnitude(self) -> float:
        """Root sum of squares of all outputs."""
        return math.sqrt(self._power)

    @property
    def value(self) -> float:
        """The spread; the magnitude if there is one sample or the outputs are constant."""
        spread = math.sqrt(sum(float(squares.sum()) for _, _, squares in self._seen.values()))
        return max(spread if spread > _CONSTANT * self.magnitude else self.magnitude, 1e-15)


def values_of(output: NDArray[Any]) -> NDArray[np.float64]:
    """Return an output as ``(N, values)`` in double precision; a single number is one sample."""
    rows: NDArray[np.float64] = output.reshape(len(output) if output.ndim else 1, -1).astype(np.float64)
    return rows
