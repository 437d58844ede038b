"""``knapsack``: choose one candidate for each layer by exact multiple-choice knapsack (HiGHS)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack, vstack

from tdcompile.core.plan import Candidate, Candidates, RankPlan, pareto, within
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.registry import make
from tdcompile.errors import InputError
from tdcompile.ir.target import Budget
from tdcompile.planning.allocation import LOSSES, limits_of, load, settle
from tdcompile.support.options import NonNegative, PositiveOrInf
from tdcompile.support.quiet import native_output_dropped

log = logging.getLogger("tdcompile")

# HiGHS allows errors of 1e-6 in rows and objective; in these units they are negligible.
_ROW, _OBJECTIVE = 1e3, 1e4
_TIE = 1e-6  # weight of the whole budget in the objective, as a share of the largest possible loss
_INFEASIBLE = 2
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Knapsack(RankSelector):
    """Choose the plan of least Σ importance · loss(error) within all limits; the default selector.

    Candidates that another one beats are pruned. The rest is a multiple-choice knapsack: binary x, Σ_c x_lc = 1 for
    each layer l, Σ cost · x <= limit for each limited field. The cheaper plan wins a tie in loss. The plan
    states the gap that the solver proved.

    Attributes:
        loss: the loss of a relative error e. ``noise``: e² / (1 − e²), noise over the remaining signal, which is large
            for a layer that loses nearly everything; ``squared``: e²; ``linear``: e.
        mip_rel_gap: the relative gap at which the solver may stop.
        time_limit: seconds after which the best plan so far is used, with its gap. If the solver has none yet, as with
            thousands of layers of hundreds of candidates, the plan is that of ``lagrangian``.
    """

    name: ClassVar[str] = "knapsack"
    loss: Literal["noise", "squared", "linear"] = "noise"
    mip_rel_gap: NonNegative = 1e-4
    time_limit: PositiveOrInf = 30.0

    def select(self, candidates: Candidates, importances: Mapping[str, float], budget: Budget) -> RankPlan:
        """See ``RankSelector.select``."""
        limits = limits_of(candidates, budget)
        table = {
            name: pareto([o for o in candidates.layers[name] if math.isfinite(o.error)], tuple(limits))
            for name in sorted(candidates.layers)  # sorted: the order of a mapping must not reach the solver
        }
        problem = _Problem.of(table, candidates, importances, limits, LOSSES[self.loss])
        if problem.loss.size == 0 or not problem.coverable():
            cheapest = {name: min(rows, key=lambda o: load(o.cost, limits)) for name, rows in table.items()}
            return settle(self, candidates, budget, cheapest, gap=0.0)
        found = self._solve(problem, candidates, limits)
        if found is None:
            log.warning("the solver found no plan in %g seconds: the plan is that of 'lagrangian'", self.time_limit)
            return make(RankSelector, f"lagrangian{{loss={self.loss}}}").select(candidates, importances, budget)
        choices, gap = found
        return settle(self, candidates, budget, choices, gap=gap)

    def _solve(
        self, problem: _Problem, candidates: Candidates, limits: Mapping[str, float]
    ) -> tuple[dict[str, Candidate], float | None] | None:
        """Return the best plan and its gap, or the plan of least excess if none is within all limits.

        Return None if the time ends before there is a plan.
        """
        options = {"mip_rel_gap": self.mip_rel_gap, "time_limit": self.time_limit}
        room = problem.room
        while True:
            result = problem.least_loss(room, options)
            infeasible = result.status == _INFEASIBLE
            if infeasible:
                result = problem.least_excess(options)
            if result.x is None:
                return None
            choices = problem.choices(result.x)
            cost = candidates.cost(choices)
            if infeasible or within(cost, limits):
                return choices, None if infeasible else float(result.mip_gap or 0.0)
            # The solver's rounding exceeds a limit: reduce its room by the excess.
            room = room - 2 * _ROW * max(getattr(cost, field) / limit - 1 for field, limit in limits.items())


@dataclass(frozen=True)
class _Problem:
    """The knapsack as arrays: one column for each candidate, layer after layer.

    Attributes:
        table: the candidates of each layer.
        loss: scaled loss, including the tie-break towards cheaper candidates.
        use: ``(fields, columns)``: the share of each limit that each candidate takes.
        room: the share of each limit that the rest of the network leaves.
        one: ``(layers, columns)``: 1 for the candidates of a layer, otherwise 0.
    """

    table: Mapping[str, Sequence[Candidate]]
    loss: Floats
    use: Floats
    room: Floats
    one: csr_array

    @classmethod
    def of(
        cls,
        table: Mapping[str, Sequence[Candidate]],
        candidates: Candidates,
        importances: Mapping[str, float],
        limits: Mapping[str, float],
        price: Callable[[float], float],
    ) -> _Problem:
        loss = np.array([importances.get(name, 1.0) * price(o.error) for name, rows in table.items() for o in rows])
        if not (np.isfinite(loss).all() and (loss >= 0).all()):
            raise InputError("an importance is negative or not finite: every layer's is at least 0")
        costs = [o.cost for rows in table.values() for o in rows]
        use = np.array([[getattr(cost, f) / limit for cost in costs] for f, limit in limits.items()])
        sizes = [len(rows) for rows in table.values()]
        rows = np.repeat(np.arange(len(sizes)), sizes)
        worst = np.zeros(len(sizes))
        np.maximum.at(worst, rows, loss)
        scaled = loss / (worst.sum() or 1.0) + _TIE * use.reshape(len(limits), -1).mean(axis=0)
        one = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(len(sizes), len(rows)))
        room = np.array([1 - getattr(candidates.rest, f) / limit for f, limit in limits.items()])
        return cls(table, _OBJECTIVE * scaled, _ROW * use, _ROW * room, one)

    def coverable(self) -> bool:
        """Return whether each limit can be met on its own."""
        starts = self.one.indptr[:-1]
        return bool((np.minimum.reduceat(self.use, starts, axis=1).sum(axis=1) <= self.room + _ROW * 1e-9).all())

    def least_loss(self, room: Floats, options: Mapping[str, float]) -> Any:
        """Return the solver's result for least Σ loss · x within every limit."""
        return _milp(
            self.loss,
            integrality=np.ones_like(self.loss),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(self.one, 1, 1), LinearConstraint(self.use, -np.inf, room)],
            options=dict(options),
        )

    def least_excess(self, options: Mapping[str, float]) -> Any:
        """Return the solver's result for the least largest excess over a limit, which is one more column."""
        columns = self.loss.size
        limits = hstack([csr_array(self.use), csr_array(np.full((len(self.room), 1), -_ROW))])
        layers = hstack([self.one, csr_array((self.one.shape[0], 1))])
        return _milp(
            np.append(np.zeros(columns), 1.0),
            integrality=np.append(np.ones(columns), 0),
            bounds=Bounds(np.append(np.zeros(columns), -np.inf), np.append(np.ones(columns), np.inf)),
            constraints=LinearConstraint(
                vstack([layers, limits]),
                np.append(np.ones(layers.shape[0]), np.full(len(self.room), -np.inf)),
                np.append(np.ones(layers.shape[0]), self.room),
            ),
            options=dict(options),
        )

    def choices(self, x: Floats) -> dict[str, Candidate]:
        """Return for each layer the candidate whose column is nearest to 1."""
        starts = self.one.indptr
        return {
            name: rows[int(np.argmax(x[starts[i] : starts[i + 1]]))]
            for i, (name, rows) in enumerate(self.table.items())
        }


def _milp(costs: Floats, **problem: Any) -> Any:
    """Call ``scipy.optimize.milp``; some versions of HiGHS print a debug line regardless of their options."""
    with native_output_dropped():
        return milp(costs, **problem)
