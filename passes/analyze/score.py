"""``score``: how much the network suffers from an error in each layer, by a named importance score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from tdcompile.errors import TdcompileError
from tdcompile.facts import Fact
from tdcompile.importance import Importance
from tdcompile.kinds import AnalysisPass
from tdcompile.program import Program
from tdcompile.ranks import Importances
from tdcompile.registry import make


@dataclass(frozen=True)
class Score(AnalysisPass):
    """Importance of every layer.

    Attributes:
        by: the text form of a score.
    """

    name: ClassVar[str] = "score"
    gives: ClassVar[tuple[type[Fact], ...]] = (Importances,)
    by: str = "auto"

    def analyze(self, program: Program) -> Importances:
        """The named score's values.

        Raises:
            TdcompileError: a value is negative or not finite.
        """
        scores = dict(make(Importance, self.by).score(program))
        for layer, value in scores.items():
            if not math.isfinite(value) or value < 0:
                raise TdcompileError(f"the score '{self.by}' gave {value} for '{layer}': expected a finite value >= 0")
        return Importances(scores, self.by)
