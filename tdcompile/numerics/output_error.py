"""The metric of a layer's output, ‖(W−W̃)S^½‖ with S the second moment of its input, and least squares in it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from tdcompile.numerics.covariance import Sketch
from tdcompile.numerics.cp import bounded
from tdcompile.numerics.input_basis import between_groups
from tdcompile.numerics.low_rank import blocks, cholesky, definite, ridge


class OutputMetric:
    """Measures approximations of one weight by what the layer's output loses; all in float64, the weight in blocks.

    Attributes:
        flat: the weight as ``(T, C·K)``, as it is.
        second: S, ``(C·K, C·K)``, or its sketch.
    """

    def __init__(self, weight: Tensor, second: Tensor | Sketch) -> None:
        self.flat = weight.detach().flatten(1)
        self.second = second.to(self.flat.new_empty(0, dtype=torch.float64))
        self.energy = sum(self._energy(block) for block in self._blocks())

    def channel_root(self, channels: int) -> Tensor:
        """Lower triangular L with L Lᵀ = the mean over the taps of S's C x C diagonal blocks, plus a ridge."""
        block = between_groups(self.second, len(self.second) // channels).double()
        return cholesky(block, ridge(block))

    @property
    def multiplications(self) -> int:
        """How many a row times S takes."""
        return self.second.multiplications() if isinstance(self.second, Sketch) else self.second.numel()

    def error(self, approximation: Tensor) -> float:
        """The relative error of an approximation of the weight's shape."""
        pairs = zip(self._blocks(), blocks(approximation.flatten(1), torch.float64), strict=True)
        return self._relative(sum(self._energy(ours - theirs) for ours, theirs in pairs))

    def refit(self, last: Tensor, before: Tensor) -> tuple[Tensor, float]:
        """The last factor, found again by least squares: W S Bᵀ (B S Bᵀ)⁻¹, held to the one given by a proximal term.

        Args:
            last: A, ``(T, r)``.
            before: B, ``(r, C·K)``; the weight is approximated by A B.

        Returns:
            The new A, never worse than the one given, and its relative error.
        """
        product, gram = self._normal(before)
        root, hold = definite(gram, ridge(gram))
        found = torch.cholesky_solve((product + hold * last).T, root).T
        left = self.energy - 2 * float((product * found).sum()) + float(((found @ gram) * found).sum())
        return found, self._relative(left)

    def refit_within(self, before: Tensor, weights: Tensor, error: float) -> Tensor | None:
        """The last factor A that minimises Σ_r w_r ‖a_r‖² with a relative error of at most ``error``; None where none.

        Args:
            before: B, ``(r, C·K)``; the weight is approximated by A B.
            weights: w, ``(r,)``.
            error: below 1.
        """
        product, gram = self._normal(before)
        return bounded(product, gram, weights, self.energy, error**2 * self.energy)

    def scale(self, approximation: Iterable[Tensor]) -> tuple[float, float]:
        """The best single factor for an approximation, and the relative error with it.

        Args:
            approximation: its rows in order, ``(n, C·K)`` or ``(n, C, *kernel)`` at a time.
        """
        cross, square, start = 0.0, 0.0, 0
        for rows in approximation:
            theirs = rows.double().flatten(1)
            weighted = theirs @ self.second
            cross += float((weighted * self.flat[start : start + len(rows)]).sum())
            square += float((weighted * theirs).sum())
            start += len(rows)
        scale = cross / square if square > 0 else 1.0
        return scale, self._relative(self.energy - 2 * scale * cross + scale**2 * square)

    def _blocks(self) -> Iterable[Tensor]:
        return blocks(self.flat, torch.float64)

    def _normal(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """W S Bᵀ and B S Bᵀ."""
        weighted = before @ self.second
        return torch.cat([block @ weighted.T for block in self._blocks()]), weighted @ before.T

    def _energy(self, flat: Tensor) -> float:
        return float(((flat @ self.second) * flat).sum())

    def _relative(self, left: float) -> float:
        """An output that is always zero is lost by nothing; by round-off its energy may be below zero."""
        return 0.0 if self.energy <= 0 else math.sqrt(max(left, 0.0) / self.energy)
