"""``NystromSketch``: accumulates the covariance of a wide layer, whose matrix would be too large to keep."""

from __future__ import annotations

import torch
from torch import Tensor

from tdcompile.numerics.covariance import LowRankPlusDiagonal

# Rows that are converted or solved at a time: a float64 copy of all of them would double the memory.
ROWS = 1024


class NystromSketch:
    """Accumulates E[x xᵀ] of a stream of rows x as a randomised Nyström sketch.

    The method is Tropp et al. 2017, arXiv 1706.05736, algorithms 1 to 3. With Ω orthonormal and random, ``(N, k)``, it
    keeps only the sum Y = Σ x (xᵀ Ω). Then S ≈ Y (Ωᵀ Y)⁻¹ Yᵀ, which never exceeds S and equals S if its rank is at most
    k. The diagonal is summed exactly beside it. The part that the sketch does not explain becomes
    ``LowRankPlusDiagonal.rest`` (this project's completion), so that every input keeps its whole weight.

    Attributes:
        seen: number of added rows.

    Args:
        size: N.
        rank: k.
        generator: draws Ω.
    """

    def __init__(self, size: int, rank: int, generator: torch.Generator) -> None:
        probes = torch.randn(size, min(rank, size), dtype=torch.float64, generator=generator)
        self._probes = torch.linalg.qr(probes).Q
        self._sum = torch.zeros(self._probes.shape, dtype=torch.float64)
        self._squares = torch.zeros(size, dtype=torch.float64)
        self.seen = 0

    def add(self, rows: Tensor) -> None:
        """Add rows x, ``(n, N)``."""
        for name in ("_probes", "_sum", "_squares"):
            setattr(self, name, getattr(self, name).to(rows.device))
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS].to(torch.float64)
            self._sum.addmm_(part.T, part @ self._probes)
            self._squares += part.square().sum(0)
        self.seen += len(rows)

    def result(self) -> LowRankPlusDiagonal:
        """Return the covariance in float32. It overwrites the sums, so that no second array of their size is made."""
        Y, probes, squares = self._sum.div_(self.seen), self._probes, self._squares / self.seen
        # The shift keeps the core definite despite round-off. It is subtracted from the eigenvalues below (ibid.).
        shift = torch.finfo(Y.dtype).eps * float(Y.norm()) + torch.finfo(Y.dtype).tiny ** 0.5
        core = probes.T @ Y.add_(probes, alpha=shift)
        upper = torch.linalg.cholesky((core + core.T) / 2).T
        for start in range(0, len(Y), ROWS):
            rows = Y[start : start + ROWS]
            rows.copy_(torch.linalg.solve_triangular(upper, rows, upper=True, left=False))
        values, vectors = torch.linalg.eigh(Y.T @ Y)
        values, vectors = values.flip(0), vectors.flip(1)
        turn = vectors * ((values - shift).clamp_min(0) / values.clamp_min(shift)).sqrt()
        factor = torch.empty(Y.shape, dtype=torch.float32, device=Y.device)
        for start in range(0, len(Y), ROWS):
            factor[start : start + ROWS] = Y[start : start + ROWS] @ turn
        left = squares - torch.linalg.vector_norm(factor, dim=1).square()
        return LowRankPlusDiagonal(factor, left.clamp_min(0).float(), self.seen)
