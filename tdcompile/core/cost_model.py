"""``CostModel``: the contract of plug-ins that price a layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from tdcompile.core.plugin import Plugin
from tdcompile.ir.layer import Layer
from tdcompile.ir.target import Cost, Target


class CostModel(Plugin):
    """Price one layer; a decomposition is priced as the tuple of its layers.

    Attributes:
        default_counter: the model prices parameters and multiply-accumulates wherever no option names another.
        default_timer: the model prices seconds wherever no option names another.
    """

    default_counter: ClassVar[bool] = False
    default_timer: ClassVar[bool] = False

    @abstractmethod
    def price(self, layer: Layer, target: Target) -> Cost:
        """Return the cost of the layer for one sample on the target."""

    def prepare(self, layers: Sequence[Layer], target: Target) -> None:
        """Announce the layers that will be priced, so that a model can measure them together."""
