"""``search``: the fastest or smallest plan whose loss of quality on training samples set aside is within a limit."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

from tdcompile.backend.deployment import sample_activations, write_deployed
from tdcompile.backend.evaluation import Evaluation, evaluate, evaluate_graph
from tdcompile.backend.lowering import export_lowered
from tdcompile.backend.quality_drop import Drop, quality_drop
from tdcompile.core.passes import AnalysisPass
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import Candidates, FloatCandidates, Importances, RankPlan, dense_of, within
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.registry import make, registered
from tdcompile.errors import BudgetError, InputError
from tdcompile.ir.facts import Fact, Facts, Shared
from tdcompile.ir.measurements import Baseline, GoalSearch, Probe, Rehearsal
from tdcompile.ir.program import Program
from tdcompile.ir.scoring import is_scored
from tdcompile.ir.target import LATENCY_TOLERANCE, LEAST, LIMITED, WEIGHT_BYTES, Budget, Goal
from tdcompile.planning.allocation import lowest_shares, predicted_loss, settle
from tdcompile.planning.share_search import Trial, expected_loss, next_share
from tdcompile.support.allowed_drop import AllowedDrop
from tdcompile.support.options import Count, Share, Workers
from tdcompile.support.progress import report_progress

_LEAST = 1e-9  # of a limit of 0, to divide by
_ROUNDING = 1e-6  # a share of the dense cost that its own sum is within
_NAMES: dict[Goal, tuple[str, str]] = {
    "fastest": ("latency", "faster"),
    "smallest": ("bytes of weights, as predicted", "smaller"),
}


@dataclass(frozen=True)
class _Built:
    """A plan that was judged.

    Attributes:
        asked: see ``Probe``.
        loss: predicted loss.
        drop: measured loss of quality.
        rounds: of its rehearsal.
        table: its candidates, with prices as corrected.
    """

    asked: float
    plan: RankPlan
    loss: float
    drop: Drop
    rounds: Rehearsal
    table: Candidates

    @property
    def trial(self) -> Trial:
        """The predicted loss, and the drop in units of its limit."""
        return Trial(self.loss, math.inf if self.drop.value is None else self.drop.value / max(self.drop.limit, _LEAST))


@dataclass(frozen=True)
class Search(AnalysisPass):
    """Find the least latency or size whose loss of quality is within a limit, by building few plans.

    A plan is chosen at a share of the dense cost, rehearsed if the goal is speed, factorised, refitted and judged on
    training samples that nothing else reads: in PyTorch, in int8 as an ONNX model. The shares come from a bisection
    on the curve of predicted losses, corrected by the measured ones. All plans share calibration, candidates and their
    errors, and each starts with the prices that the one before corrected. Candidates in fp32 beside int8 are searched
    last, and only where they may win. The budget limits every plan.

    Attributes:
        goal: ``fastest`` or ``smallest``.
        max_drop: largest loss, ``1`` in the unit of the task's metric or ``2%`` relative; without targets of test
            samples, points of top-1 agreement or percent of relative error.
        by: text form of a rank selector.
        plans: most plans to build in each precision, the dense one not counted.
        tolerance: relative difference of two shares between which nothing is searched.
        jobs: number of layers factorised in parallel.
    """

    name: ClassVar[str] = "search"
    takes: ClassVar[Mapping[str, str]] = {"ranks": "by", "goal": "goal"}
    needs: ClassVar[tuple[type[Fact], ...]] = (Candidates, Importances)
    gives: ClassVar[tuple[type[Fact], ...]] = (RankPlan, Candidates, Rehearsal, GoalSearch)
    selects: ClassVar[bool] = True
    goal: Goal = "fastest"
    max_drop: str = "1"
    by: Annotated[str, registered(RankSelector)] = "knapsack"
    plans: Count = 6
    tolerance: Share = 0.02
    jobs: Workers = 1

    def check(self) -> None:
        """Check the limit.

        Raises:
            InputError: it is neither a number nor a share.
        """
        AllowedDrop.parse(self.max_drop)

    def analyze(self, program: Program) -> tuple[RankPlan, Candidates, Rehearsal, GoalSearch]:
        """Return the plan with its candidates and rehearsal, and the plans that were built.

        Raises:
            BudgetError: no plan is within the budget.
            InputError: no samples were set aside.
        """
        if program.task.selection is None:
            raise InputError("'search' judges plans on Task.selection, which is empty: Task.selecting fills it")
        bench = _Bench(self, program)
        program.facts.derived(Shared, Shared)  # all plans start from these facts
        found, floats = program.facts[Candidates], program.facts.get(FloatCandidates)
        tables = [found, *([floats.candidates] if floats is not None and floats.candidates is not None else [])]
        best: _Built | None = None
        for table in tables:
            best = self._least(bench, table, best) or best
        chosen = best or bench.mildest()
        return chosen.plan, chosen.table, chosen.rounds, bench.result(best)

    def _least(self, bench: _Bench, table: Candidates, best: _Built | None) -> _Built | None:
        """Return the best plan of a precision within the limit; None if there is none or it does not beat another."""
        limit = getattr(bench.program.budget, bench.name) or 1.0
        high = limit if best is None else min(limit, bench.kept(best.plan) / bench.scale(table))
        low = lowest_shares(table, bench.budget(1.0))[bench.name]
        if best is not None and low >= high:
            return None  # the other precision wins
        good = bench.dense(table, high) or bench.built(table, high)
        if good is None or not good.drop.passed:
            return None  # what is cheaper loses more
        found, bad, high = good, None, good.asked
        for _ in range(self.plans):
            if high - low <= self.tolerance * high:
                break
            loss = expected_loss(good.trial, bad, 1.0)
            share = next_share(low, high, loss, partial(bench.loss_at, good.table))
            one = bench.built(good.table, share)
            if one is None:  # the budget is out of reach
                low = share
                continue
            if not one.drop.passed:
                good, bad, low = replace(good, table=one.table), one.trial, share
                continue
            kept = bench.kept(one.plan) / bench.scale(table)
            good, high = one, min(share, max(kept, low))
            found = min(found, one, key=lambda each: bench.kept(each.plan))
            if kept > share * (1 + LATENCY_TOLERANCE):
                break  # the graph has no faster plan
        return found if best is None or bench.kept(found.plan) < bench.kept(best.plan) else None


@dataclass
class _Bench:
    """Builds and judges the plans of one program.

    Attributes:
        search: the options.
        program: with the candidates.
        tried: the plans that were judged, dense ones in fp32 excepted.
        samples: on which they were judged.
        resolution: see ``GoalSearch``.
    """

    search: Search
    program: Program
    tried: list[_Built] = field(default_factory=list)
    samples: int = 0
    resolution: float = 0.0

    @property
    def name(self) -> str:
        """What the goal makes least, as in a budget."""
        return LEAST[self.search.goal]

    def budget(self, share: float) -> Budget:
        """Return the program's budget with another share of what is made least."""
        return replace(self.program.budget, **{self.name: min(share, 1.0)})

    def scale(self, table: Candidates) -> float:
        """Return the bytes of a weight in relation to fp32 if the size is made least, else 1."""
        return WEIGHT_BYTES[table.precision] / WEIGHT_BYTES["fp32"] if self.search.goal == "smallest" else 1.0

    def kept(self, plan: RankPlan) -> float:
        """Return the share of the dense network's latency, or of the bytes of its weights, that a plan keeps."""
        share = getattr(plan.predicted, LIMITED[self.name]) / getattr(plan.dense, LIMITED[self.name])
        bytes_kept = WEIGHT_BYTES[plan.precision] / WEIGHT_BYTES["fp32"] if self.search.goal == "smallest" else 1.0
        return float(share * bytes_kept)

    def dense(self, table: Candidates, high: float) -> _Built | None:
        """Return the dense network in the precision of a table; None if it is not within the budget.

        Args:
            table: the candidates.
            high: largest share of what is made least.
        """
        limits = self.budget(high).limits(table.whole)
        if not within(table.dense, {name: limit * (1 + _ROUNDING) for name, limit in limits.items()}):
            return None
        field_name = LIMITED[self.name]
        share = min(getattr(table.dense, field_name) / getattr(table.whole, field_name) * (1 + _ROUNDING), 1.0)
        choices = {name: dense_of(options) for name, options in table.layers.items()}
        plan = settle(make(RankSelector, self.search.by), table, self.budget(share), choices)
        if table.precision == "fp32":
            loss = Drop(0.0, 0.0, "the dense network loses nothing")
            return _Built(share, plan, 0.0, loss, Rehearsal(()), table)
        return self._judged(share, self._with(table, share).with_(facts=self._facts(table, plan, Rehearsal(()))))

    def loss_at(self, table: Candidates, share: float) -> float:
        """Return the predicted loss of the plan at a share; infinite if there is none."""
        scores = self.program.facts[Importances].scores
        try:
            plan = make(RankSelector, self.search.by).select(table, scores, self.budget(share))
        except BudgetError:
            return math.inf
        return predicted_loss(plan, scores)

    def built(self, table: Candidates, share: float) -> _Built | None:
        """Choose, rehearse if the goal is speed, build and judge the plan at a share; None if there is no such plan."""
        choose = f"choose{{by={self.search.by}}}"
        steps = Pipeline.parse(f"{choose},rehearse" if self.search.goal == "fastest" else choose)
        try:
            planned = steps.run(self._with(table, share))
        except BudgetError:
            return None
        facts = planned.facts
        if Rehearsal not in facts:
            planned = planned.with_(facts=self._facts(facts[Candidates], facts[RankPlan], Rehearsal(())))
        return self._judged(share, planned)

    def mildest(self) -> _Built:
        """Return the plan of least drop, if none is within the limit.

        Raises:
            BudgetError: no plan was built.
        """
        if not self.tried:
            raise BudgetError(f"no plan is within the budget {self.program.budget}: raise it")
        return min(self.tried, key=lambda one: one.trial.drop)

    def result(self, best: _Built | None) -> GoalSearch:
        """Return what was found, and the plans that were built."""
        probes = tuple(
            Probe(one.plan.precision, one.asked, self.kept(one.plan), one.drop.value, one.drop.passed)
            for one in self.tried
        )
        chosen = best or self.mildest()
        kept = f"{self.kept(chosen.plan):.3f} of the dense network's {_NAMES[self.search.goal][0]}"
        told = f"search: {self._head(best)}: {kept}; {chosen.drop.sentence}"
        if self.tried and all(one is not chosen for one in self.tried):
            mildest = self.mildest()
            told += f"; the mildest plan built keeps {self.kept(mildest.plan):.3f}, and {mildest.drop.sentence}"
        told += f"; {len(probes)} plans were judged on {self.samples} training samples set aside"
        search, limit = self.search, max((one.drop.limit for one in self.tried), default=0.0)
        judges = limit, self.samples, self.resolution
        return GoalSearch(search.goal, search.max_drop, *judges, probes, self._head(best), told)

    def _head(self, best: _Built | None) -> str:
        limit, plan = f"within a drop of {self.search.max_drop}", (best or self.mildest()).plan
        dense = all(choice.is_dense for choice in plan.choices.values())
        what = "the dense network" if plan.precision == "fp32" else f"the dense network in {plan.precision}"
        if best is None:
            kept = what if dense else f"the mildest plan within {self.program.budget}"
            return f"nothing is {limit}: {kept} is kept"
        if not dense:
            return f"the {self.search.goal} of {len(self.tried)} plans {limit}"
        if plan.precision == "fp32":
            return f"nothing {_NAMES[self.search.goal][1]} than the dense network is {limit}"
        return f"{what} is the {self.search.goal} {limit}"

    def _with(self, table: Candidates, share: float) -> Program:
        facts = self.program.facts.having(table, FloatCandidates())
        return self.program.with_(budget=self.budget(share), facts=facts, workspace=None)

    def _facts(self, *facts: Fact) -> Facts:
        return self.program.facts.having(FloatCandidates(), *facts)

    def _judged(self, share: float, planned: Program) -> _Built:
        """Build and judge a planned program; a plan that was judged before is not built again."""
        facts = planned.facts
        plan, rounds, table = facts[RankPlan], facts[Rehearsal], facts[Candidates]
        loss = predicted_loss(plan, self.program.facts[Importances].scores)
        known = next((one for one in self.tried if _same(one.plan, plan)), None)
        if known is not None:
            return known
        jobs = "" if self.search.jobs == 1 else f"{{jobs={self.search.jobs}}}"
        made = Pipeline.parse(f"factorize{jobs},recalibrate,refit").run(planned)
        drop = quality_drop(AllowedDrop.parse(self.search.max_drop), self._evaluated(made, plan))
        one = _Built(share, plan, loss, drop, rounds, table)
        self.tried.append(one)
        most = self.search.plans * (2 if self.program.facts.get(FloatCandidates) else 1) + 1
        report_progress(len(self.tried), most, f"{self.kept(plan):.3f} of dense: {drop.sentence}")
        return one

    def _evaluated(self, made: Program, plan: RankPlan) -> Evaluation:
        """Compare a built plan with the dense network on the samples set aside.

        Without targets of test samples, targets say nothing here either: the final figure is the agreement.
        """
        task = made.task
        assert task.selection is not None  # ``analyze`` has looked
        found = evaluate_graph(made, task.selection) if plan.precision == "fp32" else _as_model(made, plan)
        if not is_scored(made):
            found = replace(found, dense_score=None, compiled_score=None)
        self.samples, about = found.samples, found.metric
        if found.dense_score is not None and about is not None:
            counted = about.points == "points"
        else:
            counted = any(output.agreement is not None for output in found.outputs)
        self.resolution = 100 / found.samples if counted else 0.0
        return found


def _as_model(made: Program, plan: RankPlan) -> Evaluation:
    """Compare the ONNX model in the precision of the plan with the dense one in fp32, in onnxruntime."""
    known = made.facts.get(Baseline)
    with tempfile.TemporaryDirectory(prefix="tdcompile-") as folder:
        dense, floats, model = (Path(folder) / f"{name}.onnx" for name in ("dense", "floats", "model"))
        if known is None or not known.model.is_file():
            export_lowered(made, made.dense, dense)
        else:
            dense = known.model
        export_lowered(made, made.graph, floats)
        seen = sample_activations(made, floats) if plan.precision == "int8" else None
        write_deployed(made, floats, model, plan.precision, seen)
        return evaluate(dense, [model], made.task.selection, made)[0]


def _same(one: RankPlan, other: RankPlan) -> bool:
    """Return whether two plans have the same forms and ranks in the same precision."""
    return one.precision == other.precision and _forms(one) == _forms(other)


def _forms(plan: RankPlan) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, choice.form, choice.ranks) for name, choice in plan.choices.items()]
