"""The contract of reference networks, which ``models/`` fills."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import nn

from tdcompile.core.plugin import Plugin


class Network(Plugin):
    """A network that can be compiled by its name.

    Attributes:
        input_shapes: of each input, without the batch, e.g. ``((3, 224, 224),)``.
        checkpoint: the file beside the class's own that holds trained weights, where one ships.
        data: the data spec those weights were trained on, where one ships.
    """

    input_shapes: ClassVar[tuple[tuple[int, ...], ...]] = ()
    checkpoint: ClassVar[str | None] = None
    data: ClassVar[str | None] = None

    @abstractmethod
    def build(self) -> nn.Module:
        """The network in eval mode, randomly initialised."""
