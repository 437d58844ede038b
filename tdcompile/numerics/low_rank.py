"""Low-rank approximation of a weight: (whitened) truncated SVDs, the error at every rank, and balanced factors.

A weight is ``flat``, ``(T, N)``. S is the covariance of its input. All errors are errors of the layer's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tdcompile.errors import InputError
from tdcompile.numerics.covariance import Covariance, Identity

# Matrices up to this side are handled in float64. Above it, an eigendecomposition takes seconds; float32 halves that.
PRECISE = 2048
# Entries that are converted to another precision, or multiplied by S, at a time: 16 MB in float64.
BLOCK = 2**21
# Columns of a Gram matrix that are computed at a time; the rest of it is mirrored.
STRIP = 512


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Return the mode-``mode`` unfolding: that axis first, the others flattened in order."""
    return tensor.movedim(mode, 0).flatten(1)


def operands(weight: Tensor, covariance: Covariance, side: int) -> tuple[Tensor, Covariance]:
    """Return W as ``(T, N)`` and S on its device, without gradients, in the precision for matrices of that side.

    Raises:
        InputError: W or S holds NaN or Inf.
    """
    flat = matrix_of(weight, covariance).to(torch.float64 if side <= PRECISE else torch.float32)
    return flat, covariance.to(flat)


def matrix_of(weight: Tensor, covariance: Covariance) -> Tensor:
    """Return W as ``(T, N)`` without gradients; it shares memory, except that half precision becomes float32.

    Raises:
        InputError: W or S holds NaN or Inf.
    """
    flat = weight.detach().flatten(1)
    flat = flat if flat.dtype is torch.float64 else flat.float()
    # A sum is finite only if its terms are, and takes a tenth of the time of a test of each.
    if not all(bool(torch.isfinite(block.sum())) for block in blocks(flat, torch.float64)):
        raise InputError("the weight of a layer to decompose holds NaN or Inf; decompositions need finite values")
    if not covariance.is_finite():
        raise InputError("the covariance of a layer to decompose holds NaN or Inf; decompositions need finite values")
    return flat


def leading(flat: Tensor, covariance: Covariance, rank: int) -> Tensor:
    """Return the leading left singular vectors of ``flat`` (S + ridge)^½, ``(T, rank)``, in its precision.

    They come from the Gram matrix of the smaller side, so that ``flat`` is not copied. For ranks beyond that side, the
    basis is completed.
    """
    return _leading(flat, covariance, rank).to(flat.dtype)


def left_vectors(flat: Tensor, rank: int) -> Tensor:
    """Return the leading left singular vectors of ``flat``, ``(T, rank)``, in its precision."""
    return leading(flat, Identity.of(flat), rank)


def column_basis(matrix: Tensor) -> Tensor:
    """Return all left singular vectors of a wide matrix, the strongest first."""
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.T)[1]
    return vectors.flip(1)


def _leading(flat: Tensor, covariance: Covariance, rank: int, basis: Tensor | None = None) -> Tensor:
    """Return the leading left singular vectors, in float64 if the smaller side is at most ``PRECISE``.

    Args:
        flat: W, ``(T, N)``.
        covariance: S.
        rank: number of vectors.
        basis: of ``low_rank_spectrum``, with at least ``rank`` columns, in place of an eigendecomposition.
    """
    rows, columns = flat.shape
    if rows <= columns:
        if basis is not None:
            return basis[:, :rank]
        return _eigenvectors(_ridged(flat, covariance, weighted_gram(flat, covariance)), rank)
    spread = _spread(flat, covariance, min(rank, columns)) if basis is None else basis[:, : min(rank, columns)]
    mapped = spread.new_empty(rows, spread.shape[1])
    for start, block in zip(range(0, rows, _height(flat)), blocks(flat, spread.dtype), strict=True):
        mapped[start : start + len(block)] = block @ spread
    left: Tensor = torch.linalg.qr(mapped, mode="complete" if rank > columns else "reduced").Q
    return left[:, :rank]


def _spread(flat: Tensor, covariance: Covariance, rank: int) -> Tensor:
    """Return the leading right singular vectors of W L, times L, ``(N, rank)``, with L Lᵀ = S + ridge."""
    inner = gram(flat, columnwise=True)
    if covariance.is_identity:
        return _eigenvectors(inner, rank)
    root = covariance.root(covariance.ridge()).to(inner)
    return root @ _eigenvectors(root.T @ inner @ root, rank)


