"""The metric of a layer's output, ‖(W−W̃)S^½‖ with S the second moment of its input, and least squares in it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tdcompile.linalg import cholesky, ridge


class OutputMetric:
    """Measures approximations of one weight by what the layer's output loses.

    Attributes:
        flat: the weight as ``(T, C·K)``, float64.
        second: S, ``(C·K, C·K)``, float64.
    """

    def __init__(self, weight: Tensor, second: Tensor) -> None:
        self.flat = weight.detach().double().flatten(1)
        self.second = second.to(self.flat)
        self._weighted = self.flat @ self.second
        self.energy = float((self._weighted * self.flat).sum())

    def channel_root(self, channels: int) -> Tensor:
        """Lower triangular L with L Lᵀ = the mean over the taps of S's C x C diagonal blocks, plus a ridge."""
        blocks = self.second.reshape(channels, -1, channels, self.second.shape[0] // channels)
        block = blocks.diagonal(dim1=1, dim2=3).mean(-1)
        return cholesky(block, ridge(block))

    def refit(self, last: Tensor, before: Tensor) -> tuple[Tensor, float]:
        """The last factor, found again by least squares: W S Bᵀ (B S Bᵀ)⁻¹, held to the one given by a proximal term.

        Args:
            last: A, ``(T, r)``.
            before: B, ``(r, C·K)``; the weight is approximated by A B.

        Returns:
            The new A, never worse than the one given, and its relative error.
        """
        gram = before @ self.second @ before.T
        product = self._weighted @ before.T
        hold = ridge(gram)
        found = torch.cholesky_solve((product + hold * last).T, cholesky(gram, hold)).T
        left = self.energy - 2 * float((product * found).sum()) + float(((found @ gram) * found).sum())
        return found, math.sqrt(max(left, 0.0) / max(self.energy, torch.finfo(gram.dtype).tiny))

    def scale(self, approximation: Tensor) -> tuple[float, float]:
        """The best single factor for an approximation ``(T, C·K)``, and the relative error with it."""
        approximation = approximation.double().flatten(1)
        cross = float((self._weighted * approximation).sum())
        square = float((approximation @ self.second * approximation).sum())
        scale = cross / square if square > 0 else 1.0
        left = self.energy - 2 * scale * cross + scale**2 * square
        return scale, math.sqrt(max(left, 0.0) / max(self.energy, torch.finfo(torch.float64).tiny))
