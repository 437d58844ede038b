"""``choose``: one candidate for each layer, by a named rank selector under the program's budget."""

from __future__ import annotations

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
    """A plan under the budget.

    Attributes:
        by: the text form of a rank selector.
    """

    name: ClassVar[str] = "choose"
    needs: ClassVar[tuple[type[Fact], ...]] = (Candidates, Importances)
    gives: ClassVar[tuple[type[Fact], ...]] = (RankPlan,)
    by: Annotated[str, registered(RankSelector)] = "knapsack"

    def analyze(self, program: Program) -> RankPlan:
        """Ask the selector; what no decomposition applies to keeps that as its reason.

        Raises:
            BudgetError: no plan meets the budget.
            TdcompileError: the selector gives something else than a plan.
        """
        candidates = program.facts[Candidates]
        selector = make(RankSelector, self.by)
        with during(f"in the rank selector {selector.told()}"):
            plan = selector.select(candidates, program.facts[Importances].scores, program.budget)
        if not isinstance(plan, RankPlan):
            raise TdcompileError(f"the rank selector {selector.told()} gave {type(plan).__name__}, expected a RankPlan")
        return replace(plan, reasons={**plan.reasons, **candidates.reasons})
