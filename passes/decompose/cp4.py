"""``cp4``: 1x1 to r channels, depthwise k×1, depthwise 1×k, 1x1 to the output (Lebedev et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from tdcompile.core.decomposition import Kernel
from tdcompile.ir.layer import Layer, Ranks
from tdcompile.passes.decompose._chain_layers import by_axis, point_in, point_out
from tdcompile.passes.decompose._cp import Polyadic


@dataclass(frozen=True)
class CP4(Polyadic):
    """CP of T x C x kh x kw: 1x1, depthwise k×1, depthwise 1×k, 1x1 (Lebedev et al. 2015, eq. 4).

    W[t, c, y, x] ≈ Σ_r A[t, r] B[c, r] D[y, r] E[x, r]. Each depthwise layer has the stride, padding and dilation of
    its axis, so the second one runs on fewer rows.
    """

    name: ClassVar[str] = "cp4"
    kernels: ClassVar[Kernel] = Kernel.TWO_AXES

    def tensor_shape(self, layer: Layer) -> tuple[int, ...]:
        """Return ``(T, C, kh, kw)``."""
        return (layer.out_channels, layer.in_channels, *layer.kernel)

    def blueprint(self, layer: Layer, ranks: Ranks) -> tuple[Layer, ...]:
        """Return C to r, depthwise (kh, 1), depthwise (1, kw), r to T."""
        (rank,) = ranks
        depthwise = replace(layer, in_channels=rank, out_channels=rank, groups=rank, bias=False)
        return point_in(layer, rank), *by_axis(depthwise), point_out(layer, rank)
