"""``cp``: 1x1 to r channels, depthwise k×k, 1x1 to the output; the kernel's taps are one mode of a three-way CP."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from tdcompile.ir.layer import Layer, Ranks
from tdcompile.passes.decompose._chain_layers import point_in, point_out
from tdcompile.passes.decompose._cp import Polyadic


@dataclass(frozen=True)
class CP(Polyadic):
    """CP of T x C x K: 1x1, depthwise k×k, 1x1.

    W[t, c, k] ≈ Σ_r A[t, r] B[c, r] D[k, r]. With all taps in one mode the problem is better conditioned than a CP of
    four modes, and the chain is one layer shorter. The depthwise layer has the stride, padding and dilation.
    """

    name: ClassVar[str] = "cp"

    def tensor_shape(self, layer: Layer) -> tuple[int, ...]:
        """Return ``(T, C, K)``."""
        return (layer.out_channels, layer.in_channels, math.prod(layer.kernel))

    def blueprint(self, layer: Layer, ranks: Ranks) -> tuple[Layer, ...]:
        """Return C to r, depthwise on r, r to T."""
        (rank,) = ranks
        depthwise = replace(layer, in_channels=rank, out_channels=rank, groups=rank, bias=False)
        return point_in(layer, rank), depthwise, point_out(layer, rank)
