"""The contract of the reference networks in ``models/``."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import nn

from tdcompile.core.plugin import Plugin


class Network(Plugin):
    """A network that can be compiled by name.

    Attributes:
        input_shapes: the shape of each input without the batch, e.g. ``((3, 224, 224),)``.
        checkpoint: the file with trained weights, beside the module of the class; None if no weights ship.
        data: the data spec on which these weights were trained; None if no weights ship.
    """

    input_shapes: ClassVar[tuple[tuple[int, ...], ...]] = ()
    checkpoint: ClassVar[str | None] = None
    data: ClassVar[str | None] = None

    @abstractmethod
    def build(self) -> nn.Module:
        """Return the network in eval mode, randomly initialised."""
