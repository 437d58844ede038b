"""Tensor trains: TT-SVD, composition, and the truncated bases that both need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import tensorly as tl
import torch
from tensorly.decomposition import tensor_train
from torch import Tensor

from tdcompile.errors import InputError
from tdcompile.numerics.low_rank import column_basis, energy, gram

# Randomised SVD is used if the shorter side exceeds a size, and also a multiple of the number of singular vectors that
# are wanted. It takes OVERSAMPLED more probes than vectors, and POWERS power iterations.
SKETCHED, OVERSAMPLED, POWERS = ((1024, 4), (256, 16)), 16, 2


# Tensors with more entries are decomposed in their own precision: a float64 copy would double the memory.
LARGE = 2**22


@torch.no_grad()
def tt_svd(tensor: Tensor, ranks: Sequence[int], first: Tensor | None = None) -> list[Tensor]:
    """Return tensor-train cores ``(r_{k-1}, I_k, r_k)``, orthonormal from the left, with the scale in the last.

    They are in float64, or in the tensor's precision if it has more than ``LARGE`` entries.

    Args:
        tensor: a tensor of any shape.
        ranks: the ranks between neighbouring modes.
        first: ``first_basis`` of the tensor, for several decompositions of one tensor; computed by default.

    Raises:
        InputError: a rank exceeds the sides of the unfolding that it truncates.
    """
    before = 1
    for place, bond in enumerate(ranks):
        most = min(before * tensor.shape[place], math.prod(tensor.shape[place + 1 :]))
        if not 1 <= bond <= most:
            raise InputError(
                f"rank {place + 1} of the tensor train {tuple(ranks)} of a {'x'.join(map(str, tensor.shape))} tensor "
                f"is {bond}; with those before it, it can be 1 to {most}"
            )
        before = bond
    tensor = precise(tensor)
    with tl.backend_context("pytorch"):
        if first is None or len(ranks) < 2:
            return list(tensor_train(tensor, [1, *ranks, 1], svd=_left_svd).factors)
        start, size = first[:, : ranks[0]], tensor.shape[1]
        rest = (start.T @ tensor.flatten(1)).reshape(ranks[0] * size, *tensor.shape[2:])
        second, *others = tensor_train(rest, [1, *ranks[1:], 1], svd=_left_svd).factors
    return [start.unsqueeze(0), second.reshape(ranks[0], size, -1), *others]


@torch.no_grad()
def first_basis(tensor: Tensor) -> Tensor | None:
    """Return the left singular vectors of the first unfolding, the strongest first: ``tt_svd`` begins with them.

    None if ``tt_svd`` computes other vectors for each rank: if the first mode is longer than all others, or so long
    that they are always sketched.
    """
    unfolding = precise(tensor).flatten(1)
    if len(unfolding) > min(unfolding.shape[1], max(size for size, _ in SKETCHED)):
        return None
    return _leading(unfolding, len(unfolding))


def tt_compose(cores: Sequence[Tensor]) -> Tensor:
    """Return the tensor of tensor-train cores."""
    with tl.backend_context("pytorch"):
        return cast(Tensor, tl.tt_to_tensor(list(cores)))


def share_bond(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Scale two neighbouring cores so that, for each index of their shared rank, both have the same norm."""
    tiny = torch.finfo(left.dtype).tiny
    before, after = left.flatten(0, -2).norm(dim=0), right.flatten(1).norm(dim=1)
    scale = torch.where((before > tiny) & (after > tiny), (after / before.clamp_min(tiny)).sqrt(), 1.0)
    scale = scale.clamp_min(tiny)
    return left * scale, right / scale.reshape(-1, *[1] * (right.ndim - 1))


def tail(matrix: Tensor, most: int) -> Tensor:
    """Return Σ_{i>r} σ_i², the error energy of the best approximation of rank r, for r from 0 to ``most``, float64."""
    matrix = precise(matrix)
    if _sketched(matrix, most):
        squares = torch.linalg.vecdot(kept := _leading(matrix, most).T @ matrix, kept)
    else:
        rows, columns = matrix.shape
        squares = torch.linalg.eigvalsh(gram(matrix, columnwise=rows > columns)).flip(0)[:most]
    below = torch.cat([squares.new_zeros(1), squares.clamp_min(0)]).double().cumsum(0)
    found: Tensor = (energy(matrix) - below).clamp_min(0)
    return found


def precise(tensor: Tensor) -> Tensor:
    """Convert to float64, or to float32 if there are more than ``LARGE`` entries that are not float64."""
    return tensor.to(precise_in(tensor))


def precise_in(tensor: Tensor) -> torch.dtype:
    """Return the precision that ``precise`` converts to."""
    large = tensor.numel() > LARGE and tensor.dtype is not torch.float64
    return torch.float32 if large else torch.float64


def _left_svd(matrix: Tensor, n_eigenvecs: int, **_: object) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, ones and Uᵀ·matrix in place of an SVD; tensorly's TT-SVD only multiplies the last two."""
    left = _leading(matrix, n_eigenvecs)
    return left, left.new_ones(n_eigenvecs), left.T @ matrix


def _leading(matrix: Tensor, count: int) -> Tensor:
    """Return the first left singular vectors; randomised with a fixed seed if large (Halko et al. 2011, alg. 4.4)."""
    rows, columns = matrix.shape
    turned: Tensor
    if _sketched(matrix, count):
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(columns, count + OVERSAMPLED, dtype=matrix.dtype, generator=generator).to(matrix.device)
        turned = torch.linalg.qr(matrix @ probes)[0]
        for _ in range(POWERS):
            turned = torch.linalg.qr(matrix @ (matrix.T @ turned))[0]
        return turned @ column_basis(turned.T @ matrix)[:, :count]
    if rows <= columns:
        turned = torch.linalg.eigh(gram(matrix)).eigenvectors.flip(1)
        return turned[:, :count].to(matrix.dtype)
    turned, small = torch.linalg.qr(matrix)
    return turned @ column_basis(small)[:, :count]


def _sketched(matrix: Tensor, count: int) -> bool:
    return any(min(matrix.shape) > max(size, share * count) for size, share in SKETCHED)
