"""Normal equations of W ≈ G B in the metric of a covariance S: the core G, and the energy that each rank explains.

``W`` is ``(T, G·K)`` with K taps for each of G groups of inputs. A basis A, ``(G, r)``, has orthonormal columns, and
B = Aᵀ ⊗ I_K is ordered by component. The first r'·K rows of B belong to the first r' components. Hence a factor of
B (S + extra·I) Bᵀ holds the factors of all smaller ranks as leading blocks.

There is one class for each kind of covariance, because the cheapest exact method differs. The identity needs no solver,
a full matrix one Cholesky factor, and low rank plus diagonal the Woodbury identity.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from tdcompile.numerics.cholesky import definite


def project(flat: Tensor, basis: Tensor) -> Tensor:
    """Return ``flat`` Bᵀ, ``(T, r·K)``."""
    return torch.einsum("tgk,gi->tik", flat.reshape(len(flat), len(basis), -1), basis).flatten(1)


class NormalEquations(ABC):
    """B (S + extra·I) Bᵀ for one basis, ready to solve.

    Attributes:
        basis: A, ``(G, r)``.
        extra: the ridge.
    """

    def __init__(self, basis: Tensor, extra: float) -> None:
        self.basis, self.extra = basis, extra

    def cross(self, flat: Tensor, weighted: Tensor) -> Tensor:
        """Return the right-hand side W (S + extra·I) Bᵀ, ``(T, r·K)``, from W and W S."""
        return project(weighted + self.extra * flat, self.basis)

    @abstractmethod
    def explained(self, cross: Tensor) -> Tensor:
        """Return Y, ``(T, r·K)``: Y Yᵀ is the energy that the regression of the cross products explains."""

    @abstractmethod
    def settle(self, explained: Tensor) -> Tensor:
        """Return the core G for Y, or for other rows in the coordinates of Y."""

    @abstractmethod
    def levels(self, cross: Tensor, ranks: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, for the first r components and r from ``ranks`` in rising order, the energy ``(T,)`` and the core."""

    def residuals(self, flat: Tensor, weighted: Tensor, ranks: Sequence[int]) -> Tensor:
        """Return for each row of W and each rank the energy of W − G B in the metric of S, ``(T, ranks)``.

        The regression explains ‖Y[:, :r·K]‖² of the energy with the ridge. The ridge's own share,
        extra·‖w − g B‖², is subtracted.
        """
        own, plain, lost = (weighted * flat).sum(1), project(flat, self.basis), []
        for explained, core in self.levels(self.cross(flat, weighted), ranks):
            gap = (core * (core - 2 * plain[:, : core.shape[1]])).sum(1)  # ‖w − g B‖² − ‖w‖²
            lost.append((own - explained - self.extra * gap).clamp(min=0))
        return torch.stack(lost, 1)


