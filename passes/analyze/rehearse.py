"""``rehearse``: run a plan's graph, with random factors, against the dense one before any factor is computed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import fx

from tdcompile.attribution import layer_seconds
from tdcompile.calibration import Baseline, Rehearsal, Round
from tdcompile.decomposition import Decomposition
from tdcompile.errors import BudgetError
from tdcompile.facts import Fact
from tdcompile.inference import export_folded, timing_inputs
from tdcompile.kinds import AnalysisPass, tick
from tdcompile.layer import Refusal
from tdcompile.program import Program, sites
from tdcompile.ranks import DENSE, Candidate, Candidates, Importances, RankPlan, RankSelector
from tdcompile.registry import make
from tdcompile.runtime import time_models
from tdcompile.surgery import copy_graph, replace_module
from tdcompile.transplant import Graft, transplant

_FARTHEST = 0.5  # a prediction is never corrected by more than this factor, or its inverse


@dataclass(frozen=True)
class Rehearse(AnalysisPass):
    """Measure the plan inside the whole graph, put back what is not faster there, and choose again.

    Latency does not depend on the values of weights, so the plan's shapes with random factors show what it will
    cost. What was measured corrects the prices that the plan was chosen from.

    Attributes:
        rounds: at most so many plans are measured.
        over: a plan stands when its measured latency is at most this share over the budget,
        tolerance: and its predicted latency at most this share away from the measured one.
        seconds: how long each round measures.
        aim: share of the budget that plans are chosen for; what is measured varies by about the rest, and a plan that
            aimed at all of it would be over half of the time.
    """

    name: ClassVar[str] = "rehearse"
    needs: ClassVar[tuple[type[Fact], ...]] = (Baseline, Candidates, Importances, RankPlan)
    gives: ClassVar[tuple[type[Fact], ...]] = (RankPlan, Rehearsal)
    rounds: int = 4
    over: float = 0.01
    tolerance: float = 0.02
    seconds: float = 1.5
    aim: float = 0.995

    def analyze(self, program: Program) -> tuple[RankPlan, Rehearsal]:
        """The plan that stood, its predicted latency corrected, and what each round measured."""
        share = program.budget.latency
        plan, candidates = program.facts[RankPlan], program.facts[Candidates]
        if share is None:
            return plan, Rehearsal(())
        aim = share if share == 1.0 else self.aim * share  # the dense network itself keeps to all of it
        inputs, baseline = timing_inputs(program), program.facts[Baseline].model
        in_dense = layer_seconds(baseline, candidates.layers, inputs, program.target)
        candidates = _corrected(candidates, in_dense)
        with contextlib.suppress(BudgetError):  # the first prices found a plan: it is tried before it is given up
            plan = self._again(program, candidates, plan, aim)
        if all(choice.decomposition == DENSE for choice in plan.choices.values()):
            return plan, Rehearsal(())  # the dense network is as fast as it is; a measurement would only say noise
        back: dict[str, Refusal] = {}
        tried: list[tuple[Round, RankPlan]] = []
        bias = 1.0
        for number in range(1, self.rounds + 1):
            with tempfile.TemporaryDirectory(prefix="tdcompile-") as folder:
                file = Path(folder) / "rehearsal.onnx"
                _write(program, plan, baseline, file)
                dense, compiled = (
                    t.median for t in time_models([baseline, file], inputs, program.target, seconds=self.seconds)
                )
                in_plan = layer_seconds(file, candidates.layers, inputs, program.target)
            slower = _slower(plan, in_dense, in_plan)
            plan = _forecast(plan, candidates, bias)
            predicted = plan.predicted.seconds / plan.dense.seconds * dense
            tried.append((Round(predicted, compiled, dense, tuple(slower)), plan))
            tick(number, self.rounds, f"{compiled / dense:.3f} of dense measured, {share:g} wanted")
            fits = compiled <= share * dense * (1 + self.over)
            if fits and not slower and abs(predicted / compiled - 1) <= self.tolerance:
                break
            back |= slower
            candidates = _corrected(_without(candidates, plan, slower), in_dense, plan, in_plan)
            parts = _forecast(_measured(plan, in_plan), candidates, 1.0)
            # On a machine that is busy with something else the parts' times may say anything, even less than nothing.
            forecast = max(parts.predicted.seconds / parts.dense.seconds, _FARTHEST * compiled / dense)
            bias = max(compiled / dense / forecast, _FARTHEST)
            try:
                plan = self._again(program, candidates, plan, min(1.0, aim / bias))
            except BudgetError:
                break
        limit = share * (1 + self.over)
        best, plan = min(tried, key=lambda one: (one[0].measured > limit * one[0].dense, _error(one[1])))
        # Factors do not change what was measured: from here on it is the prediction.
        seconds = best.measured / best.dense * plan.dense.seconds
        plan = replace(plan, predicted=replace(plan.predicted, seconds=seconds))
        reasons = {**plan.reasons, **{n: r for n, r in back.items() if plan.choices[n].decomposition == DENSE}}
        return replace(plan, reasons=reasons), Rehearsal(tuple(entry for entry, _ in tried))

    def _again(self, program: Program, candidates: Candidates, plan: RankPlan, latency: float) -> RankPlan:
        budget = replace(program.budget, latency=latency)
        selector = make(RankSelector, plan.selector)
        again = selector.select(candidates, program.facts[Importances].scores, budget)
        return replace(again, reasons={**again.reasons, **{r.layer: r for r in candidates.refusals}})


def _error(plan: RankPlan) -> float:
    return sum(choice.error**2 for choice in plan.choices.values())


def _write(program: Program, plan: RankPlan, dense: Path, file: Path) -> None:
    """The plan's graph as ONNX: the dense model with its layers exchanged where that can be done, else an export."""
    grafts = {}
    for name, site in sites(program).items():
        choice = plan.choices[name]
        if choice.decomposition != DENSE:
            form = make(Decomposition, choice.decomposition)
            plain = type(form).build is Decomposition.build  # otherwise there is more to it than the blueprint's layers
            chain = form.blueprint(site.layer, choice.ranks) if plain else ()
            grafts[name] = Graft(site.layer, len(site.calls), chain)
    if not all(graft.chain for graft in grafts.values()) or not transplant(dense, grafts, file):
        export_folded(program, _shapes_of(program, plan), file, simplify=False)