def low_rank(flat: Tensor, covariance: Covariance, rank: int, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return ``last`` (T, r) and ``first`` (r, N) whose product minimises ‖(W−W̃)S^½‖_F, in the precision of ``flat``.

    The norm of each component is split evenly between them.

    Args:
        flat: W, ``(T, N)``.
        covariance: S.
        rank: r.
        basis: of ``low_rank_spectrum`` for the same W and S, with at least r columns; computed by default.
    """
    last = _leading(flat, covariance, rank, basis)
    first = flat.new_empty(rank, flat.shape[1])
    for start in range(0, flat.shape[1], step := max(1, BLOCK // len(flat))):
        first[:, start : start + step] = last.T @ flat[:, start : start + step].to(last.dtype)
    root = first.norm(dim=1).clamp(min=torch.finfo(first.dtype).tiny).sqrt()
    return last.to(flat.dtype) * root, first.div_(root[:, None])


def low_rank_errors(flat: Tensor, covariance: Covariance) -> Tensor:
    """Return the relative error of ``low_rank`` at ranks 0, 1, ..., min(T, N), measured with S without the ridge."""
    return low_rank_spectrum(flat, covariance, 0)[0]


def low_rank_spectrum(flat: Tensor, covariance: Covariance, most: int) -> tuple[Tensor, Tensor | None]:
    """Return the errors of ``low_rank_errors``, and the basis from which ``low_rank`` starts for ranks up to ``most``.

    One eigendecomposition of the Gram matrix of the smaller side gives both. Without data the errors need eigenvalues
    only, and the basis is None. Otherwise it has the first eigenvectors of W (S + ridge) Wᵀ, ``(T, most)``, if T <= N,
    and else L times the right singular vectors of W L, ``(N, most)``, with L Lᵀ = S + ridge; the strongest first.
    """
    rows, columns = flat.shape
    most = min(most, rows, columns)
    if covariance.is_identity:
        energies: Tensor = torch.linalg.eigvalsh(gram(flat, columnwise=rows > columns)).flip(0)
        return _tails(energies), None
    if rows <= columns:
        of_output = weighted_gram(flat, covariance)
        vectors = torch.linalg.eigh(_ridged(flat, covariance, of_output)).eigenvectors
        return _tails((of_output @ vectors).mul_(vectors).sum(0).flip(0)), vectors[:, rows - most :].flip(1)
    inner = gram(flat, columnwise=True)
    root = covariance.root(covariance.ridge()).to(inner)
    values, vectors = torch.linalg.eigh(root.T @ inner @ root)
    squares, basis = values[-columns:].clamp(min=0), root @ vectors[:, -columns:]
    # With u = W L v / σ the energy of a component is uᵀ W S Wᵀ u; with the ridge it is at most σ².
    mapped = (inner @ basis).T
    energies = ((mapped @ covariance.to(inner)) * mapped).sum(1)
    energies = energies / squares.clamp(min=torch.finfo(squares.dtype).tiny)
    return _tails(energies.minimum(squares).flip(0)), basis[:, columns - most :].flip(1)


def _tails(energies: Tensor) -> Tensor:
    """Return the relative error that is left at each rank, from the energies of the components, strongest first."""
    tails = energies.double().clamp(min=0).flip(0).cumsum(0).flip(0)
    return (torch.cat([tails, tails.new_zeros(1)]) / tails[0].clamp(min=torch.finfo(tails.dtype).tiny)).sqrt()


def gram(flat: Tensor, columnwise: bool = False) -> Tensor:
    """Return W Wᵀ, or Wᵀ W, from blocks of rows; in float64 if that side is at most ``PRECISE``."""
    if columnwise:
        columns = flat.shape[1]
        inner = torch.zeros(columns, columns, dtype=_precision(flat, columns), device=flat.device)
        for block in blocks(flat, inner.dtype):
            for start in range(0, columns, STRIP):  # the lower triangle; the upper one mirrors it
                inner[start:, start : start + STRIP].addmm_(block[:, start:].T, block[:, start : start + STRIP])
        for start in range(STRIP, columns, STRIP):
            inner[:start, start : start + STRIP] = inner[start : start + STRIP, :start].T
        return inner
    return weighted_gram(flat, Identity.of(flat))


def weighted_gram(flat: Tensor, covariance: Covariance) -> Tensor:
    """Return W S Wᵀ, ``(T, T)``, from blocks of rows; in float64 if T is at most ``PRECISE``."""
    found = torch.zeros(len(flat), len(flat), dtype=_precision(flat, len(flat)), device=flat.device)
    metric, height = covariance.to(found), _height(flat)
    for row, block in zip(range(0, len(flat), height), blocks(flat, found.dtype), strict=True):
        weighted = block @ metric
        for column in range(0, row + 1, height):
            part = weighted @ flat[column : column + height].to(found.dtype).T
            found[row : row + height, column : column + height] = part
            found[column : column + height, row : row + height] = part.T
    return found


def blocks(flat: Tensor, precision: torch.dtype) -> Iterator[Tensor]:
    """Yield the rows of a matrix in that precision, about ``BLOCK`` entries at a time."""
    for start in range(0, len(flat), height := _height(flat)):
        yield flat[start : start + height].to(precision)


def energy(flat: Tensor) -> float:
    """Return ‖W‖², summed in float64 block by block."""
    return sum(float(block.square().sum()) for block in blocks(flat, torch.float64))


def _ridged(flat: Tensor, covariance: Covariance, of_output: Tensor) -> Tensor:
    """Return W (S + ridge) Wᵀ, given W S Wᵀ."""
    extra = covariance.ridge()
    return gram(flat).mul_(extra).add_(of_output) if extra else of_output


def _eigenvectors(symmetric: Tensor, count: int) -> Tensor:
    """Return the eigenvectors of the largest eigenvalues as columns, the largest first."""
    vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors
    return vectors[:, len(vectors) - count :].flip(1)


def _height(flat: Tensor) -> int:
    return max(1, BLOCK // max(flat.shape[1], 1))


def _precision(flat: Tensor, side: int) -> torch.dtype:
    return torch.float64 if side <= PRECISE else flat.dtype


def balance(factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Scale the factors so that the rows of each have the same root-mean-square norm; their product is unchanged.

    A chain whose factors differ by orders of magnitude computes the same, but diverges under one learning rate.
    """
    gains = torch.stack([factor.norm() / len(factor) ** 0.5 for factor in factors])
    if not bool((gains > 0).all()):
        return tuple(factors)
    scales = gains.log().mean().exp() / gains
    return tuple(factor * scale for factor, scale in zip(factors, scales, strict=True))
