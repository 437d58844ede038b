"""``knapsack``: one candidate for each layer out of all forms and ranks, by exact multiple-choice knapsack (HiGHS)."""

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
from tdcompile.support.options import NonNegative, Positive
from tdcompile.support.quiet import native_output_to_stderr

log = logging.getLogger("tdcompile")

# HiGHS lets a row be off by 1e-6 and an objective by as much: in these units that is nothing.
_ROW, _OBJECTIVE = 1e3, 1e4
_TIE = 1e-6  # what the whole budget is worth in the objective, as a share of the largest possible loss
_INFEASIBLE = 2
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Knapsack(RankSelector):
    """The plan of least Σ importance · loss(error) that keeps to every limit at once; the default.

    Each layer's candidates are pruned to those that no other one beats, and the rest is a multiple-choice knapsack:
    binary x, Σ_c x_lc = 1 for each layer l, Σ cost · x <= limit for each limited field. Among plans of equal loss the
    cheaper one is taken. The gap that the solver proves is in the plan.

    Attributes:
        loss: what a relative error e costs. ``noise``: e² / (1 − e²), noise over what is left of the signal, which a
            layer that is as good as gone makes large; ``squared``: e²; ``linear``: e.
        mip_rel_gap: the relative gap at which the solver may stop.
        time_limit: seconds after which the best plan so far is taken, with its gap; where the solver has none yet, as
            with thousands of layers of hundreds of candidates, that of ``lagrangian``.
    """

    name: ClassVar[str] = "knapsack"
    loss: Literal["noise", "squared", "linear"] = "noise"
    mip_rel_gap: NonNegative = 1e-4
    time_limit: Positive = 30.0

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
        """The best plan and its gap; where no plan keeps to all limits, the one whose worst excess is least.

        None where the time was over before there was any.
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
            # The solver rounded in its own favour: leave it that much less room.
            room = room - 2 * _ROW * max(getattr(cost, field) / limit - 1 for field, limit in limits.items())


@dataclass(frozen=True)
class _Problem:
    """The knapsack in numbers: one column for each candidate, layers one after the other.

    Attributes:
        loss: scaled, with the tie-break towards cheaper in it.
        use: ``(fields, columns)``: what each candidate takes of each limit.
        room: what the rest of the network leaves of each limit.
        one: ``(layers, columns)``: which candidates belong to which layer.
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
        """Whether each limit can be kept on its own."""
        starts = self.one.indptr[:-1]
        return bool((np.minimum.reduceat(self.use, starts, axis=1).sum(axis=1) <= self.room + _ROW * 1e-9).all())

    def least_loss(self, room: Floats, options: Mapping[str, float]) -> Any:
        """The solver's result for Σ loss · x -> min under every limit."""
        return _milp(
            self.loss,
            integrality=np.ones_like(self.loss),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(self.one, 1, 1), LinearConstraint(self.use, -np.inf, room)],
            options=dict(options),
        )

    def least_excess(self, options: Mapping[str, float]) -> Any:
        """The solver's result for the plan whose largest excess over a limit, a further column, is least."""
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
        """For each layer the candidate whose column is nearest to 1."""
        starts = self.one.indptr
        return {
            name: rows[int(np.argmax(x[starts[i] : starts[i + 1]]))]
            for i, (name, rows) in enumerate(self.table.items())
        }


def _milp(costs: Floats, **problem: Any) -> Any:
    """``scipy.optimize.milp``; some versions of HiGHS print a line of debugging whatever they are told."""
    with native_output_to_stderr():
        return milp(costs, **problem)
