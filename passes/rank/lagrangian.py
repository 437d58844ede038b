"""``lagrangian``: one price of cost for all layers, found by bisection, then a fill; for thousands of layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from tdcompile.core.plan import Candidate, Candidates, RankPlan, within
from tdcompile.core.rank_selector import RankSelector
from tdcompile.ir.target import Budget
from tdcompile.planning.allocation import LOSSES, filled, limits_of, load, settle, weighted

_DOUBLINGS, _BISECTIONS = 200, 100


@dataclass(frozen=True)
class Lagrangian(RankSelector):
    """Take the candidate of least loss + λ · cost in each layer, with the least λ within budget (BALF, 2509.25136).

    Time is linear in the candidates. Such plans lie on the convex hull of loss and cost. Room that the budget leaves is
    filled with the steps of most loss saved for their cost. Under several limits a cost is the sum of its shares of
    them (our completion).

    Attributes:
        loss: the loss of a relative error, as in ``knapsack``.
    """

    name: ClassVar[str] = "lagrangian"
    loss: Literal["noise", "squared", "linear"] = "noise"

    def select(self, candidates: Candidates, importances: Mapping[str, float], budget: Budget) -> RankPlan:
        """See ``RankSelector.select``."""
        limits = limits_of(candidates, budget)
        loss = weighted(importances, LOSSES[self.loss])
        table = _Table(candidates, loss, limits)
        choices = table.choices(0.0)
        if not within(candidates.cost(choices), limits):
            choices = table.choices(self._price(table, candidates, limits))
        if within(candidates.cost(choices), limits):
            choices = filled(choices, candidates, loss, limits)
        return settle(self, candidates, budget, choices)

    def _price(self, table: _Table, candidates: Candidates, limits: Mapping[str, float]) -> float:
        """Return the least λ that meets the limits, or a very large one if none does."""

        def fits(price: float) -> bool:
            return within(candidates.cost(table.choices(price)), limits)

        low, high = 0.0, table.scale
        for _ in range(_DOUBLINGS):
            if fits(high):
                break
            low, high = high, 2 * high
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if not low < middle < high:
                break
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high


class _Table:
    """Loss and load of all candidates as arrays, layer after layer."""

    def __init__(
        self, candidates: Candidates, loss: Callable[[str, Candidate], float], limits: Mapping[str, float]
    ) -> None:
        self._options = {
            name: [o for o in options if math.isfinite(o.error)] for name, options in candidates.layers.items()
        }
        self._loss = np.array([loss(name, o) for name, options in self._options.items() for o in options])
        self._load = np.array([load(o.cost, limits) for options in self._options.values() for o in options])
        sizes = [len(options) for options in self._options.values()]
        self._starts = np.cumsum([0, *sizes])[:-1]
        self._owner = np.repeat(np.arange(len(sizes)), sizes)

    @property
    def scale(self) -> float:
        """A first price, at which cost hardly matters."""
        spread = float(np.ptp(self._load)) if len(self._load) else 0.0
        return 1e-6 * max(float(self._loss.max(initial=0.0)), 1e-12) / max(spread, 1e-12)

    def choices(self, price: float) -> dict[str, Candidate]:
        """Return for each layer the candidate of least loss + λ · load, the cheapest of equal ones."""
        order = np.lexsort((self._load, self._loss + price * self._load, self._owner))
        first = order[self._starts] - self._starts
        return {
            name: options[place] for (name, options), place in zip(self._options.items(), first.tolist(), strict=True)
        }
