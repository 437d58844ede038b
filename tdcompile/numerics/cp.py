"""CP decomposition by alternating least squares.

tensorly keeps its backend in a global, so that every call is inside ``backend_context``. Its ``parafac`` is not used:
for the short mode of a convolution it forms a Khatri-Rao product of T·C rows, which takes gigabytes. A sweep here takes
megabytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import cast

import tensorly as tl
import torch
from torch import Tensor

from tdcompile.numerics.low_rank import column_basis

# Weight of the old factor in each least-squares update: it keeps the system solvable, and no update raises the error.
PROXIMAL = 1e-8
# A CP counts as degenerate if its component norm over the tensor norm exceeds this ratio (Phan et al. 2020).
DEGENERATE = 10.0


@torch.no_grad()
def cp_als(tensor: Tensor, start: Sequence[Tensor], sweeps: int, tolerance: float = 1e-5) -> list[Tensor]:
    """Return a CP approximation: factors ``(I_n, rank)`` in float64, the norm of each component split equally.

    If components grow large and cancel each other, the fit is repeated with a larger Tikhonov term.

    Args:
        tensor: ``(T, C, k1, k2, ...)``, the long modes first.
        start: initial factors (``slice_start``).
        sweeps: upper bound on the passes over all modes.
        tolerance: stop once a sweep lowers the squared relative error by less.
    """
    tensor = tensor.double()
    energy = float(tensor.square().sum())
    for ridge in (0.0, 1e-3, 1e-2, 1e-1):
        factors, residual = balanced(start), math.inf
        grams = [factor.T @ factor for factor in factors]
        for _ in range(sweeps):
            factors, grams, gained = _sweep(tensor, factors, grams, ridge)
            left = energy - gained
            if residual - left <= tolerance * energy:
                break
            residual = left
        if component_norm(factors) <= DEGENERATE * math.sqrt(energy):
            break
    return factors


@torch.no_grad()
def slice_start(tensor: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return a CP from the SVDs of all T x C slices: the error at each rank, and factors, strongest component first.

    The short modes are first rotated to their HOSVD bases, where few slices hold most of the energy. A singular
    pair u, v of slice (i, j, ...) has the columns i, j, ... of those bases as its other factors, so the first r pairs
    are a CP of rank r; all of them together are exact.

    Returns:
        The relative error at ranks 0, 1, 2, ..., and the factors with all components.
    """
    tensor = tensor.double()
    short = list(range(2, tensor.ndim))
    with tl.backend_context("pytorch"):
        bases = [column_basis(tl.unfold(tensor, mode)) for mode in short]
        slices = tl.tenalg.multi_mode_dot(tensor, bases, modes=short, transpose=True).flatten(2).permute(2, 0, 1)
    tall = slices if slices.shape[1] >= slices.shape[2] else slices.mT
    squares, narrow = torch.linalg.eigh(tall.mT @ tall)
    order = squares.flatten().argsort(descending=True, stable=True)
    row, column = order // narrow.shape[2], order % narrow.shape[2]
    long = [(tall @ narrow)[row, :, column].T, narrow[row, :, column].T]
    tails = [base[:, at] for base, at in zip(bases, torch.unravel_index(row, tensor.shape[2:]), strict=True)]
    kept = squares.clamp_min(0).flatten()[order].cumsum(0)
    left = 1 - torch.cat([kept.new_zeros(1), kept]) / kept[-1].clamp_min(torch.finfo(kept.dtype).tiny)
    return left.clamp_min(0).sqrt(), [*(long if tall is slices else long[::-1]), *tails]


@torch.no_grad()
def cp_exact(tensor: Tensor, rank: int) -> list[Tensor]:
    """Return an exact CP: one component for each entry of all modes but the longest.

    A component is the fibre along the longest mode, and unit vectors in the others.

    Args:
        tensor: of any shape.
        rank: at least the product of all extents but the largest; further components are zero.
    """
    tensor = tensor.double()
    free = max(range(tensor.ndim), key=lambda mode: tensor.shape[mode])
    fibres = tensor.movedim(free, 0).flatten(1)
    others = [size for mode, size in enumerate(tensor.shape) if mode != free]
    positions = torch.unravel_index(torch.arange(fibres.shape[1], device=tensor.device), others)
    factors = [
        torch.eye(n, dtype=tensor.dtype, device=tensor.device)[:, p] for n, p in zip(others, positions, strict=True)
    ]
    factors.insert(free, fibres)
    return balanced([torch.nn.functional.pad(factor, (0, rank - fibres.shape[1])) for factor in factors])


