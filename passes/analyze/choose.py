"""``choose``: choose one candidate for each layer with a rank selector, under the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from tdcompile.core.passes import AnalysisPass
from tdcompile.core.plan import (
    Candidate,
    Candidates,
    FloatCandidates,
    Importances,
    PrecisionChoice,
    RankPlan,
    dense_of,
)
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.registry import make, registered
from tdcompile.errors import BudgetError, TdcompileError, during, nearest
from tdcompile.ir.facts import Fact
from tdcompile.ir.measurements import Reachable
from tdcompile.ir.program import Program
from tdcompile.ir.target import Budget, Cost, Precision
from tdcompile.planning.allocation import lowest_shares, predicted_loss

_ROUNDING = 1e-6  # the sum of the cheapest candidates is within the budget that it defines


@dataclass(frozen=True)
class Choose(AnalysisPass):
    """Choose a plan under the budget.

    Attributes:
        by: text form of a rank selector.
    """

    name: ClassVar[str] = "choose"
    takes: ClassVar[Mapping[str, str]] = {"ranks": "by"}
    needs: ClassVar[tuple[type[Fact], ...]] = (Candidates, Importances)
    gives: ClassVar[tuple[type[Fact], ...]] = (RankPlan, Candidates, PrecisionChoice)
    by: Annotated[str, registered(RankSelector)] = "knapsack"

    def analyze(self, program: Program) -> tuple[RankPlan, Candidates, PrecisionChoice]:
        """Return the selector's plan; layers that every decomposition refuses keep that reason.

        If there are candidates in fp32 beside others, both plans are made. The one of less predicted loss stays, with
        its candidates; if only one meets the budget, that one.

        Raises:
            BudgetError: no plan meets the budget.
            TdcompileError: the selector does not return a plan, or see ``_complete``.
        """
        candidates, floats = program.facts[Candidates], program.facts.get(FloatCandidates)
        if floats is None or floats.candidates is None:
            plan = self._chosen(program, candidates)
            why = _why(plan.precision, {}, program) if floats is not None and floats.none_meets else ""
            return plan, candidates, PrecisionChoice(why)
        found: list[tuple[float, RankPlan, Candidates]] = []
        refusal: BudgetError | None = None
        for table in (candidates, floats.candidates):
            try:
                plan = self._chosen(program, table)
            except BudgetError as error:
                refusal = refusal or error
            else:
                found.append((predicted_loss(plan, program.facts[Importances].scores), plan, table))
        if not found:
            assert refusal is not None  # both were refused
            raise refusal
        _, plan, table = min(found, key=lambda one: one[0])
        losses = {one.precision: loss for loss, one, _ in found}
        return plan, table, PrecisionChoice(_why(plan.precision, losses, program))

    def _chosen(self, program: Program, candidates: Candidates) -> RankPlan:
        selector = make(RankSelector, self.by)
        with during(f"in the rank selector {selector.told()}"):
            plan = selector.select(candidates, program.facts[Importances].scores, _budget(program, candidates))
        if not isinstance(plan, RankPlan):
            raise TdcompileError(f"the rank selector {selector.told()} gave {type(plan).__name__}, expected a RankPlan")
        plan = _complete(plan, selector.told(), candidates)
        return replace(plan, reasons={**plan.reasons, **candidates.reasons})


def _why(chosen: Precision, losses: Mapping[Precision, float], program: Program) -> str:
    """Return the reason for a precision, from the predicted losses of the plans within the budget."""
    others = {precision: loss for precision, loss in losses.items() if precision != chosen}
    told = f"precision=auto chose {chosen}: "
    if others:
        ((other, loss),) = others.items()
        told += f"its plan has a predicted loss of {losses[chosen]:.3g}, the plan in {other} {loss:.3g}"
    else:
        told += f"no plan in {'fp32' if chosen == 'int8' else 'int8'} meets the budget {program.budget}"
    return told + ("; keep_fp32 has no effect" if chosen == "fp32" and program.keep_fp32 else "")


def _budget(program: Program, candidates: Candidates) -> Budget:
    """Return the budget to choose under: a latency that was measured is within reach, even if the prices deny it.

    ``rehearse`` then corrects the prices.
    """
    budget, known = program.budget, program.facts.get(Reachable)
    if budget.latency is None or known is None or known.latency is None:
        return budget
    lowest = lowest_shares(candidates, budget)["latency"] * (1 + _ROUNDING)
    return replace(budget, latency=min(max(budget.latency, lowest), 1.0))


def _complete(plan: RankPlan, told: str, candidates: Candidates) -> RankPlan:
    """Return the plan with a choice for every layer, and with the costs that the selector left out.

    Args:
        plan: what the selector returned.
        told: the selector, for messages.
        candidates: the layers to choose for.

    Raises:
        TdcompileError: a layer is unknown, or a choice is not a candidate with whole numbers as ranks.
    """
    choices = plan.choices
    if not isinstance(choices, Mapping):
        raise TdcompileError(f"the rank selector {told} gave choices as {type(choices).__name__}, expected a mapping")
    for name, choice in choices.items():
        if name not in candidates.layers:
            known = nearest(str(name), candidates.layers)
            raise TdcompileError(f"the rank selector {told} chose for '{name}', which is no layer; {known}")
        if not isinstance(choice, Candidate) or not all(type(rank) is int for rank in choice.ranks):
            raise TdcompileError(
                f"the rank selector {told} chose {choice!r} for '{name}': expected a Candidate whose ranks are int"
            )
    if missing := [name for name in candidates.layers if name not in choices]:
        choices = {**choices, **{name: dense_of(candidates.layers[name]) for name in missing}}
    predicted = candidates.cost(choices) if plan.predicted == Cost() else plan.predicted
    dense = candidates.whole if plan.dense == Cost() else plan.dense
    return replace(plan, choices=choices, predicted=predicted, dense=dense, precision=candidates.precision)
