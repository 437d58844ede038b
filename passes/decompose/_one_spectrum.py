"""Errors and factors of forms that truncate one matrix: one eigendecomposition gives both."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tdcompile.ir.layer import Ranks
from tdcompile.numerics.covariance import Covariance
from tdcompile.numerics.kept_bases import keep, take
from tdcompile.numerics.low_rank import balance, low_rank, low_rank_spectrum


def spectrum_errors(
    weight: Tensor, covariance: Covariance, operands: tuple[Tensor, Covariance], space: Sequence[Ranks]
) -> list[float]:
    """Return the error at each rank, and keep the vectors of all ranks but the exact one for ``truncated``.

    Args:
        weight: the layer's weight.
        covariance: of its input.
        operands: the weight as ``(T, N)`` and the covariance, in the precision to compute in.
        space: one rank each.
    """
    flat, metric = operands
    most = max((rank for (rank,) in space if rank < min(flat.shape)), default=0)
    errors, basis = low_rank_spectrum(flat, metric, most)
    keep(weight, covariance, basis)
    found = errors.tolist()
    return [found[rank] for (rank,) in space]


def truncated(
    weight: Tensor, covariance: Covariance, operands: tuple[Tensor, Covariance], rank: int
) -> tuple[Tensor, Tensor]:
    """Return ``(r, N)`` and ``(T, r)``, balanced, from the vectors that ``spectrum_errors`` kept, if it did."""
    flat, metric = operands
    last, first = balance(low_rank(flat, metric, rank, take(weight, covariance, rank)))
    return first, last
