"""``RankSelector``: the contract of what chooses one candidate for each layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from tdcompile.core.plan import Candidates, RankPlan
from tdcompile.core.plugin import Plugin
from tdcompile.ir.target import Budget


class RankSelector(Plugin):
    """Chooses one candidate for each layer: a table in, a plan out.

    Attributes:
        needs_spectra: whether it reads ``Candidates.spectra``, which ``propose{spectra=true}`` gives.
    """

    needs_spectra: ClassVar[bool] = False

    @abstractmethod
    def select(self, candidates: Candidates, importances: Mapping[str, float], budget: Budget) -> RankPlan:
        """The plan.

        Args:
            candidates: for each layer its candidates, dense first.
            importances: for each layer a weight of its error; 1.0 where a layer is missing.
            budget: the shares of the dense cost that may be kept.

        Raises:
            BudgetError: no plan meets the budget; the message says what can.
        """
