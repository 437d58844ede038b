"""``analytic``: count parameters, multiply-accumulates and bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from tdcompile.core.cost_model import CostModel
from tdcompile.ir.layer import Layer
from tdcompile.ir.target import Cost, Target

_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}


@dataclass(frozen=True)
class Analytic(CostModel):
    """Count parameters, multiply-accumulates and bytes; seconds stay 0.

    Parameters, input and output are read or written once, at the target's precision.
    """

    name: ClassVar[str] = "analytic"
    default_counter: ClassVar[bool] = True

    def price(self, layer: Layer, target: Target) -> Cost:
        """See ``CostModel.price``."""
        read = layer.in_channels * math.prod(layer.extent)
        written = layer.out_channels * math.prod(layer.out_extent)
        moved = _BYTES[target.precision] * (layer.params + read + written)
        return Cost(params=layer.params, macs=layer.macs, bytes=moved)
