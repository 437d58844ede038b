"""``svd``: a linear layer or a 1x1 convolution as two, C -> r -> T, by one (whitened) SVD.

W ≈ (U √s)(√s Vᵀ). A stride goes on the first factor: a 1x1 convolution commutes with subsampling, and that way both
factors work at the small resolution. With moments the SVD is that of W S^½, so that the output's error is least
(Eckart and Young in the metric of S).
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
from tdcompile.numerics.low_rank import balance, low_rank, low_rank_errors, matrix_of
from tdcompile.planning.rank_grid import grid


@dataclass(frozen=True)
class SVD(Decomposition):
    """Linear layers and 1x1 convolutions as two of rank r: C -> r -> T."""

    name: ClassVar[str] = "svd"
    modes: ClassVar[tuple[str, ...]] = ("out",)

    def refuse(self, layer: Layer) -> Reason | None:
        """Groups, kernels of more than one tap, and layers that rank 1 would not make cheaper."""
        if layer.transposed:
            return Reason(ReasonCode.TRANSPOSED, "it is a transposed convolution; channel and tucker2 fit it")
        if (grouped := in_groups(layer)) is not None:
            return grouped
        if not layer.pointwise:
            return Reason(
                ReasonCode.KERNEL, f"its kernel {layer.kernel} has more than one tap; channel or tucker2 fit it"
            )
        if self._macs(layer, (1,)) >= layer.macs:
            return Reason(
                ReasonCode.SMALL, f"{layer.in_channels} -> {layer.out_channels} costs less than two factors do"
            )
        return None

    def exact_ranks(self, layer: Layer) -> Ranks:
        """The smaller of C and T."""
        return (min(layer.in_channels, layer.out_channels),)

    def rank_space(self, layer: Layer, grain: int) -> Sequence[Ranks]:
        """Every grain up to break-even, and the exact rank."""
        (full,) = self.exact_ranks(layer)
        return [*((r,) for r in grid(full, grain)[:-1] if self._macs(layer, (r,)) < layer.macs), (full,)]

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
        shapes = (part.weight_shape for part in self.blueprint(layer, ranks))
        return tuple(f.reshape(s).to(weight.dtype) for f, s in zip((first, last), shapes, strict=True))

    def reconstruct(self, layer: Layer, factors: Sequence[Tensor]) -> Tensor:
        """The product of the two matrices."""
        first, last = factors
        return (last.flatten(1) @ first.flatten(1)).reshape(layer.weight_shape)

    def errors(self, layer: Layer, weight: Tensor, space: Sequence[Ranks], covariance: Covariance) -> Sequence[float]:
        """Exact, from the tails of one spectrum."""
        spectrum = low_rank_errors(matrix_of(weight, covariance), covariance).tolist()
        return [spectrum[rank] for (rank,) in space]

    def _macs(self, layer: Layer, ranks: Ranks) -> int:
        return sum(part.macs for part in self.blueprint(layer, ranks))
