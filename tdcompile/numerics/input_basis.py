"""W ≈ G B with few inputs: a map A of the inputs, alike for all taps, and the least-squares core G in the metric of S.

A weight ``flat`` is ``(T, G·K)`` with K taps for each of G groups of inputs; S is the second moment of its input, a
sketch of it, or None for the identity. An input map A, ``(G, r)``, has orthonormal columns, and B = Aᵀ ⊗ I_K is ordered
by component: the first r'·K rows of B belong to the first r' components. Hence one Cholesky factor of B S Bᵀ holds
those of all smaller ranks as its leading blocks, and one regression the errors of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from tdcompile.numerics.covariance import Sketch
from tdcompile.numerics.low_rank import cholesky, definite, leading, ridge, unfold


def input_map(flat: Tensor, second: Tensor | Sketch | None, taps: int, rank: int) -> Tensor:
    """A, ``(G, rank)``: the row space of the leading output directions, were S a Kronecker product S_c ⊗ R.

    S_c = L Lᵀ is the mean over taps of S's G x G blocks, R the mean over groups of its K x K blocks. With Z the leading
    left singular vectors of Lᵀ W_(G) (I ⊗ R^½), the map is Zᵀ L⁻¹, made orthonormal in order, so that it stays nested:
    the first r' columns serve rank r'. R matters: neighbouring taps see nearly the same, and what they agree on weighs
    most.
    """
    groups = flat.shape[1] // taps
    by_group = flat.reshape(-1, groups, taps)
    if second is None:
        return leading(unfold(by_group, 1), None, rank)
    root = cholesky(between_groups(second, taps).to(flat), ridge(second))
    weighted = unfold(by_group @ cholesky(between_taps(second, taps).to(flat), ridge(second)), 1)
    vectors = leading(root.T @ weighted, None, rank)
    basis: Tensor = torch.linalg.qr(torch.linalg.solve_triangular(root.T, vectors, upper=True)).Q
    return basis


def between_groups(second: Tensor | Sketch, taps: int) -> Tensor:
    """The mean over the taps of S's G x G blocks, ``(G, G)``."""
    return between(second, 1, len(second) // taps, taps)


def between_taps(second: Tensor | Sketch, taps: int) -> Tensor:
    """The mean over the groups of S's K x K blocks, ``(K, K)``."""
    return between(second, len(second) // taps, taps, 1)


def between(second: Tensor | Sketch, ahead: int, size: int, behind: int) -> Tensor:
    """Of inputs in three modes the mean over the first and the last of S's blocks, ``(size, size)``."""
    if isinstance(second, Sketch):
        return second.between(ahead, size, behind)
    blocks = second.reshape(ahead, size, behind, ahead, size, behind)
    return torch.einsum("agbahb->gh", blocks) / (ahead * behind)


def mapped(flat: Tensor, basis: Tensor) -> Tensor:
    """``flat`` Bᵀ, ``(T, r·K)``."""
    return torch.einsum("tgk,gi->tik", flat.reshape(len(flat), len(basis), -1), basis).flatten(1)


def regress(flat: Tensor, second: Tensor | Sketch | None, basis: Tensor) -> tuple[Tensor, Tensor | Normal | None]:
    """Y and M with G = ``settle(Y, M)`` the least-squares core of W ≈ G B.

    Y is the output that B explains, in coordinates of unit variance. Of a matrix S it is W (S + ridge) Bᵀ L⁻ᵀ, and M is
    L with L Lᵀ = B (S + ridge) Bᵀ; of a sketch see ``tdcompile.normal``. Without S the core is Y itself and M None.
    """
    if second is None:
        return mapped(flat, basis), None
    if isinstance(second, Sketch):
        normal, cross = _normal(flat, flat @ second, second, basis)
        return normal.explained(cross), normal
    explained, root, _ = _regress(flat, flat @ second, second, basis)
    return explained, root


def _normal(flat: Tensor, weighted: Tensor, second: Sketch, basis: Tensor) -> tuple[Normal, Tensor]:
    """The normal equations in the metric of a sketch, and their right-hand side W (S + ridge) Bᵀ, from W and W S."""
    normal = Normal(second, basis, ridge(second))
    return normal, mapped(weighted + normal.extra * flat, basis)


def _regress(flat: Tensor, weighted: Tensor, second: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, float]:
    """Y, L and the ridge, which is more than S's own where that leaves B S Bᵀ indefinite; from W and W S."""
    groups = len(basis)
    half = (basis.T @ second.reshape(groups, -1)).reshape(-1, flat.shape[1])
    normal = (basis.T @ half.T.reshape(groups, -1)).reshape(len(half), len(half))  # half.T: the other side of S
    root, extra = definite(normal, ridge(second))
    cross = mapped(weighted + extra * flat, basis)
    explained: Tensor = torch.linalg.solve_triangular(root, cross.T, upper=False).T
    return explained, root, extra


def settle(explained: Tensor, root: Tensor | Normal | None) -> Tensor:
    """The core of a regression: G = Y L⁻¹, or Y itself."""
    if root is None:
        return explained
    if isinstance(root, Normal):
        return root.settle(explained)
    core: Tensor = torch.linalg.solve_triangular(root, explained, upper=False, left=False)
    return core


def core_of(flat: Tensor, second: Tensor | Sketch | None, basis: Tensor) -> Tensor:
    """G, ``(T, r·K)``: the least-squares core of W ≈ G B in the metric of S; exact where B spans everything."""
    if basis.shape[0] == basis.shape[1]:
        return mapped(flat, basis)
    return settle(*regress(flat, second, basis))


def residuals(flat: Tensor, second: Tensor | Sketch | None, basis: Tensor, levels: Sequence[int]) -> Tensor:
    """For each row of ``flat`` and each level r the energy of W − G B in the metric of S, ``(T, levels)``.

    Level 0 has that of W itself. G is ``core_of`` with the first r columns of A. Row by row the regression explains
    ‖Y[:, :r·K]‖² of the energy with the ridge, and the ridge's own share, ridge·‖w − g B‖², comes off.
    """
    taps = flat.shape[1] // len(basis)
    stops = [r * taps for r in levels]
    if second is None:
        return (flat.square().sum(1, keepdim=True) - _kept(mapped(flat, basis), stops)).clamp(min=0)
    weighted = flat @ second
    own, cross, lost = (weighted * flat).sum(1), mapped(flat, basis), []
    extra, fits = _nested(flat, weighted, second, basis, levels)
    for stop, (explained, core) in zip(stops, fits, strict=True):
        gap = (core * (core - 2 * cross[:, :stop])).sum(1)  # ‖w − g B‖² − ‖w‖²
        lost.append((own - explained - extra * gap).clamp(min=0))
    return torch.stack(lost, 1)


def _nested(
    flat: Tensor, weighted: Tensor, second: Tensor | Sketch, basis: Tensor, levels: Sequence[int]
) -> tuple[float, Iterator[tuple[Tensor, Tensor]]]:
    """The ridge, and for each level what its columns of A explain of each row's energy, and their core."""
    if isinstance(second, Sketch):
        normal, cross = _normal(flat, weighted, second, basis)
        return normal.extra, normal.levels(cross, levels)
    explained, root, extra = _regress(flat, weighted, second, basis)
    stops = [level * flat.shape[1] // len(basis) for level in levels]
    kept = _kept(explained, stops).unbind(1)
    cores = (settle(explained[:, :stop], root[:stop, :stop]) for stop in stops)
    return extra, zip(kept, cores, strict=True)


def _kept(explained: Tensor, stops: Sequence[int]) -> Tensor:
    """The energy of each row's first so many entries, float64."""
    return torch.nn.functional.pad(explained.square().cumsum(1, dtype=torch.float64), (1, 0))[:, stops]


def refine(flat: Tensor, second: Tensor | Sketch, core: Tensor, basis: Tensor, steps: int) -> Tensor:
    """The input map after some conjugate-gradient steps on ‖(W − G B)(S + ridge)^½‖² with the core G held."""
    groups, rank = basis.shape
    kernel, extra = core.reshape(len(core), rank, -1), ridge(second)

    def pull(residual: Tensor) -> Tensor:
        weighted = residual @ second + extra * residual
        return torch.einsum("tgk,tik->gi", weighted.reshape(len(flat), groups, -1), kernel)

    def push(change: Tensor) -> Tensor:
        return torch.einsum("tik,gi->tgk", kernel, change).flatten(1)

    downhill = pull(flat - push(basis))
    direction, slope = downhill, downhill.square().sum()
    for _ in range(steps):
        bent = pull(push(direction))
        curvature = (direction * bent).sum()
        if not curvature > 0:  # nothing left to gain
            break
        basis = basis + slope / curvature * direction
        downhill = downhill - slope / curvature * bent
        previous, slope = slope, downhill.square().sum()
        direction = downhill + slope / previous * direction
    orthonormal: Tensor = torch.linalg.qr(basis).Q
    return orthonormal


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
