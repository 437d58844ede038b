"""W ≈ G B through few inputs: a map A of the inputs, the same for all taps, and the least-squares core G.

A weight ``flat`` is ``(T, G·K)`` with K taps for each of G groups of inputs; S is the covariance of its input. An input
map A, ``(G, r)``, has orthonormal columns, and B = Aᵀ ⊗ I_K. ``normal_equations`` solves for the core.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdcompile.numerics.cholesky import cholesky
from tdcompile.numerics.covariance import Covariance
from tdcompile.numerics.low_rank import left_vectors, unfold
from tdcompile.numerics.normal_equations import NormalEquations, project


def input_map(flat: Tensor, covariance: Covariance, taps: int, rank: int) -> Tensor:
    """Return A, ``(G, rank)``: the best input map if S were a Kronecker product S_c ⊗ R.

    S_c = L Lᵀ is the mean over the taps of the G x G blocks of S. R is the mean over the groups of its K x K blocks.
    With Z the leading left singular vectors of Lᵀ W_(G) (I ⊗ R^½), the map is Zᵀ L⁻¹. It is orthonormalised in order,
    so that it is nested: the first r' columns serve rank r'. R matters, because neighbouring taps see nearly the same
    input, and their common part weighs most.
    """
    groups = flat.shape[1] // taps
    by_group = flat.reshape(-1, groups, taps)
    if covariance.is_identity:
        return left_vectors(unfold(by_group, 1), rank)
    extra = covariance.ridge()
    root = cholesky(covariance.between_groups(taps).to(flat), extra)
    weighted = unfold(by_group @ cholesky(covariance.between_taps(taps).to(flat), extra), 1)
    vectors = left_vectors(root.T @ weighted, rank)
    basis: Tensor = torch.linalg.qr(torch.linalg.solve_triangular(root.T, vectors, upper=True)).Q
    return basis


def regress(flat: Tensor, covariance: Covariance, basis: Tensor) -> tuple[Tensor, NormalEquations]:
    """Return Y and the normal equations; their ``settle(Y)`` is the least-squares core G of W ≈ G B.

    Y is the output that B explains, in coordinates of unit variance.
    """
    equations = covariance.normal_equations(basis)
    return equations.explained(equations.cross(flat, flat @ covariance)), equations


def core_of(flat: Tensor, covariance: Covariance, basis: Tensor) -> Tensor:
    """Return G, ``(T, r·K)``: the least-squares core of W ≈ G B in the metric of S; exact if B spans all inputs."""
    if basis.shape[0] == basis.shape[1]:
        return project(flat, basis)
    explained, equations = regress(flat, covariance, basis)
    return equations.settle(explained)


def residuals(flat: Tensor, covariance: Covariance, basis: Tensor, levels: Sequence[int]) -> Tensor:
    """Return for each row of W and each level r the energy of W − G B in the metric of S, ``(T, levels)``.

    G is ``core_of`` with the first r columns of A. Level 0 has the energy of W itself.
    """
    return covariance.normal_equations(basis).residuals(flat, flat @ covariance, levels)


def refine(flat: Tensor, covariance: Covariance, core: Tensor, basis: Tensor, steps: int) -> Tensor:
    """Return the input map after conjugate-gradient steps on ‖(W − G B)(S + ridge)^½‖² with the core G fixed."""
    groups, rank = basis.shape
    kernel, extra = core.reshape(len(core), rank, -1), covariance.ridge()

    def pull(residual: Tensor) -> Tensor:
        weighted = residual @ covariance + extra * residual
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
