"""The contract of importance scores: how much the network suffers from an error in each layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from tdcompile.plugin import Plugin
from tdcompile.program import Program


class Importance(Plugin):
    """Scores the layers of a program; selectors multiply a layer's error by its score."""

    @abstractmethod
    def score(self, program: Program) -> Mapping[str, float]:
        """A non-negative, finite score for each layer by name.

        Raises:
            InputError: the score needs data (or labels) that the task does not have.
        """
