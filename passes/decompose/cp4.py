"""``cp4``: 1x1 to r channels, depthwise k×1, depthwise 1×k, 1x1 to the output (Lebedev et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from tdcompile.ir.diagnostics import Reason, ReasonCode
from tdcompile.ir.layer import Layer, Ranks
from tdcompile.passes.decompose._cp import Polyadic


@dataclass(frozen=True)
class CP4(Polyadic):
    """CP of T x C x kh x kw: 1x1, depthwise k×1, depthwise 1×k, 1x1 (Lebedev et al. 2015, eq. 4).

    W[t, c, y, x] ≈ Σ_r A[t, r] B[c, r] D[y, r] E[x, r]. Each depthwise layer has the stride, padding and dilation of
    its own axis, so the second runs on fewer rows.
    """

    name: ClassVar[str] = "cp4"

    def tensor_shape(self, layer: Layer) -> tuple[int, ...]:
        """``(T, C, kh, kw)``."""
        return (layer.out_channels, layer.in_channels, *layer.kernel)

    def refuse(self, layer: Layer) -> Reason | None:
        """Ungrouped convolutions in two dimensions with a kernel longer than 1 along both are accepted."""
        refusal = super().refuse(layer)
        if refusal is None and (len(layer.kernel) != 2 or min(layer.kernel) < 2):
            size = "x".join(map(str, layer.kernel))
            return Reason(ReasonCode.KERNEL, f"cp4 separates the two axes of a kernel; {size} has no two to separate")
        return refusal

    def blueprint(self, layer: Layer, ranks: Ranks) -> tuple[Layer, ...]:
        """C to r, depthwise (kh, 1), depthwise (1, kw), r to T."""
        (rank,) = ranks
        ones, none = (1, 1), ((0, 0), (0, 0))
        first = Layer("conv", layer.in_channels, rank, layer.extent, ones, ones, none, ones, bias=False)
        depthwise = replace(layer, in_channels=rank, out_channels=rank, groups=rank, bias=False)
        rows = replace(
            depthwise,
            kernel=(layer.kernel[0], 1),
            stride=(layer.stride[0], 1),
            padding=(layer.padding[0], (0, 0)),
            dilation=(layer.dilation[0], 1),
        )
        columns = replace(
            depthwise,
            extent=rows.out_extent,
            kernel=(1, layer.kernel[1]),
            stride=(1, layer.stride[1]),
            padding=((0, 0), layer.padding[1]),
            dilation=(1, layer.dilation[1]),
        )
        last = replace(
            first, in_channels=rank, out_channels=layer.out_channels, extent=layer.out_extent, bias=layer.bias
        )
        return first, rows, columns, last
