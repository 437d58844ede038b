"""The normal equations of least squares in the metric of a sketch: no matrix has as many rows and columns as inputs.

For W ≈ G B with B = Aᵀ ⊗ I_K (``tdcompile.inputmap``) and S = F Fᵀ + diag(d) (``tdcompile.sketch``) the matrix

    B (S + extra) Bᵀ = D + B F Fᵀ Bᵀ = L (I + H Hᵀ) Lᵀ,    H = L⁻¹ B F

has a D with one block Aᵀ diag(d_k) A + extra for each tap k. Its Cholesky factor L is K triangles of r x r, and the
inverse of I + H Hᵀ is that of a matrix of F's rank (the matrix inversion lemma, Woodbury 1950).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from tdcompile.sketch import Sketch


class Normal:
    """B (S + extra) Bᵀ of a sketch, in float64; leading components by themselves are those of a smaller map.

    Rows given and returned are ``(T, r·K)``, by component and within it by tap.

    Args:
        sketch: S.
        basis: A, ``(G, r)``.
        extra: the ridge, above 0; kept as an attribute.
    """

    def __init__(self, sketch: Sketch, basis: Tensor, extra: float) -> None:
        self.extra = extra
        basis, self._taps = basis.double(), len(sketch) // len(basis)
        factor, rest = (part.to(basis) for part in sketch.by_tap(self._taps))
        blocks = torch.stack([basis.T @ (rest[:, tap, None] * basis) for tap in range(self._taps)])
        blocks.diagonal(dim1=1, dim2=2).add_(extra)
        self._lower = torch.linalg.cholesky(blocks)  # (K, r, r)
        seen = torch.einsum("gkf,gi->kif", factor, basis)
        self._spread = torch.linalg.solve_triangular(self._lower, seen, upper=False)  # H, (K, r, k)

    def explained(self, cross: Tensor) -> Tensor:
        """Y = C L⁻ᵀ (I + H Hᵀ)^-½ for rows C: Y Yᵀ is what a regression of cross products C explains."""
        return self._joined(self._calmed(self._reduced(cross))).to(cross)

    def settle(self, explained: Tensor) -> Tensor:
        """The core Y (I + H Hᵀ)^-½ L⁻¹ of such a regression."""
        return self._joined(self._solved(self._calmed(self._parted(explained)))).to(explained)

    def levels(self, cross: Tensor, ranks: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """For the first r components, r from ``ranks`` in rising order: the energy explained, ``(T,)``, and the core.

        The energy is a difference of large figures, and in float64; the core in the precision of ``cross``.
        """
        reduced, start, width = self._reduced(cross), 0, self._spread.shape[2]
        square, seen = reduced.new_zeros(len(cross)), reduced.new_zeros(len(cross), width)
        inner = torch.eye(width).to(reduced)  # I + Hᵀ H
        for rank in ranks:
            rows, spread = reduced[:, :, start:rank], self._spread[:, start:rank]
            square = square + rows.square().sum((0, 2))
            seen = seen + torch.einsum("ktr,krf->tf", rows, spread)
            inner = inner + torch.einsum("krf,krg->fg", spread, spread)
            start = rank
            lower = torch.linalg.cholesky(inner)
            half = torch.linalg.solve_triangular(lower, seen.T, upper=False)
            back: Tensor = torch.linalg.solve_triangular(lower.T, half, upper=True).T  # (T, k)
            left = (reduced[:, :, :rank] - back @ self._spread[:, :rank].mT).to(cross)
            yield square - half.square().sum(0), self._joined(self._solved(left))

    def _reduced(self, rows: Tensor) -> Tensor:
        """Rows times L⁻ᵀ, by tap."""
        found: Tensor = torch.linalg.solve_triangular(self._lower.mT, self._parted(rows), upper=True, left=False)
        return found

    def _solved(self, parts: Tensor) -> Tensor:
        """Rows by tap times L⁻¹, of as many components as they have."""
        rank = parts.shape[2]
        lower = self._lower[:, :rank, :rank].to(parts)
        found: Tensor = torch.linalg.solve_triangular(lower, parts, upper=False, left=False)
        return found

    def _calmed(self, parts: Tensor) -> Tensor:
        """Rows by tap times (I + H Hᵀ)^-½."""
        turned, weights = self._root
        change: Tensor = (torch.einsum("ktr,krf->tf", parts, turned) * weights) @ turned.mT
        return parts + change

    @cached_property
    def _root(self) -> tuple[Tensor, Tensor]:
        """H V and w with (I + H Hᵀ)^-½ = I + H V diag(w) Vᵀ Hᵀ, where V λ Vᵀ = Hᵀ H and w = ((1 + λ)^-½ − 1) / λ."""
        values, vectors = torch.linalg.eigh(torch.einsum("krf,krg->fg", self._spread, self._spread))
        roots = (1 + values.clamp(min=0)).sqrt()
        return self._spread @ vectors, -1 / (roots * (1 + roots))  # w in a form that has no 0 / 0

    def _parted(self, rows: Tensor) -> Tensor:
        return rows.double().reshape(len(rows), -1, self._taps).permute(2, 0, 1)

    def _joined(self, parts: Tensor) -> Tensor:
        return parts.permute(1, 2, 0).flatten(1)