def cp_compose(factors: Sequence[Tensor]) -> Tensor:
    """Return the tensor of CP factors ``(I_n, rank)``."""
    with tl.backend_context("pytorch"):
        return cast(Tensor, tl.cp_to_tensor((None, list(factors))))


def columns_product(factors: Sequence[Tensor]) -> Tensor:
    """Return the Khatri-Rao product, ``(I_1·I_2·..., rank)``, the last index running fastest."""
    if len(factors) == 1:
        return factors[0]
    with tl.backend_context("pytorch"):
        return cast(Tensor, tl.tenalg.khatri_rao(list(factors)))


def balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    """Split the norm of each component equally over the modes; unequal norms diverge in training."""
    scales = _split(torch.stack([factor.norm(dim=0) for factor in factors]))
    return [factor * scale for factor, scale in zip(factors, scales, strict=True)]


def component_norm(factors: Sequence[Tensor]) -> float:
    """Return sqrt(Σ λ_r²), λ_r the norm of component r; it far exceeds the tensor's norm if components cancel."""
    return float(torch.stack([factor.norm(dim=0) for factor in factors]).prod(0).norm())


def _sweep(
    tensor: Tensor, factors: Sequence[Tensor], grams: Sequence[Tensor], ridge: float
) -> tuple[list[Tensor], list[Tensor], float]:
    """Update all modes once: the balanced factors, their Gram matrices, and how much the squared error is below ‖T‖².

    The tensor is multiplied twice. For small layers the number of calls into torch decides: Gram matrices are kept
    from one update to the next, and they have the norms of the components on their diagonals.
    """
    (A, B, *short), grams = factors, list(grams)
    flat, rank = tensor.flatten(1), A.shape[1]
    # B and the short modes all need the tensor times the old A, ``(C, K, rank)``: compute it once.
    outer = (flat.T @ A).reshape(len(B), -1, rank)
    inner = (outer * B.unsqueeze(1)).sum(0).reshape(*tensor.shape[2:], rank)
    for i, old in enumerate(short):
        others = [_along(short[j], j, len(short)) for j in range(len(short)) if j != i]
        product = reduce(torch.mul, others, inner).movedim(i, 0).reshape(len(old), -1, rank).sum(1)
        short[i] = _solve(product, reduce(torch.mul, grams[: i + 2] + grams[i + 3 :]), old, ridge)
        grams[i + 2] = short[i].T @ short[i]
    taps = reduce(_columns, short)
    B = _solve((outer * taps).sum(1), reduce(torch.mul, grams[2:], grams[0]), B, ridge)
    grams[1] = B.T @ B
    product, gram = flat @ _columns(B, taps), reduce(torch.mul, grams[1:])
    A = _solve(product, gram, A, ridge)
    grams[0] = A.T @ A
    gained = float(2 * (product * A).sum() - (gram * grams[0]).sum())
    scales = _split(torch.stack([gram.diagonal() for gram in grams]).sqrt())
    made = [factor * scale for factor, scale in zip((A, B, *short), scales, strict=True)]
    return made, [gram * scale * scale[:, None] for gram, scale in zip(grams, scales, strict=True)], gained


def _split(norms: Tensor) -> Tensor:
    """Return the scales that give the components of all modes the same norm, from their norms ``(modes, rank)``."""
    found: Tensor = norms.prod(0) ** (1 / len(norms)) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    return found


def _columns(left: Tensor, right: Tensor) -> Tensor:
    """Return the Khatri-Rao product of two factors: ``columns_product`` without the cost of tensorly's dispatch."""
    return (left.unsqueeze(1) * right).flatten(0, 1)


def _along(factor: Tensor, mode: int, modes: int) -> Tensor:
    """Return ``(k, rank)`` as ``(1, ..., k, ..., 1, rank)``, with k at that mode."""
    return factor.reshape(*[1] * mode, len(factor), *[1] * (modes - mode - 1), -1)


def _solve(product: Tensor, gram: Tensor, old: Tensor, ridge: float) -> Tensor:
    """Minimise ‖unfolding − X Zᵀ‖² + p‖X − old‖² + ridge‖X‖² over X; ``product`` = unfolding·Z, ``gram`` = ZᵀZ."""
    mean = gram.diagonal().mean() + torch.finfo(gram.dtype).tiny ** 0.5
    system = gram.clone()
    system.diagonal().add_(mean * (PROXIMAL + ridge))
    found: Tensor = torch.cholesky_solve((product + mean * PROXIMAL * old).T, torch.linalg.cholesky(system)).T
    return found
