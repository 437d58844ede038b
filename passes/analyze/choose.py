"""``choose``: choose one candidate for each layer with a rank selector, under the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from tdcompile.core.passes import AnalysisPass
from tdcompile.core.plan import Candidates, Importances, RankPlan
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.registry import make, registered
from tdcompile.errors import TdcompileError, during
from tdcompile.ir.facts import Fact
from tdcompile.ir.program import Program


@dataclass(frozen=True)
class Choose(AnalysisPass):
    """Choose a plan under the budget.

    Attributes:
        by: text form of a rank selector.
    """

    name: ClassVar[str] = "choose"
    takes: ClassVar[Mapping[str, str]] = {"ranks": "by"}
    needs: ClassVar[tuple[type[Fact], ...]] = (Candidates, Importances)
    gives: ClassVar[tuple[type[Fact], ...]] = (RankPlan,)
    by: Annotated[str, registered(RankSelector)] = "knapsack"

    def analyze(self, program: Program) -> RankPlan:
        """Return the selector's plan; layers that every decomposition refuses keep that reason.

        Raises:
            BudgetError: no plan meets the budget.
            TdcompileError: the selector does not return a plan.
        """
        candidates = program.facts[Candidates]
        selector = make(RankSelector, self.by)
        with during(f"in the rank selector {selector.told()}"):
            plan = selector.select(candidates, program.facts[Importances].scores, program.budget)
        if not isinstance(plan, RankPlan):
            raise TdcompileError(f"the rank selector {selector.told()} gave {type(plan).__name__}, expected a RankPlan")
        return replace(plan, reasons={**plan.reasons, **candidates.reasons})
