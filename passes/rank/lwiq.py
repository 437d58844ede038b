"""``lwiq``: energy ranks times layer importance times one factor set by the budget (arXiv 2408.01534)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from tdcompile.core.plan import Candidate, Candidates, RankPlan, dense_of, within
from tdcompile.core.rank_selector import RankSelector
from tdcompile.ir.target import Budget
from tdcompile.planning.allocation import LOSSES, filled, first_fit, gainful, limits_of, load, settle, weighted
from tdcompile.support.options import NonNegative, Part

_PREFERRED = ("tt", "svd", "tt-linear")  # the paper's tensor train, then forms of the layers that it refuses
_LEVELS, _LARGEST = 400, 64.0


@dataclass(frozen=True)
class LwiqRanks(RankSelector):
    """Give every layer the rank s · q^p · R: base rank R, importance q, and one factor s that meets the budget.

    R is the energy rank of the tensor train: the smallest tied rank whose error is at most ``error``. q is the
    importance relative to the largest. s comes from bisection; another budget needs no new measurement. Room that the
    budget leaves is filled with the steps of most importance · loss for their cost. The paper states neither base
    ranks, exponent nor fill: they are our completion.

    Attributes:
        error: relative error of the base ranks.
        power: p, the effect of importance on ranks.
        fill: whether to fill the room that the budget leaves.
        reserve: share of the budget reserved for the fill. One factor for all can give a layer of low importance too
            low a rank, such as rank 2 for a classifier of 10 classes; raising it costs little.
    """

    name: ClassVar[str] = "lwiq"
    error: Annotated[float, Field(gt=0, lt=1)] = 0.3
    power: NonNegative = 0.5
    fill: bool = True
    reserve: Part = 0.1

    def select(self, candidates: Candidates, importances: Mapping[str, float], budget: Budget) -> RankPlan:
        """See ``RankSelector.select``."""
        limits = limits_of(candidates, budget)
        largest = max((importances.get(name, 1.0) for name in candidates.layers), default=1.0) or 1.0
        paths = {name: _path(options, limits) for name, options in candidates.layers.items()}
        wanted = {
            name: self._base(path) * (importances.get(name, 1.0) / largest) ** self.power
            for name, path in paths.items()
            if path
        }

        def plan(factor: float) -> dict[str, Candidate]:
            return {
                name: _at(path, factor * wanted[name]) if path else dense_of(candidates.layers[name])
                for name, path in paths.items()
            }

        # Geometric, in steps of about 2 percent, from far above the base ranks to far below them.
        factors = [_LARGEST * 2.0 ** (-12 * i / _LEVELS) for i in range(_LEVELS + 1)]
        first = {field: limit * (1 - self.reserve) for field, limit in limits.items()} if self.fill else limits
        choices: Mapping[str, Candidate] = first_fit(plan, [*factors, 0.0], candidates, first)
        if self.fill and within(candidates.cost(choices), limits):
            choices = filled(choices, candidates, weighted(importances, LOSSES["noise"]), limits)
        return settle(self, candidates, budget, choices)

    def _base(self, path: Sequence[Candidate]) -> float:
        """Return R as a sum over the ranks of a candidate; along a path the sum is proportional to the ranks."""
        return float(sum(next((o for o in path if o.error <= self.error), path[-1]).ranks))


def _path(options: Sequence[Candidate], limits: Mapping[str, float]) -> list[Candidate]:
    """Return the candidates of one form that are cheaper than dense, by rising ranks and falling errors."""
    saving = gainful(options, limits)
    forms = {option.decomposition.name: option for option in saving}
    other = min(forms.values(), key=lambda option: option.form, default=None)
    chosen = next((forms[name] for name in _PREFERRED if name in forms), other)
    path: list[Candidate] = []
    for option in sorted(
        (option for option in saving if chosen is not None and option.decomposition == chosen.decomposition),
        key=lambda option: (load(option.cost, limits), option.error),
    ):
        if not path or (option.error < path[-1].error and sum(option.ranks) > sum(path[-1].ranks)):
            path.append(option)
    return path


def _at(path: Sequence[Candidate], ranks: float) -> Candidate:
    """Return the largest candidate of at most these ranks; the smallest one if all are larger."""
    return next((option for option in reversed(path) if sum(option.ranks) <= ranks), path[0])
