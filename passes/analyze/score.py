"""``score``: how much an error in each layer harms the network, by an importance score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from tdcompile.core.importance import Importance
from tdcompile.core.passes import AnalysisPass
from tdcompile.core.plan import Importances
from tdcompile.core.registry import make, registered
from tdcompile.errors import TdcompileError, during
from tdcompile.ir.facts import Fact
from tdcompile.ir.program import Program, sites


@dataclass(frozen=True)
class Score(AnalysisPass):
    """Score the importance of every layer.

    Attributes:
        by: text form of a score.
    """

    name: ClassVar[str] = "score"
    takes: ClassVar[Mapping[str, str]] = {"importance": "by"}
    gives: ClassVar[tuple[type[Fact], ...]] = (Importances,)
    by: Annotated[str, registered(Importance)] = "auto"

    def analyze(self, program: Program) -> Importances:
        """Return the values of the score.

        Raises:
            TdcompileError: a value is negative or not finite, or no value belongs to a layer.
        """
        score = make(Importance, self.by)
        with during(f"in the score {score.told()}"):
            scores = dict(score.score(program))
        if scores and not scores.keys() & sites(program).keys():
            raise TdcompileError(f"the score '{self.by}' names none of the network's layers: {', '.join(scores)}")
        for layer, value in scores.items():
            if not math.isfinite(value) or value < 0:
                raise TdcompileError(f"the score '{self.by}' gave {value} for '{layer}': expected a finite value >= 0")
        return Importances(scores, self.by)
