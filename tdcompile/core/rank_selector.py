"""``RankSelector``: the contract of plug-ins that choose one candidate for each layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from tdcompile.core.plan import Candidates, RankPlan
from tdcompile.core.plugin import Plugin
from tdcompile.ir.target import Budget


class RankSelector(Plugin):
    """Choose one candidate for each layer: a table of candidates in, a plan out.

    Attributes:
        needs_spectra: the selector reads ``Candidates.spectra``, which ``propose{spectra=true}`` computes.
    """

    needs_spectra: ClassVar[bool] = False

    @abstractmethod
    def select(self, candidates: Candidates, importances: Mapping[str, float], budget: Budget) -> RankPlan:
        """Return the plan.

        Args:
            candidates: the candidates of each layer, one of them dense.
            importances: the weight of each layer's error; 1.0 for a layer without one.
            budget: the shares of the dense cost that the plan may cost.

        Raises:
            BudgetError: no plan meets the budget; the message states what is reachable.
        """
