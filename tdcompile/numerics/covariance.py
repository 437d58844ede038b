"""A second moment too large to keep: ``Sketch``, low rank plus diagonal, and ``Range``, which gathers it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Columns of F that are multiplied at a time: in another precision than theirs all of them would take twice the memory.
COLUMNS = 128
# Rows of the sums that are worked on at a time.
ROWS = 1024


@dataclass(frozen=True)
class Sketch:
    """S ≈ F Fᵀ + diag(d), which takes N·(k + 1) figures where S takes N².

    It stands where a matrix would: ``flat @ sketch``, ``diagonal``, ``shape``, ``len`` and ``to`` are like a tensor's.
    The inputs of a convolution are in the order of its weight: K taps for each of G groups, the taps running fastest.

    Attributes:
        factor: F, ``(N, k)``, with orthogonal columns, longest first.
        rest: d, ``(N,)``, not negative: what F leaves of the diagonal of S, which is therefore exact.
    """

    factor: Tensor
    rest: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Of S: ``(N, N)``."""
        return len(self.rest), len(self.rest)

    def __len__(self) -> int:
        """N."""
        return len(self.rest)

    def __rmatmul__(self, flat: Tensor) -> Tensor:
        """``flat`` S, for ``flat`` of ``(T, N)``, in its precision; F is brought to that a few columns at a time."""
        found = flat * self.rest.to(flat)
        for part in self.factor.chunk(max(1, self.factor.shape[1] // COLUMNS), dim=1):
            part = part.to(flat)
            found.addmm_(flat @ part, part.T)
        return found

    def diagonal(self) -> Tensor:
        """Of S, ``(N,)``."""
        found: Tensor = self.rest + torch.linalg.vector_norm(self.factor, dim=1).square()
        return found

    def to(self, other: Tensor) -> Sketch:
        """The same on another tensor's device, in its own precision."""
        return Sketch(self.factor.to(other.device), self.rest.to(other.device))

    def multiplications(self) -> int:
        """How many a row times S takes."""
        return 2 * self.factor.numel() + self.rest.numel()

    def root(self, extra: float) -> Tensor:
        """L with L Lᵀ = S + extra·I, ``(N, k + N)``."""
        return torch.cat([self.factor, torch.diag((self.rest + extra).sqrt())], dim=1)

    def dense(self) -> Tensor:
        """S itself, ``(N, N)``, in float64."""
        factor = self.factor.double()
        found = factor @ factor.T
        found.diagonal().add_(self.rest)
        return found

    def between(self, ahead: int, size: int, behind: int) -> Tensor:
        """Of inputs in three modes the mean over the first and the last of S's blocks, ``(size, size)``."""
        factor = self.factor.reshape(ahead, size, behind, -1)
        rest = self.rest.reshape(ahead, size, behind).mean((0, 2))
        return torch.einsum("agbf,ahbf->gh", factor, factor) / (ahead * behind) + torch.diag(rest)

    def by_tap(self, taps: int) -> tuple[Tensor, Tensor]:
        """F as ``(G, K, k)`` and d as ``(G, K)``."""
        return self.factor.reshape(-1, taps, self.factor.shape[1]), self.rest.reshape(-1, taps)


class Range:
    """Gathers E[x xᵀ] of a stream of x as a randomised Nyström sketch (Tropp et al. 2017, arXiv 1706.05736, alg. 1-3).

    With Ω orthonormal and random, ``(N, k)``, the sum Y = Σ x (xᵀ Ω) is all that is kept, and S ≈ Y (Ωᵀ Y)⁻¹ Yᵀ: never
    more than S, equal to it where S has rank k or less. The diagonal is summed beside it, exactly, and what the sketch
    leaves of it stays as ``Sketch.rest`` (this project's completion): inputs keep their whole weight.

    Args:
        size: N.
        rank: k.
        generator: of Ω.
    """

    def __init__(self, size: int, rank: int, generator: torch.Generator) -> None:
        probes = torch.randn(size, min(rank, size), dtype=torch.float64, generator=generator)
        self._probes = torch.linalg.qr(probes).Q
        self._sum = torch.zeros(self._probes.shape, dtype=torch.float64)
        self._squares = torch.zeros(size, dtype=torch.float64)
        self.seen = 0

    def add(self, rows: Tensor) -> None:
        """Take in rows x, ``(n, N)``."""
        for name in ("_probes", "_sum", "_squares"):
            setattr(self, name, getattr(self, name).to(rows.device))
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS].to(torch.float64)
            self._sum.addmm_(part.T, part @ self._probes)
            self._squares += part.square().sum(0)
        self.seen += len(rows)

    def result(self) -> Sketch:
        """The sketch of the mean, float32; the sums are used up, and of their size nothing else is made."""
        Y, probes, squares = self._sum.div_(self.seen), self._probes, self._squares / self.seen
        # The shift makes the core definite in the face of round-off; it comes off the eigenvalues again (ibid.).
        shift = torch.finfo(Y.dtype).eps * float(Y.norm()) + torch.finfo(Y.dtype).tiny ** 0.5
        core = probes.T @ Y.add_(probes, alpha=shift)
        upper = torch.linalg.cholesky((core + core.T) / 2).T
        for start in range(0, len(Y), ROWS):
            rows = Y[start : start + ROWS]
            rows.copy_(torch.linalg.solve_triangular(upper, rows, upper=True, left=False))
        values, vectors = torch.linalg.eigh(Y.T @ Y)
        values, vectors = values.flip(0), vectors.flip(1)
        turn = vectors * ((values - shift).clamp_min(0) / values.clamp_min(shift)).sqrt()
        factor = torch.empty(Y.shape, dtype=torch.float32, device=Y.device)
        for start in range(0, len(Y), ROWS):
            factor[start : start + ROWS] = Y[start : start + ROWS] @ turn
        left = squares - torch.linalg.vector_norm(factor, dim=1).square()
        return Sketch(factor, left.clamp_min(0).float())
