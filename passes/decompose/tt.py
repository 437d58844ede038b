"""``tt``: 1x1, k×1, 1×k and 1x1 in a row, full convolutions in the middle: the tensor train of a convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tdcompile.core.decomposition import Decomposition, Kernel
from tdcompile.ir.diagnostics import Reason
from tdcompile.ir.layer import Layer, LayerKind, Ranks
from tdcompile.numerics.covariance import Covariance
from tdcompile.numerics.low_rank import balance
from tdcompile.numerics.output_error import OutputMetric
from tdcompile.numerics.tensor_train import first_basis, share_bond, tt_compose, tt_svd
from tdcompile.passes.decompose._chain_layers import by_axis, point_in, point_out
from tdcompile.passes.decompose._error_estimates import anchored, spread, train_bounds
from tdcompile.planning.rank_grid import train_space

MEMBERS = 24  # proposed ranks beside the exact ones
ANCHORS = 2  # least number of ranks that are factorised for an estimate
ESTIMATE = 3e9  # operations up to which an estimate factorises more ranks


@dataclass(frozen=True)
class TT(Decomposition):
    """Tensor train of C x kh x kw x T: 1x1, k×1, 1×k, 1x1.

    W[t, c, y, x] ≈ G1[c, :] G2[:, y, :] G3[:, x, :] G4[:, t], by successive SVDs (Oseledets 2011).
    """

    name: ClassVar[str] = "tt"
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({"conv"})
    kernels: ClassVar[Kernel] = Kernel.TWO_AXES
    modes: ClassVar[tuple[str, ...]] = ("in", "", "out")

    def refuse(self, layer: Layer) -> Reason | None:
        """Return only a mismatch of the kind: a layer too small to gain keeps its exact ranks as a candidate."""
        return self.unfit(layer)

    def exact_ranks(self, layer: Layer) -> Ranks:
        """Return the smaller side of each unfolding of C x kh x kw x T."""
        sizes = (layer.in_channels, *layer.kernel, layer.out_channels)
        first, middle, last = (min(math.prod(sizes[:i]), math.prod(sizes[i:])) for i in (1, 2, 3))
        return first, middle, last

    def rank_space(self, layer: Layer, grain: int) -> Sequence[Ranks]:
        """Return ranks with one value for the three bonds (``train_space``), the exact ranks last."""
        return train_space(self, layer, grain, MEMBERS)

    def blueprint(self, layer: Layer, ranks: Ranks) -> tuple[Layer, ...]:
        """Return C to r1, (kh, 1) to r2, (1, kw) to r3, r3 to T."""
        r1, r2, r3 = ranks
        rows, columns = by_axis(layer)
        return (
            point_in(layer, r1),
            replace(rows, in_channels=r1, out_channels=r2, bias=False),
            replace(columns, in_channels=r2, out_channels=r3, bias=False),
            point_out(layer, r3),
        )

    @torch.no_grad()
    def factorize(self, layer: Layer, weight: Tensor, ranks: Ranks, covariance: Covariance) -> tuple[Tensor, ...]:
        """Run a TT-SVD; with data, return the better of the plain and the whitened one, the last factor refitted.

        The first and last factors are orthonormal. Each index of the middle bond splits its scale between its two
        cores. Then each factor is scaled as a whole, so that all are balanced.
        """
        if covariance.is_identity:
            cores = tt_svd(_tensor(weight), ranks)
        else:
            cores, _ = _fit_output(weight, ranks, OutputMetric(weight, covariance))
        turned, scale = torch.linalg.qr(cores[3].squeeze(2).T)
        rows, columns = share_bond(cores[1], cores[2] @ scale.T)
        found = balance((cores[0].squeeze(0).T, rows.permute(2, 0, 1), columns.permute(2, 0, 1), turned))
        return self.shaped(layer, ranks, found, weight.dtype)

    def reconstruct(self, layer: Layer, factors: Sequence[Tensor]) -> Tensor:
        """Return the product of the cores."""
        first, rows, columns, last = (factor.flatten(2).permute(1, 2, 0) for factor in factors)
        return tt_compose([first.movedim(1, 0), rows, columns, last.movedim(1, 2)]).movedim(-1, 0)

    @torch.no_grad()
    def errors(self, layer: Layer, weight: Tensor, space: Sequence[Ranks], covariance: Covariance) -> Sequence[float]:
        """Bound the error by the energy that the unfoldings lose; correct the bound by a TT-SVD at a few ranks."""
        metric = None if covariance.is_identity else OutputMetric(weight, covariance)
        root = None if metric is None else metric.channel_root(weight.shape[1])
        tensor = _tensor(weight) if root is None else _whiten(weight, root)
        total = float(tensor.square().sum()) + torch.finfo(tensor.dtype).tiny
        inner = sorted({ranks for ranks in space if ranks != self.exact_ranks(layer)})
        bounds = train_bounds(tensor, inner, total, sum)

        def truth(index: int) -> float:
            cores = tt_svd(tensor, inner[index], first)
            if metric is not None and root is not None:
                # ``factorize`` also tries the plain fit, which is rarely better.
                return _refit(_unwhitened(cores, root), metric)[1]
            # Each truncation is an orthogonal projection of the result of the one before it.
            kept = float(cores[-1].square().sum())
            return math.sqrt(max(1 - kept / total, 0.0))

        anchors = spread([_operations(layer, ranks, metric) for ranks in inner], ESTIMATE, ANCHORS)
        first = first_basis(tensor) if anchors else None
        found = anchored([sum(ranks) for ranks in inner], bounds, anchors, truth)
        known = dict(zip(inner, found, strict=True))
        return [known.get(ranks, 0.0) for ranks in space]


def _tensor(weight: Tensor) -> Tensor:
    """Return the weight as ``(C, kh, kw, T)`` in float64."""
    return weight.detach().double().movedim(0, -1)


def _whiten(weight: Tensor, root: Tensor) -> Tensor:
    return torch.einsum("cd,c...->d...", root, _tensor(weight))


def _fit_output(weight: Tensor, ranks: Ranks, metric: OutputMetric) -> tuple[list[Tensor], float]:
    """Return the better of the plain and the whitened TT-SVD, last cores refitted: cores and relative error."""
    root = metric.channel_root(weight.shape[1])
    whitened = _unwhitened(tt_svd(_whiten(weight, root), ranks), root)
    fits = (_refit(cores, metric) for cores in (whitened, tt_svd(_tensor(weight), ranks)))
    return min(fits, key=lambda fit: fit[1])


def _unwhitened(cores: Sequence[Tensor], root: Tensor) -> list[Tensor]:
    """Return cores of the weight from the TT-SVD of the whitened weight; the first is made orthonormal again."""
    first, rows, *rest = cores
    turned, scale = torch.linalg.qr(torch.linalg.solve_triangular(root.T, first.squeeze(0), upper=True))
    return [turned.unsqueeze(0), torch.tensordot(scale, rows, dims=1), *rest]


def _refit(cores: list[Tensor], metric: OutputMetric) -> tuple[list[Tensor], float]:
    *before, last = cores
    basis = tt_compose([*before, torch.eye(len(last), dtype=last.dtype, device=last.device).unsqueeze(2)])
    found, error = metric.refit(last.squeeze(2).T, basis.flatten(0, 2).T)
    return [*before, found.T.unsqueeze(2)], error


def _operations(layer: Layer, ranks: Ranks, metric: OutputMetric | None) -> float:
    """Return the rough cost of a TT-SVD: the Gram matrix of each unfolding, and its eigenvectors (10 n³)."""
    rows, columns = layer.kernel
    tall = (layer.in_channels, ranks[0] * rows, ranks[1] * columns)
    wide = (rows * columns * layer.out_channels, columns * layer.out_channels, layer.out_channels)
    svd = sum(4 * n * m * min(n, m) + 10 * min(n, m) ** 3 for n, m in zip(tall, wide, strict=True))
    return svd if metric is None else svd + 2 * ranks[2] * metric.multiplications
