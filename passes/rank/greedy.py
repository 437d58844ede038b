"""``greedy``: start from the dense network and repeatedly take the step of least loss for its saving."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from tdcompile.core.plan import Candidate, Candidates, RankPlan, dense_of, within
from tdcompile.core.rank_selector import RankSelector
from tdcompile.ir.target import Budget
from tdcompile.planning.allocation import LOSSES, filled, gainful, limits_of, load, settle, weighted


@dataclass(frozen=True)
class Greedy(RankSelector):
    """Steepest descent: repeat the step of least importance · loss for each share of the limits saved.

    A step moves one layer to any cheaper candidate. Room that the last step leaves is filled again.

    Attributes:
        loss: the loss of a relative error, as in ``knapsack``.
    """

    name: ClassVar[str] = "greedy"
    loss: Literal["noise", "squared", "linear"] = "noise"

    def select(self, candidates: Candidates, importances: Mapping[str, float], budget: Budget) -> RankPlan:
        """See ``RankSelector.select``."""
        limits = limits_of(candidates, budget)
        loss = weighted(importances, LOSSES[self.loss])
        choices = {name: dense_of(options) for name, options in candidates.layers.items()}
        rows = {name: gainful(options, limits) for name, options in candidates.layers.items()}
        cost, steps = (
            candidates.cost(choices),
            [s for s in (_step(n, choices[n], rows[n], loss, limits) for n in rows) if s],
        )
        heapq.heapify(steps)
        while steps and not within(cost, limits):
            _, name, place = heapq.heappop(steps)
            taken = rows[name][place]
            cost, choices[name] = cost - choices[name].cost + taken.cost, taken
            following = _step(name, taken, rows[name], loss, limits)
            if following:
                heapq.heappush(steps, following)
        if within(candidates.cost(choices), limits):
            choices = filled(choices, candidates, loss, limits)
        return settle(self, candidates, budget, choices)


def _step(
    name: str,
    current: Candidate,
    options: Sequence[Candidate],
    loss: Callable[[str, Candidate], float],
    limits: Mapping[str, float],
) -> tuple[float, str, int] | None:
    """Return the best step to a cheaper candidate: loss for its saving, the layer, and the candidate's index."""
    here, paid = loss(name, current), load(current.cost, limits)
    steps = [
        ((loss(name, option) - here) / (paid - load(option.cost, limits)), name, place)
        for place, option in enumerate(options)
        if load(option.cost, limits) < paid
    ]
    return min(steps, default=None)
