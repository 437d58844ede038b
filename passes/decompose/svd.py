"""``svd``: a linear layer or a 1x1 convolution as two, C -> r -> T, by one (whitened) SVD.

W ≈ (U √s)(√s Vᵀ). The first factor has the stride: a 1x1 convolution commutes with subsampling, so both factors run at
the small resolution. With data the SVD is of W S^½, which minimises the output's error (Eckart and Young in the metric
of S).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from tdcompile.core.decomposition import Decomposition, Kernel
from tdcompile.ir.layer import Layer, Ranks
from tdcompile.numerics.covariance import Covariance
from tdcompile.numerics.low_rank import matrix_of
from tdcompile.passes.decompose._one_spectrum import spectrum_errors, truncated


@dataclass(frozen=True)
class SVD(Decomposition):
    """Linear layers and 1x1 convolutions as two of rank r: C -> r -> T."""

    name: ClassVar[str] = "svd"
    kernels: ClassVar[Kernel] = Kernel.ONE_TAP
    modes: ClassVar[tuple[str, ...]] = ("out",)

    def exact_ranks(self, layer: Layer) -> Ranks:
        """Return the smaller of C and T."""
        return (min(layer.in_channels, layer.out_channels),)

    def blueprint(self, layer: Layer, ranks: Ranks) -> tuple[Layer, ...]:
        """Return C -> r with the layer's stride and padding, then r -> T on its output."""
        (rank,) = ranks
        axes = len(layer.kernel)
        first = replace(layer, out_channels=rank, bias=False)
        return first, replace(
            layer,
            in_channels=rank,
            extent=first.out_extent,
            stride=(1,) * axes,
            padding=((0, 0),) * axes,
            dilation=(1,) * axes,
            padding_mode="zeros",
        )

    def factorize(self, layer: Layer, weight: Tensor, ranks: Ranks, covariance: Covariance) -> tuple[Tensor, ...]:
        """Return ``(r, C, ...)`` and ``(T, r, ...)``; each component's norm is split evenly between them."""
        flat = matrix_of(weight, covariance)
        return self.shaped(layer, ranks, truncated(weight, covariance, (flat, covariance), ranks[0]), weight.dtype)

    def reconstruct(self, layer: Layer, factors: Sequence[Tensor]) -> Tensor:
        """Return the product of the two matrices."""
        first, last = factors
        return (last.flatten(1) @ first.flatten(1)).reshape(layer.weight_shape)

    def errors(self, layer: Layer, weight: Tensor, space: Sequence[Ranks], covariance: Covariance) -> Sequence[float]:
        """Return exact errors, from the tails of one spectrum; its vectors are kept for ``factorize``."""
        return spectrum_errors(weight, covariance, (matrix_of(weight, covariance), covariance), space)