class IdentityEquations(NormalEquations):
    """S is the identity: B Bᵀ is the identity too, and the core is W Bᵀ."""

    def __init__(self, basis: Tensor) -> None:
        super().__init__(basis, 0.0)

    def cross(self, flat: Tensor, weighted: Tensor) -> Tensor:
        """Return W Bᵀ."""
        return project(flat, self.basis)

    def explained(self, cross: Tensor) -> Tensor:
        """Return the cross products: the coordinates are orthonormal."""
        return cross

    def settle(self, explained: Tensor) -> Tensor:
        """Return Y, which is the core."""
        return explained

    def levels(self, cross: Tensor, ranks: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the energy and the core of each rank: the leading columns of W Bᵀ."""
        stops = [rank * cross.shape[1] // self.basis.shape[1] for rank in ranks]
        for energy, stop in zip(_leading_energy(cross, stops).unbind(1), stops, strict=True):
            yield energy, cross[:, :stop]

    def residuals(self, flat: Tensor, weighted: Tensor, ranks: Sequence[int]) -> Tensor:
        """Return the energy of each row without its leading coordinates; no core is needed for that."""
        stops = [rank * flat.shape[1] // len(self.basis) for rank in ranks]
        kept = _leading_energy(project(flat, self.basis), stops)
        return (flat.square().sum(1, keepdim=True) - kept).clamp(min=0)


class FullEquations(NormalEquations):
    """S is a matrix: one Cholesky factor L of B (S + extra·I) Bᵀ.

    Args:
        matrix: S, ``(G·K, G·K)``.
        basis: A, ``(G, r)``.
        extra: the ridge; the attribute is larger if this one leaves B S Bᵀ indefinite.
    """

    def __init__(self, matrix: Tensor, basis: Tensor, extra: float) -> None:
        groups = len(basis)
        half = (basis.T @ matrix.reshape(groups, -1)).reshape(-1, len(matrix))
        normal = (basis.T @ half.T.reshape(groups, -1)).reshape(len(half), len(half))  # half.T: the other side of S
        self._root, extra = definite(normal, extra)
        super().__init__(basis, extra)

    def explained(self, cross: Tensor) -> Tensor:
        """Return Y = C L⁻ᵀ for cross products C."""
        found: Tensor = torch.linalg.solve_triangular(self._root, cross.T, upper=False).T
        return found

    def settle(self, explained: Tensor) -> Tensor:
        """Return the core Y L⁻¹; with fewer columns, the core of as many leading components."""
        size = explained.shape[1]
        root = self._root[:size, :size]
        core: Tensor = torch.linalg.solve_triangular(root, explained, upper=False, left=False)
        return core

    def levels(self, cross: Tensor, ranks: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the energy and the core of each rank, all from one regression."""
        explained = self.explained(cross)
        stops = [rank * cross.shape[1] // self.basis.shape[1] for rank in ranks]
        for energy, stop in zip(_leading_energy(explained, stops).unbind(1), stops, strict=True):
            yield energy, self.settle(explained[:, :stop])


class LowRankEquations(NormalEquations):
    """S = F Fᵀ + diag(d): a Cholesky factor for each tap, and a matrix of the rank of F (Woodbury), in float64.

    D = B (diag(d) + extra·I) Bᵀ = L Lᵀ is block diagonal by tap. With H = L⁻¹ B F, the normal matrix is
    L (I + H Hᵀ) Lᵀ. It is never formed. Rows that methods take and return are ``(T, r·K)``, by component and then tap.

    Args:
        factor: F, ``(G·K, k)``.
        rest: d, ``(G·K,)``.
        basis: A, ``(G, r)``.
        extra: the ridge, above 0.
    """

    def __init__(self, factor: Tensor, rest: Tensor, basis: Tensor, extra: float) -> None:
        super().__init__(basis, extra)
        basis, self._taps = basis.double(), len(rest) // len(basis)
        factor = factor.reshape(-1, self._taps, factor.shape[1]).to(basis)
        rest = rest.reshape(-1, self._taps).to(basis)
        blocks = torch.stack([basis.T @ (rest[:, tap, None] * basis) for tap in range(self._taps)])
        blocks.diagonal(dim1=1, dim2=2).add_(extra)
        self._lower = torch.linalg.cholesky(blocks)  # L, (K, r, r)
        seen = torch.einsum("gkf,gi->kif", factor, basis)
        self._spread = torch.linalg.solve_triangular(self._lower, seen, upper=False)  # H, (K, r, k)

    def explained(self, cross: Tensor) -> Tensor:
        """Return Y = C L⁻ᵀ (I + H Hᵀ)^-½ for cross products C."""
        return self._joined(self._whitened(self._reduced(cross))).to(cross)

    def settle(self, explained: Tensor) -> Tensor:
        """Return the core Y (I + H Hᵀ)^-½ L⁻¹."""
        return self._joined(self._solved(self._whitened(self._by_tap(explained)))).to(explained)

    def levels(self, cross: Tensor, ranks: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the energy and the core of each rank, from running sums over the components.

        The energy is a difference of large numbers and in float64. The core has the precision of ``cross``.
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
        """Return the rows times L⁻ᵀ, by tap."""
        found: Tensor = torch.linalg.solve_triangular(self._lower.mT, self._by_tap(rows), upper=True, left=False)
        return found

    def _solved(self, parts: Tensor) -> Tensor:
        """Return rows by tap times L⁻¹, for as many leading components as they have."""
        rank = parts.shape[2]
        lower = self._lower[:, :rank, :rank].to(parts)
        found: Tensor = torch.linalg.solve_triangular(lower, parts, upper=False, left=False)
        return found

    def _whitened(self, parts: Tensor) -> Tensor:
        """Return rows by tap times (I + H Hᵀ)^-½."""
        turned, weights = self._root
        change: Tensor = (torch.einsum("ktr,krf->tf", parts, turned) * weights) @ turned.mT
        return parts + change

    @cached_property
    def _root(self) -> tuple[Tensor, Tensor]:
        """Return H V and w with (I + H Hᵀ)^-½ = I + H V diag(w) Vᵀ Hᵀ, V λ Vᵀ = Hᵀ H and w = ((1 + λ)^-½ − 1) / λ."""
        values, vectors = torch.linalg.eigh(torch.einsum("krf,krg->fg", self._spread, self._spread))
        roots = (1 + values.clamp(min=0)).sqrt()
        return self._spread @ vectors, -1 / (roots * (1 + roots))  # w in a form that has no 0 / 0

    def _by_tap(self, rows: Tensor) -> Tensor:
        return rows.double().reshape(len(rows), -1, self._taps).permute(2, 0, 1)

    def _joined(self, parts: Tensor) -> Tensor:
        return parts.permute(1, 2, 0).flatten(1)


def _leading_energy(rows: Tensor, stops: Sequence[int]) -> Tensor:
    """Return the energy of each row's first entries, for each number of entries, in float64."""
    return torch.nn.functional.pad(rows.square().cumsum(1, dtype=torch.float64), (1, 0))[:, stops]
