"""The contract of importance scores: the harm to the network of an error in each layer."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping

from tdcompile.core.plugin import Plugin
from tdcompile.errors import InputError
from tdcompile.ir.program import Program


class Importance(Plugin):
    """Scores the layers of a program; selectors multiply a layer's error by its score."""

    @abstractmethod
    def score(self, program: Program) -> Mapping[str, float]:
        """Return a non-negative, finite score for each layer by name.

        Raises:
            InputError: the score needs data (or labels) that the task does not have.
        """


def normalised(scores: Mapping[str, float]) -> dict[str, float]:
    """Return scores scaled to a mean of 1; all 1.0 if all are zero.

    Raises:
        InputError: a score is NaN or infinite.
    """
    broken = [name for name, score in scores.items() if not math.isfinite(score)]
    if broken:
        raise InputError(
            f"the importance of '{broken[0]}' is not finite: the weights or the data hold a NaN or an infinity"
        )
    mean = sum(scores.values()) / max(len(scores), 1)
    return {name: score / mean if mean > 0 else 1.0 for name, score in scores.items()}
