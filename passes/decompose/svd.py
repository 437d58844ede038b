"""``svd``: a linear layer or a 1x1 convolution as two, C -> r -> T, by one (whitened) SVD.

W ≈ (U √s)(√s Vᵀ). A stride goes on the first factor: a 1x1 convolution commutes with subsampling, and that way both
factors work at the small resolution. With data the SVD is that of W S^½, so that the output's error is least
(Eckart and Young in the metric of S).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from tdcompile.core.decomposition import Decomposition, Kernel
from tdcompile.ir.layer import Layer, Ranks
from tdcompile.numerics.covariance import Covariance
from tdcompile.numerics.low_rank import balance, low_rank, low_rank_errors, matrix_of


@dataclass(frozen=True)
class SVD(Decomposition):
    """Linear layers and 1x1 convolutions as two of rank r: C -> r -> T."""

    name: ClassVar[str] = "svd"
    kernels: ClassVar[Kernel] = Kernel.ONE_TAP
    modes: ClassVar[tuple[str, ...]] = ("out",)

    def exact_ranks(self, layer: Layer) -> Ranks:
        """The smaller of C and T."""
        return (min(layer.in_channels, layer.out_channels),)

    def blueprint(self, layer: Layer, ranks: Ranks) -> tuple[Layer, ...]:
        """C -> r with the layer's stride and padding, r -> T on its output."""
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
        """``(r, C, ...)`` and ``(T, r, ...)``, every component's norm split evenly between them."""
        flat = matrix_of(weight, covariance)
        last, first = balance(low_rank(flat, covariance, ranks[0]))
        return self.shaped(layer, ranks, (first, last), weight.dtype)

    def reconstruct(self, layer: Layer, factors: Sequence[Tensor]) -> Tensor:
        """The product of the two matrices."""
        first, last = factors
        return (last.flatten(1) @ first.flatten(1)).reshape(layer.weight_shape)

    def errors(self, layer: Layer, weight: Tensor, space: Sequence[Ranks], covariance: Covariance) -> Sequence[float]:
        """Exact, from the tails of one spectrum."""
        spectrum = low_rank_errors(matrix_of(weight, covariance), covariance).tolist()
        return [spectrum[rank] for (rank,) in space]
