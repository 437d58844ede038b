"""``energy``: keep the same share of every layer's output energy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tdcompile.core.plan import Candidates, RankPlan
from tdcompile.core.rank_selector import RankSelector
from tdcompile.ir.target import Budget
from tdcompile.planning.allocation import first_fit, ladder, limits_of, settle, within_error
from tdcompile.support.options import Share

_ROUNDING = 1e-12  # in 1 - keep, so that an error of exactly the square root is accepted


@dataclass(frozen=True)
class Energy(RankSelector):
    """Keep at least one share of the output energy in every layer: the cheapest candidate with error² <= 1 - keep.

    Attributes:
        keep: the share; by default the largest that meets the budget. Importances are not used.
    """

    name: ClassVar[str] = "energy"
    keep: Share | None = None

    def select(self, candidates: Candidates, importances: Mapping[str, float], budget: Budget) -> RankPlan:
        """See ``RankSelector.select``; with a given ``keep``, a plan that misses the budget is an error."""
        limits = limits_of(candidates, budget)
        ladders = {name: ladder(options, limits) for name, options in candidates.layers.items()}
        if self.keep is None:
            keeps = sorted({1.0} | {1 - rung.error**2 for rungs in ladders.values() for rung in rungs}, reverse=True)
        else:
            keeps = [self.keep]
        choices = first_fit(lambda keep: within_error(ladders, _error(keep)), keeps, candidates, limits)
        return settle(self, candidates, budget, choices)


def _error(keep: float) -> float:
    return math.sqrt(max(1 - keep + _ROUNDING, 0.0))
