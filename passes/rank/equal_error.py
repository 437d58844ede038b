"""``equal-error``: bound every layer by the same relative error (arXiv 2305.05318)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tdcompile.core.plan import Candidates, RankPlan
from tdcompile.core.rank_selector import RankSelector
from tdcompile.ir.target import Budget
from tdcompile.planning.allocation import first_fit, ladder, limits_of, settle, within_error


@dataclass(frozen=True)
class EqualError(RankSelector):
    """Bound every layer by the smallest relative error that meets the budget.

    Each layer takes its cheapest candidate under the bound. Bisection over the errors in the table finds the bound. The
    study bisects over ranks too; here the table replaces that by a look-up. Importances are not used.
    """

    name: ClassVar[str] = "equal-error"

    def select(self, candidates: Candidates, importances: Mapping[str, float], budget: Budget) -> RankPlan:
        """See ``RankSelector.select``."""
        limits = limits_of(candidates, budget)
        ladders = {name: ladder(options, limits) for name, options in candidates.layers.items()}
        errors = sorted({0.0} | {rung.error for rungs in ladders.values() for rung in rungs})
        choices = first_fit(lambda error: within_error(ladders, error), errors, candidates, limits)
        return settle(self, candidates, budget, choices)
