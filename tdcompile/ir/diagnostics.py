"""``Reason``: why a layer stays dense or a form refuses it; ``Diagnostic``: a message in the history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["info", "warning"]


@dataclass(frozen=True)
class Reason:
    """Why a layer is left alone: a code for machines (``grouped``, ``tied_parameter``) and a sentence for people."""

    code: str
    text: str

    def about(self, layer: str, level: Level = "info") -> Diagnostic:
        """Return the same code and text as a message about a layer."""
        return Diagnostic(level, self.code, self.text, layer)


@dataclass(frozen=True)
class Diagnostic:
    """A message about a layer or the network, from tracing or from a pass.

    Attributes:
        level: ``warning`` if the result may differ from what the user expects, otherwise ``info``.
        code: a name for machines, for example ``no_data``.
        text: a sentence for people.
        layer: the layer's name; None if the message is about the network.
    """

    level: Level
    code: str
    text: str
    layer: str | None = None
