"""``channel``: a k x k convolution as a k x k one to r channels and a 1x1 one, C -> r -> T, by one (whitened) SVD.

W as T x CK is U (Uᵀ W): Uᵀ W are r kernels of the layer's own shape, which carry its stride, padding and dilation, and
U recombines their outputs (Zhang et al. 2016, arXiv 1505.06798; the form that LRPET and BALF use). With moments U holds
the principal components of the layer's output, the eigenvectors of W S Wᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from tdcompile.core.decomposition import Decomposition
from tdcompile.ir.diagnostics import Reason, ReasonCode
from tdcompile.ir.layer import Layer, Ranks, in_groups
from tdcompile.numerics.covariance import Covariance
from tdcompile.numerics.low_rank import balance, low_rank, low_rank_errors, operands
from tdcompile.planning.rank_grid import grid


@dataclass(frozen=True)
class Channel(Decomposition):
    """A k x k convolution to r channels, then a 1x1 one."""

    name: ClassVar[str] = "channel"
    modes: ClassVar[tuple[str, ...]] = ("out",)

    def refuse(self, layer: Layer) -> Reason | None:
        """Groups, 1x1 and linear layers, and layers that rank 1 would not make cheaper."""
        if (grouped := in_groups(layer)) is not None:
            return grouped
        if layer.pointwise and layer.transposed:
            return Reason(ReasonCode.NO_FORM, "it is a transposed convolution of one tap, which no form takes")
        if layer.pointwise:
            return Reason(ReasonCode.POINTWISE, "it has no kernel beyond one tap; svd fits it")
        if self._macs(layer, (1,)) >= layer.macs:
            return Reason(
                ReasonCode.SMALL, f"{layer.in_channels} -> {layer.out_channels} costs less than two factors do"
            )
        return None

    def exact_ranks(self, layer: Layer) -> Ranks:
        """The smaller of T and CK."""
        return (min(layer.out_channels, layer.in_channels * layer.taps),)

    def rank_space(self, layer: Layer, grain: int) -> Sequence[Ranks]:
        """Every grain up to break-even, and the exact rank."""
        (full,) = self.exact_ranks(layer)
        return [*((r,) for r in grid(full, grain)[:-1] if self._macs(layer, (r,)) < layer.macs), (full,)]

    def blueprint(self, layer: Layer, ranks: Ranks) -> tuple[Layer, ...]:
        """The layer with r output channels, and a 1x1 layer on its output."""
        (rank,) = ranks
        first = replace(layer, out_channels=rank, bias=False)
        return first, replace(layer.point(), in_channels=rank, extent=first.out_extent)

    def factorize(self, layer: Layer, weight: Tensor, ranks: Ranks, covariance: Covariance) -> tuple[Tensor, ...]:
        """``(r, C, *kernel)`` and ``(T, r, 1, ...)``, every component's norm split evenly between them."""
        flat, covariance = operands(weight, covariance, min(len(weight), weight[0].numel()))
        last, first = balance(low_rank(flat, covariance, ranks[0]))
        shapes = (part.weight_shape for part in self.blueprint(layer, ranks))
        return tuple(f.reshape(s).to(weight.dtype) for f, s in zip((first, last), shapes, strict=True))

    def reconstruct(self, layer: Layer, factors: Sequence[Tensor]) -> Tensor:
        """The r kernels recombined."""
        first, last = factors
        return (last.flatten(1) @ first.flatten(1)).reshape(layer.weight_shape)

    def errors(self, layer: Layer, weight: Tensor, space: Sequence[Ranks], covariance: Covariance) -> Sequence[float]:
        """Exact, from the tails of one spectrum."""
        flat, covariance = operands(weight, covariance, min(len(weight), weight[0].numel()))
        spectrum = low_rank_errors(flat, covariance).tolist()
        return [spectrum[rank] for (rank,) in space]

    def _macs(self, layer: Layer, ranks: Ranks) -> int:
        return sum(part.macs for part in self.blueprint(layer, ranks))
