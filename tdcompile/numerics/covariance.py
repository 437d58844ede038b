"""``Covariance``: the second moment S = E[x xᵀ] of a layer's input, in one of four forms.

===========================  ======================================  ============================================
class                        S                                       when
===========================  ======================================  ============================================
``Identity``                 I                                       there is no calibration data for the layer
``Full``                     a matrix                                the layer has few inputs
``LowRankPlusDiagonal``      F Fᵀ + diag(d)                          the matrix would be too large
``PerGroup``                 a matrix for each group of channels     the layer is a grouped convolution
===========================  ======================================  ============================================

Code that uses a covariance multiplies by it (``flat @ covariance``) and calls its methods. It never asks for the class.
The inputs of a convolution are ordered as in its weight: K taps for each of G groups, the taps running fastest.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from tdcompile.errors import InputError
from tdcompile.numerics.cholesky import cholesky, ridge
from tdcompile.numerics.normal_equations import FullEquations, IdentityEquations, LowRankEquations, NormalEquations

# Columns of F that are converted to another precision at a time: all of them at once would double its memory.
COLUMNS = 128
# Inputs (C·K) above which a layer is wide: its matrix would take more than 200 MB in float64 (5,000² x 8 bytes).
WIDE = 5000
# Inputs up to which a low-rank covariance is written out as a matrix: 2 GB in float64.
DENSE_LIMIT = 2**14


class Covariance(ABC):
    """The second moment S of the N inputs of a layer, or of one group of a grouped layer.

    Attributes:
        samples: number of input rows in the average; 0 without data.
        groups: number of matrices: one for each group of a grouped layer, else 1.
        is_identity: whether there is no data, so that the error of the output is the error of the weight.
    """

    samples: int
    is_identity: bool = False

    @property
    def groups(self) -> int:
        """The number of matrices."""
        return 1

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, N)``."""
        return len(self), len(self)

    @abstractmethod
    def __len__(self) -> int:
        """Return N."""

    @abstractmethod
    def __rmatmul__(self, flat: Tensor) -> Tensor:
        """Return ``flat`` S for ``flat`` of ``(T, N)``, in the precision of ``flat``."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Return the diagonal of S, ``(N,)``."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return S as a matrix, ``(N, N)``, in float64 unless it was given in another precision.

        Raises:
            InputError: S is stored as low rank plus diagonal and has more than ``DENSE_LIMIT`` inputs.
        """

    @abstractmethod
    def root(self, extra: float) -> Tensor:
        """Return L with L Lᵀ = S + extra·I; it has N rows and may have more columns."""

    @abstractmethod
    def between(self, ahead: int, size: int, behind: int) -> Tensor:
        """Return the mean over the first and last mode of the diagonal blocks of S, for inputs in three modes.

        Args:
            ahead: extent of the first mode.
            size: extent of the middle mode; the result is ``(size, size)``.
            behind: extent of the last mode.
        """

    @abstractmethod
    def normal_equations(self, basis: Tensor) -> NormalEquations:
        """Return the normal equations of a regression on Aᵀ ⊗ I_K in this metric, for a basis A of ``(G, r)``."""

    @abstractmethod
    def to(self, other: Tensor) -> Covariance:
        """Return the covariance on the device of ``other``; a matrix also takes the precision of ``other``."""

    @abstractmethod
    def multiplications(self) -> int:
        """Return the number of multiplications in a row times S."""

    @abstractmethod
    def is_finite(self) -> bool:
        """Return whether S is free of NaN and Inf."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the covariance by name; ``from_tensors`` is the inverse."""

    @abstractmethod
    def squared_norm(self) -> float:
        """Return ‖S‖_F² = trace(S²)."""

    def shrunk(self, share: float) -> Covariance:
        """Return (1 − share)·S + share·(trace(S)/N)·I; the identity, which has no data, stays itself."""
        return self

    def ridge(self) -> float:
        """Return the ridge that keeps S + ridge·I definite: a small share of the mean diagonal; 0 for the identity."""
        return ridge(self.diagonal())

    def energy(self, flat: Tensor) -> float:
        """Return ‖W S^½‖_F² = trace(W S Wᵀ) for W of ``(T, N)``; give W in float64."""
        return float(((flat @ self) * flat).sum())

    def between_groups(self, taps: int) -> Tensor:
        """Return the mean over the taps of the blocks of S between groups of inputs, ``(G, G)``."""
        return self.between(1, len(self) // taps, taps)

    def between_taps(self, taps: int) -> Tensor:
        """Return the mean over the groups of inputs of the blocks of S between taps, ``(K, K)``."""
        return self.between(len(self) // taps, taps, 1)

    def of_group(self, place: int) -> Covariance:
        """Return the covariance of one group's inputs."""
        return self


@dataclass(frozen=True)
class Identity(Covariance):
    """S = I: no data, so that every input counts alike.

    Attributes:
        size: N.
        samples: 0.
    """

    size: int
    samples: int = 0
    is_identity = True

    @classmethod
    def of(cls, weight: Tensor) -> Identity:
        """Return the identity for the inputs of a weight, ``(T, C, ...)``."""
        return cls(weight[0].numel())

    def __len__(self) -> int:
        """Return N."""
        return self.size

    def __rmatmul__(self, flat: Tensor) -> Tensor:
        """Return ``flat``."""
        return flat

    def diagonal(self) -> Tensor:
        """Return ones."""
        return torch.ones(self.size, dtype=torch.float64)

    def dense(self) -> Tensor:
        """Return I."""
        return torch.eye(self.size, dtype=torch.float64)

    def root(self, extra: float) -> Tensor:
        """Return (1 + extra)^½ I."""
        return self.dense() * math.sqrt(1 + extra)

    def between(self, ahead: int, size: int, behind: int) -> Tensor:
        """Return I of the middle mode."""
        return torch.eye(size, dtype=torch.float64)

    def normal_equations(self, basis: Tensor) -> NormalEquations:
        """Return the equations of an orthonormal basis, which need no solver."""
        return IdentityEquations(basis)

    def to(self, other: Tensor) -> Identity:
        """Return the object itself, which holds no tensor."""
        return self

    def multiplications(self) -> int:
        """Return 0."""
        return 0

    def is_finite(self) -> bool:
        """Return true."""
        return True

    def squared_norm(self) -> float:
        """Return N."""
        return float(self.size)

    def tensors(self) -> dict[str, Tensor]:
        """Return the size as a tensor."""
        return {"identity": torch.tensor(self.size)}

    def ridge(self) -> float:
        """Return 0: the identity is definite."""
        return 0.0


@dataclass(frozen=True)
class Full(Covariance):
    """S as a matrix.

    Attributes:
        matrix: S, ``(N, N)``, float64 from calibration.
        samples: number of rows in the average.
    """

    matrix: Tensor
    samples: int

    def __len__(self) -> int:
        """Return N."""
        return len(self.matrix)

    def __rmatmul__(self, flat: Tensor) -> Tensor:
        """Return ``flat`` S in the precision of ``flat``."""
        return flat @ self.matrix.to(flat)

    def diagonal(self) -> Tensor:
        """Return the diagonal of S."""
        return self.matrix.diagonal()

    def dense(self) -> Tensor:
        """Return S itself, not a copy."""
        return self.matrix

    def root(self, extra: float) -> Tensor:
        """Return a lower triangular root, ``(N, N)``."""
        return cholesky(self.matrix, extra)

    def between(self, ahead: int, size: int, behind: int) -> Tensor:
        """Return the mean of the diagonal blocks of the middle mode."""
        blocks = self.matrix.reshape(ahead, size, behind, ahead, size, behind)
        return torch.einsum("agbahb->gh", blocks) / (ahead * behind)

    def normal_equations(self, basis: Tensor) -> NormalEquations:
        """Return the equations with one Cholesky factor."""
        return FullEquations(self.matrix, basis, self.ridge())

    def to(self, other: Tensor) -> Full:
        """Return the covariance on the device and in the precision of ``other``."""
        return Full(self.matrix.to(other), self.samples)

    def multiplications(self) -> int:
        """Return N²."""
        return self.matrix.numel()

    def is_finite(self) -> bool:
        """Return whether S is free of NaN and Inf; a sum takes a tenth of the time of a test of each entry."""
        return bool(torch.isfinite(self.matrix.sum(dtype=torch.float64)))

    def squared_norm(self) -> float:
        """Return the sum of the squares of all entries."""
        return float(self.matrix.square().sum(dtype=torch.float64))

    def shrunk(self, share: float) -> Full:
        """Return the covariance mixed with a multiple of I of equal trace."""
        return Full(_shrunk(self.matrix, share), self.samples)

    def tensors(self) -> dict[str, Tensor]:
        """Return the matrix."""
        return {"second": self.matrix}


@dataclass(frozen=True)
class LowRankPlusDiagonal(Covariance):
    """S ≈ F Fᵀ + diag(d): N·(k + 1) numbers in place of N².

    Attributes:
        factor: F, ``(N, k)``, with orthogonal columns, longest first.
        rest: d, ``(N,)``, not negative: the diagonal of S without that of F Fᵀ, so that the diagonal of S is exact.
        samples: number of rows in the average.
    """

    factor: Tensor
    rest: Tensor
    samples: int

    def __len__(self) -> int:
        """Return N."""
        return len(self.rest)

    def __rmatmul__(self, flat: Tensor) -> Tensor:
        """Return ``flat`` S in the precision of ``flat``; F is converted to it a few columns at a time."""
        found = flat * self.rest.to(flat)
        for part in self.factor.chunk(max(1, self.factor.shape[1] // COLUMNS), dim=1):
            part = part.to(flat)
            found.addmm_(flat @ part, part.T)
        return found

    def diagonal(self) -> Tensor:
        """Return the diagonal of S."""
        found: Tensor = self.rest + torch.linalg.vector_norm(self.factor, dim=1).square()
        return found

    def dense(self) -> Tensor:
        """Return S as a new matrix in float64.

        Raises:
            InputError: there are more than ``DENSE_LIMIT`` inputs.
        """
        if len(self) > DENSE_LIMIT:
            raise InputError(
                f"the covariance of {len(self)} inputs is low rank plus diagonal and too large to be written out "
                f"(limit {DENSE_LIMIT}): multiply by it with 'flat @ covariance', or keep the layer with --keep-dense"
            )
        factor = self.factor.double()
        found = factor @ factor.T
        found.diagonal().add_(self.rest)
        return found

    def root(self, extra: float) -> Tensor:
        """Return a root of ``(N, k + N)``: F beside a diagonal matrix."""
        return torch.cat([self.factor, torch.diag((self.rest + extra).sqrt())], dim=1)

    def between(self, ahead: int, size: int, behind: int) -> Tensor:
        """Return the mean of the diagonal blocks of the middle mode."""
        factor = self.factor.reshape(ahead, size, behind, -1)
        rest = self.rest.reshape(ahead, size, behind).mean((0, 2))
        return torch.einsum("agbf,ahbf->gh", factor, factor) / (ahead * behind) + torch.diag(rest)

    def normal_equations(self, basis: Tensor) -> NormalEquations:
        """Return the equations that never form an N x N matrix."""
        return LowRankEquations(self.factor, self.rest, basis, self.ridge())

    def to(self, other: Tensor) -> LowRankPlusDiagonal:
        """Return the covariance on the device of ``other``, without a change of precision."""
        return LowRankPlusDiagonal(self.factor.to(other.device), self.rest.to(other.device), self.samples)

    def multiplications(self) -> int:
        """Return 2 N k + N."""
        return 2 * self.factor.numel() + self.rest.numel()

    def is_finite(self) -> bool:
        """Return whether the diagonal of S, and hence all of S, is free of NaN and Inf."""
        return bool(torch.isfinite(self.diagonal().sum(dtype=torch.float64)))

    def squared_norm(self) -> float:
        """Return ‖FᵀF‖² + 2 Σ dᵢ (F Fᵀ)ᵢᵢ + ‖d‖²."""
        factor, rest = self.factor.double(), self.rest.double()
        low = (factor.T @ factor).square().sum()
        return float(low + 2 * (rest * factor.square().sum(1)).sum() + rest.square().sum())

    def shrunk(self, share: float) -> LowRankPlusDiagonal:
        """Return the covariance mixed with a multiple of I of equal trace, which goes into d."""
        rest = (1 - share) * self.rest + share * self.diagonal().mean()
        return LowRankPlusDiagonal(self.factor * math.sqrt(1 - share), rest, self.samples)

    def tensors(self) -> dict[str, Tensor]:
        """Return F and d."""
        return {"factor": self.factor, "rest": self.rest}


@dataclass(frozen=True)
class PerGroup(Covariance):
    """One matrix for each group of channels: a row of the weight meets the matrix of its own group only.

    It measures a whole weight (``@``, ``energy``). A decomposition works on one group: ``of_group``.

    Attributes:
        matrices: ``(groups, N, N)``.
        samples: number of rows in each average.
    """

    matrices: Tensor
    samples: int

    @property
    def groups(self) -> int:
        """The number of matrices."""
        return len(self.matrices)

    def __len__(self) -> int:
        """Return N, the number of inputs of one group."""
        return self.matrices.shape[1]

    def __rmatmul__(self, flat: Tensor) -> Tensor:
        """Return ``flat`` S for all T rows of a weight: equal numbers of rows belong to each group, in order."""
        parts = flat.reshape(self.groups, -1, flat.shape[1])
        return (parts @ self.matrices.to(flat)).reshape(flat.shape)

    def diagonal(self) -> Tensor:
        """Return the diagonals, ``(groups, N)``."""
        return self.matrices.diagonal(dim1=1, dim2=2)

    def dense(self) -> Tensor:
        """Return the matrices themselves, ``(groups, N, N)``."""
        return self.matrices

    def root(self, extra: float) -> Tensor:
        """Raise TypeError: a root belongs to one group."""
        self._refuse("root")

    def between(self, ahead: int, size: int, behind: int) -> Tensor:
        """Raise TypeError: blocks belong to one group."""
        self._refuse("between")

    def normal_equations(self, basis: Tensor) -> NormalEquations:
        """Raise TypeError: a regression belongs to one group."""
        self._refuse("normal_equations")

    def to(self, other: Tensor) -> PerGroup:
        """Return the covariance on the device and in the precision of ``other``."""
        return PerGroup(self.matrices.to(other), self.samples)

    def multiplications(self) -> int:
        """Return N²: a row meets one matrix."""
        return self.matrices[0].numel()

    def is_finite(self) -> bool:
        """Return whether all matrices are free of NaN and Inf."""
        return bool(torch.isfinite(self.matrices.sum(dtype=torch.float64)))

    def squared_norm(self) -> float:
        """Raise TypeError: a norm belongs to one group."""
        self._refuse("squared_norm")

    def shrunk(self, share: float) -> PerGroup:
        """Return each matrix mixed with a multiple of I of its own trace."""
        return PerGroup(_shrunk(self.matrices, share), self.samples)

    def tensors(self) -> dict[str, Tensor]:
        """Return the matrices, stacked."""
        return {"second": self.matrices}

    def of_group(self, place: int) -> Full:
        """Return the covariance of one group's inputs."""
        return Full(self.matrices[place], self.samples)

    def _refuse(self, method: str) -> NoReturn:
        raise TypeError(f"{method}() of {self.groups} groups is not defined: take one group with of_group() first")


def _shrunk(matrices: Tensor, share: float) -> Tensor:
    """Return ``(..., N, N)`` matrices S as (1 − share)·S + share·(trace(S)/N)·I."""
    found = (1 - share) * matrices
    mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    found.diagonal(dim1=-2, dim2=-1).add_(share * mean)
    return found


def from_tensors(tensors: Mapping[str, Tensor], samples: int) -> Covariance:
    """Return the covariance that these named tensors are made of (``Covariance.tensors``).

    Raises:
        KeyError: the names belong to no kind of covariance.
    """
    if "identity" in tensors:
        return Identity(int(tensors["identity"]), samples)
    if "factor" in tensors:
        return LowRankPlusDiagonal(tensors["factor"], tensors["rest"], samples)
    matrix = tensors["second"]
    return Full(matrix, samples) if matrix.dim() == 2 else PerGroup(matrix, samples)
