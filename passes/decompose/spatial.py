"""``spatial``: a kh x kw convolution as a vertical kh x 1 one to r channels and a horizontal 1 x kw one, C -> r -> T.

W[t,c,y,x] ≈ Σ_r H[t,r,x] V[r,c,y], exactly one SVD of W unfolded to (C kh) x (T kw) (Jaderberg et al. 2014, arXiv
1405.3866, scheme 2). Stride, padding and dilation are split by axis. With data V comes from the Kronecker
approximation of S over the kw horizontal taps (``numerics.input_basis``), and H is refit by least squares in the metric
of S. The bases of all ranks are nested, so one Cholesky factor gives all errors. The plain V, refit in the same way,
is taken if its output error is smaller: data never makes the factors worse (this project's completion).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tdcompile.core.decomposition import Decomposition, Kernel
from tdcompile.ir.layer import Layer, Ranks
from tdcompile.numerics.covariance import Covariance, Identity
from tdcompile.numerics.input_basis import core_of, input_map, residuals
from tdcompile.numerics.low_rank import balance, low_rank_errors, operands, unfold
from tdcompile.passes.decompose._chain_layers import by_axis


@dataclass(frozen=True)
class Spatial(Decomposition):
    """A vertical convolution to r channels, then a horizontal one."""

    name: ClassVar[str] = "spatial"
    kernels: ClassVar[Kernel] = Kernel.TWO_AXES
    modes: ClassVar[tuple[str, ...]] = ("",)

    def exact_ranks(self, layer: Layer) -> Ranks:
        """Return the smaller of C·kh and T·kw."""
        height, width = layer.kernel
        return (min(layer.in_channels * height, layer.out_channels * width),)

    def blueprint(self, layer: Layer, ranks: Ranks) -> tuple[Layer, ...]:
        """Return a kh x 1 layer with the vertical settings and a 1 x kw layer with the horizontal ones."""
        (rank,) = ranks
        vertical, horizontal = by_axis(layer)
        return replace(vertical, out_channels=rank, bias=False), replace(horizontal, in_channels=rank)

    def factorize(self, layer: Layer, weight: Tensor, ranks: Ranks, covariance: Covariance) -> tuple[Tensor, ...]:
        """Return ``(r, C, kh, 1)``, orthonormal up to a scale, and ``(T, r, 1, kw)``."""
        flat, covariance = operands(weight, covariance, weight[0].numel())
        if ranks == self.exact_ranks(layer):
            covariance = Identity.of(flat)
        maps = _maps(flat, covariance, layer.kernel[1], ranks[0])
        basis = min(maps, key=lambda basis: float(residuals(flat, covariance, basis, ranks).sum()))
        factors = balance((basis.T, core_of(flat, covariance, basis)))
        return self.shaped(layer, ranks, factors, weight.dtype)

    def reconstruct(self, layer: Layer, factors: Sequence[Tensor]) -> Tensor:
        """Return the sum over r of column times row."""
        vertical, horizontal = factors
        return torch.einsum("rcy,trx->tcyx", vertical.squeeze(3), horizontal.squeeze(2))

    def errors(self, layer: Layer, weight: Tensor, space: Sequence[Ranks], covariance: Covariance) -> Sequence[float]:
        """Return the errors of ``factorize`` for all ranks, from one regression for each map; 0 at the exact rank."""
        flat, covariance = operands(weight, covariance, weight[0].numel())
        exact = self.exact_ranks(layer)
        levels = sorted({rank for (rank,) in space if (rank,) != exact})
        if not levels:
            return [0.0] * len(space)
        if covariance.is_identity:  # the tails of one spectrum, which needs no vectors
            unfolding = unfold(flat.reshape(len(flat), -1, layer.kernel[1]), 1)
            found = low_rank_errors(unfolding, Identity.of(unfolding)).tolist()
            return [0.0 if (rank,) == exact else found[rank] for (rank,) in space]
        maps = _maps(flat, covariance, layer.kernel[1], levels[-1])
        lost = torch.stack([residuals(flat, covariance, basis, [0, *levels]).double().sum(0) for basis in maps]).amin(0)
        if not lost[0] > 0:  # the output is always zero: no rank has an error
            return [0.0] * len(space)
        known = dict(zip(levels, (lost[1:] / lost[0]).sqrt().tolist(), strict=True))
        return [known.get(rank, 0.0) for (rank,) in space]


def _maps(flat: Tensor, covariance: Covariance, taps: int, rank: int) -> list[Tensor]:
    """Return the candidate input maps: from the covariance, if there is data, and from the weight alone."""
    plain = input_map(flat, Identity.of(flat), taps, rank)
    return [plain] if covariance.is_identity else [input_map(flat, covariance, taps, rank), plain]
