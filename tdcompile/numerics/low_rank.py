"""Matrix algebra of the closed-form decompositions: unfoldings, (whitened) truncated SVDs, errors of all ranks at once.

Throughout, a weight is ``flat``, ``(T, N)``; S is the second moment of its input, ``(N, N)``, and None stands for the
identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from tdcompile.errors import InputError
from tdcompile.numerics.covariance import Sketch

M = TypeVar("M", bound=Tensor | Sketch | None)

# Matrices up to this side are worked in float64: above it an eigendecomposition takes seconds, and float32 halves them.
PRECISE = 2048
# Ridge in units of the mean diagonal of S: directions the calibration data hardly shows keep a little weight.
RIDGE = 1e-4
# Entries that are brought to another precision, or multiplied by S, at a time: 16 MB in float64.
BLOCK = 2**21
# How often the ridge of a matrix that round-off left indefinite grows fourfold, from round-off of float64 on: past all.
GROWTHS = 40


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """The mode-``mode`` unfolding: that axis first, the others flattened in order."""
    return tensor.movedim(mode, 0).flatten(1)


def operands(weight: Tensor, second: M, side: int) -> tuple[Tensor, M]:
    """W as ``(T, N)`` and S on its device, without gradients, in the precision for matrices of that side.

    Raises:
        InputError: one of them holds NaN or Inf.
    """
    flat = matrix_of(weight, second).to(torch.float64 if side <= PRECISE else torch.float32)
    return flat, cast(M, None if second is None else second.to(flat))


def matrix_of(weight: Tensor, second: Tensor | Sketch | None) -> Tensor:
    """W as ``(T, N)`` without gradients: the same memory, but for half precision, which becomes float32.

    Raises:
        InputError: W or S holds NaN or Inf.
    """
    flat = weight.detach().flatten(1)
    flat = flat if flat.dtype is torch.float64 else flat.float()
    figures = {"the weight": flat}
    if second is not None:
        figures["the second moment"] = second.diagonal()[None] if isinstance(second, Sketch) else second
    # A sum is finite only if its members are, and takes a tenth of the time of looking at each.
    for what, matrix in figures.items():
        if not all(bool(torch.isfinite(block.sum())) for block in blocks(matrix, torch.float64)):
            raise InputError(f"{what} of a layer to decompose holds NaN or Inf; decompositions need finite figures")
    return flat


def ridge(second: Tensor | Sketch) -> float:
    """What is added to the diagonal of S: above 0 even where the data shows nothing at all."""
    diagonal = second.diagonal()
    least: float = torch.finfo(diagonal.dtype).tiny ** 0.5
    return max(RIDGE * float(diagonal.mean()), least)


def cholesky(second: Tensor, extra: float) -> Tensor:
    """Lower L with L Lᵀ = S + extra·I, or with more than that where it takes more: see ``definite``."""
    return definite(second, extra)[0]


def definite(second: Tensor, extra: float) -> tuple[Tensor, float]:
    """Lower L with L Lᵀ = S + extra·I, and the extra; in float64 where float32 does not carry the smallest pivots.

    The extra is the one given wherever that makes S definite. Sums in float32 give an S of low rank eigenvalues a
    little below zero, and a change of basis may make them large: then it grows until it is at least twice as large as
    the least of them is negative, so that no direction of mere round-off is taken for one that costs nothing.
    """
    found = _factor(second, extra)
    if found is None and second.dtype is not torch.float64:
        second, given = second.double(), second.dtype
        root, extra = definite(second, extra)
        return root.to(given), extra
    if found is not None:
        return found, extra
    more = max(extra, torch.finfo(second.dtype).eps * float(second.abs().max()))
    for _ in range(GROWTHS):
        more *= 4
        if _factor(second, more) is not None:
            break
    return torch.linalg.cholesky(_shifted(second, 2 * more)), 2 * more


def _factor(second: Tensor, extra: float) -> Tensor | None:
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(_shifted(second, extra))
    return None if bool(failed) else root


def _shifted(second: Tensor, extra: float) -> Tensor:
    shifted = second.clone()
    shifted.diagonal().add_(extra)
    return shifted


def leading(flat: Tensor, second: Tensor | Sketch | None, rank: int) -> Tensor:
    """The leading left singular vectors of ``flat`` (S + ridge)^½, ``(T, rank)``.

    They come from the Gram matrix of its smaller side, and no copy of ``flat`` is made; for ranks beyond that side the
    basis is completed. In the precision of ``flat``.
    """
    return _leading(flat, second, rank).to(flat.dtype)


def _leading(flat: Tensor, second: Tensor | Sketch | None, rank: int) -> Tensor:
    """The same in float64 where that side is at most ``PRECISE``."""
    rows, columns = flat.shape
    if rows <= columns:
        return _eigenvectors(_ridged(flat, second), rank)
    inner, root = gram(flat, columnwise=True), None
    if second is not None:
        root = root_of(second, ridge(second)).to(inner)
        inner = root.T @ inner @ root
    right = _eigenvectors(inner, min(rank, columns))
    spread = right if root is None else root @ right
    mapped = spread.new_empty(rows, spread.shape[1])
    for start, block in zip(range(0, rows, _height(flat)), blocks(flat, spread.dtype), strict=True):
        mapped[start : start + len(block)] = block @ spread
    left: Tensor = torch.linalg.qr(mapped, mode="complete" if rank > columns else "reduced").Q
    return left[:, :rank]


def low_rank(flat: Tensor, second: Tensor | Sketch | None, rank: int) -> tuple[Tensor, Tensor]:
    """``last`` (T, r) and ``first`` (r, N) whose product minimises ‖(W−W̃)S^½‖_F, each component's norm split evenly.

    In the precision of ``flat``.
    """
    last = _leading(flat, second, rank)
    first = flat.new_empty(rank, flat.shape[1])
    for start in range(0, flat.shape[1], step := max(1, BLOCK // len(flat))):
        first[:, start : start + step] = last.T @ flat[:, start : start + step].to(last.dtype)
    root = first.norm(dim=1).clamp(min=torch.finfo(first.dtype).tiny).sqrt()
    return last.to(flat.dtype) * root, first.div_(root[:, None])


def low_rank_errors(flat: Tensor, second: Tensor | Sketch | None) -> Tensor:
    """The relative error of ``low_rank`` at every rank 0, 1, ..., min(T, N), measured with S itself, not the ridge."""
    rows, columns = flat.shape
    if second is None:
        energies: Tensor = torch.linalg.eigvalsh(gram(flat, columnwise=rows > columns)).flip(0)
    elif rows <= columns:
        of_output = weighted_gram(flat, second)
        vectors = torch.linalg.eigh(gram(flat).mul_(ridge(second)).add_(of_output)).eigenvectors
        energies = vectors.mul_(of_output @ vectors).sum(0).flip(0)
    else:
        inner = gram(flat, columnwise=True)
        root = root_of(second, ridge(second)).to(inner)
        values, vectors = torch.linalg.eigh(root.T @ inner @ root)
        squares, right = values.flip(0)[:columns].clamp(min=0), vectors[:, -columns:].flip(1)
        # With u = W L v / σ the energy of a component is uᵀ W S Wᵀ u, and the ridge takes it no higher than σ².
        mapped = (inner @ (root @ right)).T
        energies = ((mapped @ second.to(inner)) * mapped).sum(1) / squares.clamp(min=torch.finfo(squares.dtype).tiny)
        energies = energies.minimum(squares)
    tails = energies.double().clamp(min=0).flip(0).cumsum(0).flip(0)
    return (torch.cat([tails, tails.new_zeros(1)]) / tails[0].clamp(min=torch.finfo(tails.dtype).tiny)).sqrt()


def gram(flat: Tensor, columnwise: bool = False) -> Tensor:
    """W Wᵀ, or Wᵀ W, from blocks of rows; in float64 where that side is at most ``PRECISE``."""
    if columnwise:
        columns = flat.shape[1]
        inner = torch.zeros(columns, columns, dtype=_precision(flat, columns), device=flat.device)
        for block in blocks(flat, inner.dtype):
            inner.addmm_(block.T, block)
        return inner
    return weighted_gram(flat, None)


def weighted_gram(flat: Tensor, second: Tensor | Sketch | None) -> Tensor:
    """W S Wᵀ, ``(T, T)``, from blocks of rows; in float64 where T is at most ``PRECISE``."""
    found = torch.zeros(len(flat), len(flat), dtype=_precision(flat, len(flat)), device=flat.device)
    metric, height = None if second is None else second.to(found), _height(flat)
    for row, block in zip(range(0, len(flat), height), blocks(flat, found.dtype), strict=True):
        weighted = block if metric is None else block @ metric
        for column in range(0, row + 1, height):
            part = weighted @ flat[column : column + height].to(found.dtype).T
            found[row : row + height, column : column + height] = part
            found[column : column + height, row : row + height] = part.T
    return found


def blocks(flat: Tensor, precision: torch.dtype) -> Iterator[Tensor]:
    """The rows of a matrix in that precision, about ``BLOCK`` entries at a time."""
    for start in range(0, len(flat), height := _height(flat)):
        yield flat[start : start + height].to(precision)


def energy(flat: Tensor) -> float:
    """‖W‖², summed in float64 without a copy of W in it."""
    return sum(float(block.square().sum()) for block in blocks(flat, torch.float64))


def root_of(second: Tensor | Sketch, extra: float) -> Tensor:
    """L with L Lᵀ = S + extra·I; lower triangular, ``(N, N)``, but for a sketch."""
    return second.root(extra) if isinstance(second, Sketch) else cholesky(second, extra)


def _ridged(flat: Tensor, second: Tensor | Sketch | None) -> Tensor:
    """W (S + ridge) Wᵀ."""
    found = weighted_gram(flat, second)
    return found if second is None else found.add_(gram(flat), alpha=ridge(second))


def _eigenvectors(symmetric: Tensor, count: int) -> Tensor:
    """As columns, those of the largest eigenvalues, that of the largest first."""
    vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors
    return vectors[:, len(vectors) - count :].flip(1)


def _height(flat: Tensor) -> int:
    return max(1, BLOCK // max(flat.shape[1], 1))


def _precision(flat: Tensor, side: int) -> torch.dtype:
    return torch.float64 if side <= PRECISE else flat.dtype


def balance(factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The factors scaled so that all have the same root-mean-square norm of an output's row; their product stays.

    A chain whose factors differ by orders of magnitude computes the same and diverges under one learning rate.
    """
    gains = torch.stack([factor.norm() / len(factor) ** 0.5 for factor in factors])
    if not bool((gains > 0).all()):
        return tuple(factors)
    scales = gains.log().mean().exp() / gains
    return tuple(factor * scale for factor, scale in zip(factors, scales, strict=True))
