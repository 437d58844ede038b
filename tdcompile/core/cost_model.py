"""``CostModel``: the contract of what prices one layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from tdcompile.core.plugin import Plugin
from tdcompile.ir.layer import Layer
from tdcompile.ir.target import Cost, Target


class CostModel(Plugin):
    """Prices one layer; it never sees a decomposition, which is a tuple of layers."""

    @abstractmethod
    def price(self, layer: Layer, target: Target) -> Cost:
        """What the layer costs for one sample on the target."""

    def prepare(self, layers: Sequence[Layer], target: Target) -> None:
        """Be told which layers will be priced, so that what is measured can be measured together."""