def _shapes_of(program: Program, plan: RankPlan) -> fx.GraphModule:
    """The graph of a plan with random factors of the right shapes."""
    graph, generator = copy_graph(program.graph), torch.Generator().manual_seed(0)
    for name, site in sites(program).items():
        choice = plan.choices[name]
        if choice.decomposition == DENSE:
            continue
        form = make(Decomposition, choice.decomposition)
        shapes = [part.weight_shape for part in form.blueprint(site.layer, choice.ranks)]
        factors = [torch.randn(shape, generator=generator, dtype=site.weight.dtype) for shape in shapes]
        bias = torch.zeros(site.layer.out_channels, dtype=site.weight.dtype) if site.layer.bias else None
        replace_module(graph, name, form.build(site.layer, choice.ranks, factors, bias))
    graph.recompile()
    return graph


def _slower(plan: RankPlan, dense: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, Refusal]:
    """The replaced layers that were not faster inside the graph."""
    return {
        name: Refusal(
            name,
            "slower_in_graph",
            f"{choice.decomposition}{list(choice.ranks)} took {measured[name] * 1e3:.3f} ms inside the graph, "
            f"the dense layer {dense[name] * 1e3:.3f} ms",
        )
        for name, choice in plan.choices.items()
        if choice.decomposition != DENSE and 0.0 < dense[name] <= measured[name]
    }


def _measured(plan: RankPlan, seconds: Mapping[str, float]) -> RankPlan:
    """The plan with what its layers took; it counts for those that are no longer in the table."""
    return replace(plan, choices={n: _lasting(c, seconds[n] or c.cost.seconds) for n, c in plan.choices.items()})


def _without(candidates: Candidates, plan: RankPlan, slower: Mapping[str, Refusal]) -> Candidates:
    """The table without the forms that were slower, at their ranks and every dearer one."""
    layers = dict(candidates.layers)
    for name in slower:
        worst = plan.choices[name]
        layers[name] = tuple(
            option
            for option in layers[name]
            if option.decomposition != worst.decomposition or option.cost.seconds < worst.cost.seconds
        )
    return replace(candidates, layers=layers)


def _corrected(
    candidates: Candidates,
    dense: Mapping[str, float],
    plan: RankPlan | None = None,
    measured: Mapping[str, float] | None = None,
) -> Candidates:
    """The table with prices in step with what was measured inside the graph.

    Without a plan all prices of a layer are scaled to its dense time; with one, those of the form that was measured
    to that measurement. The rest of the network absorbs what the layers' total loses or gains.
    """
    whole = candidates.dense.seconds
    layers: dict[str, tuple[Candidate, ...]] = {}
    for name, options in candidates.layers.items():
        known = options[0].cost.seconds
        chosen = plan.choices[name] if plan else options[0]
        after = (measured or dense)[name]
        current = next((o for o in options if _same(o, chosen)), chosen).cost.seconds
        if not (dense[name] > 0.0 and known > 0.0 and after > 0.0 and current > 0.0):
            layers[name] = options
            continue
        scale = after / current
        affected = {chosen.decomposition} if plan else {option.decomposition for option in options}
        layers[name] = tuple(_scaled(o, scale if o.decomposition in affected else 1.0) for o in options)
    moved = replace(candidates, layers=layers)
    return replace(moved, rest=replace(moved.rest, seconds=moved.rest.seconds + whole - moved.dense.seconds))


def _same(one: Candidate, other: Candidate) -> bool:
    return (one.decomposition, one.ranks) == (other.decomposition, other.ranks)


def _scaled(candidate: Candidate, factor: float) -> Candidate:
    return _lasting(candidate, candidate.cost.seconds * factor)


def _lasting(candidate: Candidate, seconds: float) -> Candidate:
    return replace(candidate, cost=replace(candidate.cost, seconds=seconds))


def _forecast(plan: RankPlan, candidates: Candidates, bias: float) -> RankPlan:
    """The plan with costs from the corrected table; ``bias`` is what the last round's whole showed beyond its parts."""
    table = {
        name: next((o for o in candidates.layers[name] if _same(o, choice)), choice)
        for name, choice in plan.choices.items()
    }
    predicted, dense = candidates.cost(table), candidates.dense
    return replace(plan, choices=table, predicted=replace(predicted, seconds=predicted.seconds * bias), dense=dense)
