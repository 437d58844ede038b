"""``channel``: a k x k convolution as a k x k one to r channels and a 1x1 one, C -> r -> T, by one (whitened) SVD.

W as T x CK is U (Uᵀ W). Uᵀ W holds r kernels of the layer's shape, with its stride, padding and dilation; U recombines
their outputs (Zhang et al. 2016, arXiv 1505.06798; LRPET and BALF use this form). With data U holds the principal
components of the layer's output, the eigenvectors of W S Wᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from tdcompile.core.decomposition import Decomposition, Kernel
from tdcompile.ir.layer import Layer, Ranks
from tdcompile.numerics.covariance import Covariance
from tdcompile.numerics.low_rank import operands
from tdcompile.passes.decompose._chain_layers import point_out
from tdcompile.passes.decompose._one_spectrum import spectrum_errors, truncated


@dataclass(frozen=True)
class Channel(Decomposition):
    """A k x k convolution to r channels, then a 1x1 one."""

    name: ClassVar[str] = "channel"
    kernels: ClassVar[Kernel] = Kernel.SEVERAL_TAPS
    transposed: ClassVar[bool] = True
    modes: ClassVar[tuple[str, ...]] = ("out",)

    def exact_ranks(self, layer: Layer) -> Ranks:
        """Return the smaller of T and CK."""
        return (min(layer.out_channels, layer.in_channels * layer.taps),)

    def blueprint(self, layer: Layer, ranks: Ranks) -> tuple[Layer, ...]:
        """Return the layer with r output channels, and a 1x1 layer on its output."""
        (rank,) = ranks
        return replace(layer, out_channels=rank, bias=False), point_out(layer, rank)

    def factorize(self, layer: Layer, weight: Tensor, ranks: Ranks, covariance: Covariance) -> tuple[Tensor, ...]:
        """Return ``(r, C, *kernel)`` and ``(T, r, 1, ...)``; each component's norm is split evenly between them."""
        given = operands(weight, covariance, min(len(weight), weight[0].numel()))
        return self.shaped(layer, ranks, truncated(weight, covariance, given, ranks[0]), weight.dtype)

    def reconstruct(self, layer: Layer, factors: Sequence[Tensor]) -> Tensor:
        """Recombine the r kernels."""
        first, last = factors
        return (last.flatten(1) @ first.flatten(1)).reshape(layer.weight_shape)

    def errors(self, layer: Layer, weight: Tensor, space: Sequence[Ranks], covariance: Covariance) -> Sequence[float]:
        """Return exact errors, from the tails of one spectrum; its vectors are kept for ``factorize``."""
        given = operands(weight, covariance, min(len(weight), weight[0].numel()))
        return spectrum_errors(weight, covariance, given, space)
