"""``equal-error``: one relative error for every layer, the smallest that the budget allows (arXiv 2305.05318)."""

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
    """One bound on the relative error for every layer, the smallest that meets the budget.

    Each layer takes its cheapest candidate under the bound, found by bisection over the errors there are. The study
    that this allocator comes from bisects twice, over ranks and over the bound; the table makes the inner one a
    look-up. Importances are not used.
    """

    name: ClassVar[str] = "equal-error"

    def select(self, candidates: Candidates, importances: Mapping[str, float], budget: Budget) -> RankPlan:
        """See ``RankSelector.select``."""
        limits = limits_of(candidates, budget)
        ladders = {name: ladder(options, limits) for name, options in candidates.layers.items()}
        errors = sorted({0.0} | {rung.error for rungs in ladders.values() for rung in rungs})
        choices = first_fit(lambda error: within_error(ladders, error), errors, candidates, limits)
        return settle(self, candidates, budget, choices)
