"""Matrix algebra of the closed-form decompositions: unfoldings, (whitened) truncated SVDs, errors of all ranks at once.

Throughout, a weight is ``flat``, ``(T, N)``; S is the second moment of its input, ``(N, N)``, and None stands for the
identity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdcompile.errors import InputError

# Matrices up to this side are worked in float64: above it an eigendecomposition takes seconds, and float32 halves them.
PRECISE = 2048
# Ridge in units of the mean diagonal of S: directions the calibration data hardly shows keep a little weight.
RIDGE = 1e-4


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """The mode-``mode`` unfolding: that axis first, the others flattened in order."""
    return tensor.movedim(mode, 0).flatten(1)


def operands(weight: Tensor, second: Tensor | None, side: int) -> tuple[Tensor, Tensor | None]:
    """W as ``(T, N)`` and S on its device, without gradients, in the precision for matrices of that side.

    Raises:
        InputError: one of them holds NaN or Inf.
    """
    precision = torch.float64 if side <= PRECISE else torch.float32
    flat = weight.detach().flatten(1).to(precision)
    moments = None if second is None else second.detach().to(flat)
    for what, figures in (("the weight", flat), ("the second moment", moments)):
        # A sum is finite only if its members are, and takes a tenth of the time of looking at each.
        if figures is not None and not bool(torch.isfinite(figures.sum(dtype=torch.float64))):
            raise InputError(f"{what} of a layer to decompose holds NaN or Inf; decompositions need finite figures")
    return flat, moments


def ridge(second: Tensor) -> float:
    """What is added to the diagonal of S: above 0 even where the data shows nothing at all."""
    least: float = torch.finfo(second.dtype).tiny ** 0.5
    return max(RIDGE * float(second.diagonal().mean()), least)


def cholesky(second: Tensor, extra: float) -> Tensor:
    """Lower L with L Lᵀ = S + extra·I; in float64 where float32 does not carry the smallest pivots."""
    shifted = second.clone()
    shifted.diagonal().add_(extra)
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(shifted)
    return root if not bool(failed) else torch.linalg.cholesky(shifted.double()).to(second.dtype)


def leading(flat: Tensor, second: Tensor | None, rank: int) -> Tensor:
    """The leading left singular vectors of ``flat`` (S + ridge)^½, ``(T, rank)``.

    They come from the Gram matrix of its smaller side; for ranks beyond that side the basis is completed.
    """
    rows, columns = flat.shape
    if rows <= columns:
        weighted = flat if second is None else flat @ second + ridge(second) * flat
        vectors: Tensor = torch.linalg.eigh(weighted @ flat.T).eigenvectors
        return vectors.flip(1)[:, :rank]
    root = flat if second is None else flat @ cholesky(second, ridge(second))
    right = torch.linalg.eigh(root.T @ root).eigenvectors.flip(1)[:, :rank]
    left: Tensor = torch.linalg.qr(root @ right, mode="complete" if rank > columns else "reduced").Q
    return left[:, :rank]


def low_rank(flat: Tensor, second: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """``last`` (T, r) and ``first`` (r, N) whose product minimises ‖(W−W̃)S^½‖_F, each component's norm split evenly."""
    last = leading(flat, second, rank)
    first = last.T @ flat
    root = first.norm(dim=1).clamp(min=torch.finfo(first.dtype).tiny).sqrt()
    return last * root, first / root[:, None]


def low_rank_errors(flat: Tensor, second: Tensor | None) -> Tensor:
    """The relative error of ``low_rank`` at every rank 0, 1, ..., min(T, N), measured with S itself, not the ridge."""
    if second is None:
        small = flat if flat.shape[0] <= flat.shape[1] else flat.T
        energies: Tensor = torch.linalg.eigvalsh(small @ small.T).flip(0)
    else:
        first = leading(flat, second, min(flat.shape)).T @ flat
        energies = ((first @ second) * first).sum(1)
    tails = energies.double().clamp(min=0).flip(0).cumsum(0).flip(0)
    return (torch.cat([tails, tails.new_zeros(1)]) / tails[0].clamp(min=torch.finfo(tails.dtype).tiny)).sqrt()


def balance(factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The factors scaled so that all have the same root-mean-square norm of an output's row; their product stays.

    A chain whose factors differ by orders of magnitude computes the same and diverges under one learning rate.
    """
    gains = torch.stack([factor.norm() / len(factor) ** 0.5 for factor in factors])
    if not bool((gains > 0).all()):
        return tuple(factors)
    scales = gains.log().mean().exp() / gains
    return tuple(factor * scale for factor, scale in zip(factors, scales, strict=True))
