"""``OutputMetric``: the error of a layer's output, ‖(W−W̃)S^½‖ with S the covariance of its input; fits in it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from tdcompile.numerics.cholesky import cholesky, definite, ridge
from tdcompile.numerics.covariance import Covariance
from tdcompile.numerics.cp_correction import bounded
from tdcompile.numerics.low_rank import blocks


class OutputMetric:
    """Measures approximations of one weight by the error of the layer's output.

    Everything is computed in float64, and the weight is converted block by block.

    Attributes:
        flat: the weight as ``(T, C·K)``, in its own precision.
        covariance: S.
        energy: ‖W S^½‖².
    """

    def __init__(self, weight: Tensor, covariance: Covariance) -> None:
        self.flat = weight.detach().flatten(1)
        self.covariance = covariance.to(self.flat.new_empty(0, dtype=torch.float64))
        self.energy = sum(self.covariance.energy(block) for block in self._blocks())

    def channel_root(self, channels: int) -> Tensor:
        """Return the lower triangular L with L Lᵀ = the mean over the taps of the C x C blocks of S, plus a ridge."""
        block = self.covariance.between_groups(len(self.covariance) // channels).double()
        return cholesky(block, ridge(block.diagonal()))

    @property
    def multiplications(self) -> int:
        """The number of multiplications in a row times S."""
        return self.covariance.multiplications()

    def error(self, approximation: Tensor) -> float:
        """Return the relative error of an approximation of the weight's shape."""
        pairs = zip(self._blocks(), blocks(approximation.flatten(1), torch.float64), strict=True)
        return self._relative(sum(self.covariance.energy(ours - theirs) for ours, theirs in pairs))

    def refit(self, last: Tensor, before: Tensor) -> tuple[Tensor, float]:
        """Refit the last factor by least squares, W S Bᵀ (B S Bᵀ)⁻¹, with a proximal term towards the given one.

        Args:
            last: A, ``(T, r)``.
            before: B, ``(r, C·K)``; the weight is approximated by A B.

        Returns:
            The new A, never worse than the given one, and its relative error.
        """
        product, gram = self._normal(before)
        root, hold = definite(gram, ridge(gram.diagonal()))
        found = torch.cholesky_solve((product + hold * last).T, root).T
        left = self.energy - 2 * float((product * found).sum()) + float(((found @ gram) * found).sum())
        return found, self._relative(left)

    def refit_within(self, before: Tensor, weights: Tensor, error: float) -> Tensor | None:
        """Return the last factor A that minimises Σ_r w_r ‖a_r‖² at a relative error of at most ``error``, or None.

        Args:
            before: B, ``(r, C·K)``; the weight is approximated by A B.
            weights: w, ``(r,)``.
            error: below 1.
        """
        product, gram = self._normal(before)
        return bounded(product, gram, weights, self.energy, error**2 * self.energy)

    def scale(self, approximation: Iterable[Tensor]) -> tuple[float, float]:
        """Return the best scalar for an approximation, and the relative error with it.

        Args:
            approximation: its rows in order, ``(n, C·K)`` or ``(n, C, *kernel)`` at a time.
        """
        cross, square, start = 0.0, 0.0, 0
        for rows in approximation:
            theirs = rows.double().flatten(1)
            weighted = theirs @ self.covariance
            cross += float((weighted * self.flat[start : start + len(rows)]).sum())
            square += float((weighted * theirs).sum())
            start += len(rows)
        scale = cross / square if square > 0 else 1.0
        return scale, self._relative(self.energy - 2 * scale * cross + scale**2 * square)

    def _blocks(self) -> Iterable[Tensor]:
        return blocks(self.flat, torch.float64)

    def _normal(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """Return W S Bᵀ and B S Bᵀ."""
        weighted = before @ self.covariance
        return torch.cat([block @ weighted.T for block in self._blocks()]), weighted @ before.T

    def _relative(self, left: float) -> float:
        """Return the relative error; 0 for an output that is always zero, whose energy round-off may leave negative."""
        return 0.0 if self.energy <= 0 else math.sqrt(max(left, 0.0) / self.energy)
