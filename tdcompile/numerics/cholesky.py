"""Cholesky factors of covariances, with a ridge that grows if round-off left the matrix indefinite."""

from __future__ import annotations

import torch
from torch import Tensor

# Ridge, relative to the mean diagonal: inputs that the calibration data hardly shows keep a little weight.
RIDGE = 1e-4
# Upper bound on how often the ridge grows fourfold: from the round-off of float64, 40 times exceed any entry.
GROWTHS = 40


def ridge(diagonal: Tensor) -> float:
    """Return the ridge for a matrix with this diagonal; it is positive even if the diagonal is zero."""
    least: float = torch.finfo(diagonal.dtype).tiny ** 0.5
    return max(RIDGE * float(diagonal.mean()), least)


def cholesky(matrix: Tensor, extra: float) -> Tensor:
    """Return the lower triangular L with L Lᵀ = S + extra·I; ``definite`` raises extra where it must."""
    return definite(matrix, extra)[0]


def definite(matrix: Tensor, extra: float) -> tuple[Tensor, float]:
    """Return the lower triangular L with L Lᵀ = S + extra·I, and extra.

    If float32 cannot represent the smallest pivots, the factor is computed in float64. If S + extra·I is indefinite,
    extra grows. Sums in float32 give an S of low rank slightly negative eigenvalues, and a change of basis may enlarge
    them. Extra ends at least twice as large as the most negative eigenvalue, so that no direction of round-off looks
    free.
    """
    found = _factor(matrix, extra)
    if found is None and matrix.dtype is not torch.float64:
        matrix, given = matrix.double(), matrix.dtype
        root, extra = definite(matrix, extra)
        return root.to(given), extra
    if found is not None:
        return found, extra
    more = max(extra, torch.finfo(matrix.dtype).eps * float(matrix.abs().max()))
    for _ in range(GROWTHS):
        more *= 4
        if _factor(matrix, more) is not None:
            break
    return torch.linalg.cholesky(_shifted(matrix, 2 * more)), 2 * more


def _factor(matrix: Tensor, extra: float) -> Tensor | None:
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(_shifted(matrix, extra))
    return None if bool(failed) else root


def _shifted(matrix: Tensor, extra: float) -> Tensor:
    shifted = matrix.clone()
    shifted.diagonal().add_(extra)
    return shifted
