"""``rehearse``: run a plan's graph, with random factors, against the dense one before any factor is computed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import ClassVar

import numpy as np
import torch
from torch import fx

from tdcompile.backend.graft import Graft, graft_layers
from tdcompile.backend.lowering import export_lowered, timing_inputs
from tdcompile.backend.profile import layer_seconds
from tdcompile.backend.session import time_models
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.passes import AnalysisPass
from tdcompile.core.plan import Candidate, Candidates, Importances, RankPlan, dense_of
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.registry import make
from tdcompile.errors import BudgetError, InputError
from tdcompile.ir.diagnostics import Reason, ReasonCode
from tdcompile.ir.facts import Fact
from tdcompile.ir.graph_edits import copy_graph, replace_module
from tdcompile.ir.measurements import Baseline, Rehearsal, Round
from tdcompile.ir.program import Program, sites
from tdcompile.planning.plan_file import HAND
from tdcompile.support.progress import report_progress

_FARTHEST = 2.0  # no form's price is corrected by more than this factor, or its inverse
_CONFIRMED = 3  # plans that are measured a second time where none has stood
_Pair = tuple[str, Decomposition]  # a layer, and what it becomes
_PROFILE_SECONDS = 0.3  # about how long a profile runs the dense network


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
    rounds: int = 8
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
        runs = _profile_runs(plan.dense.seconds)
        in_dense = layer_seconds(baseline, candidates.layers, inputs, program.target, runs)
        candidates = _in_step(candidates, in_dense)
        with contextlib.suppress(BudgetError):  # the first prices found a plan: it is tried before it is given up
            plan = self._again(program, candidates, plan, aim)
        if all(choice.is_dense for choice in plan.choices.values()):
            return plan, Rehearsal(())  # the dense network is as fast as it is; a measurement would only say noise
        back: dict[str, Reason] = {}
        tried: list[tuple[Round, RankPlan]] = []
        seen: dict[_Pair, list[float]] = {}
        best: tuple[Round, RankPlan] | None = None
        for number in range(1, self.rounds + 1):
            with _written(program, plan, baseline) as file:
                dense, compiled = self._timed(program, baseline, file)
                in_plan = layer_seconds(file, candidates.layers, inputs, program.target, runs)
            slower = _slower(plan, in_dense, in_plan)
            plan = _priced(plan, _learned(candidates, seen))
            predicted = plan.predicted.seconds / plan.dense.seconds * dense
            tried.append((Round(predicted, compiled, dense, tuple(slower)), plan))
            report_progress(number, self.rounds, f"{compiled / dense:.3f} of dense measured, {share:g} wanted")
            fits = compiled <= share * dense * (1 + self.over)
            if fits and not slower and abs(predicted / compiled - 1) <= self.tolerance:
                best = tried[-1]
                break
            back |= slower
            for pair, ratio in _ratios(plan, candidates, in_plan, compiled / dense).items():
                seen.setdefault(pair, []).append(ratio)
            candidates = _without(candidates, plan, slower)
            try:
                plan = self._again(program, _learned(candidates, seen), plan, aim)
            except BudgetError:
                break
        entry, plan = best or self._confirmed(program, tried, baseline, share * (1 + self.over))
        # Factors do not change what was measured: from here on it is the prediction.
        seconds = entry.measured / entry.dense * plan.dense.seconds
        plan = replace(plan, predicted=replace(plan.predicted, seconds=seconds))
        reasons = {**plan.reasons, **{n: r for n, r in back.items() if plan.choices[n].is_dense}}
        return replace(plan, reasons=reasons), Rehearsal(tuple(one for one, _ in tried))

    def _confirmed(
        self, program: Program, tried: Sequence[tuple[Round, RankPlan]], baseline: Path, limit: float
    ) -> tuple[Round, RankPlan]:
        """Of the plans tried that of least error within the limit, measured again; the fastest where none is within.

        Of several noisy measurements the one that fits is likelier than not too good: the second one is fair.
        """

        def rank(one: tuple[Round, RankPlan]) -> tuple[float, float]:
            return max(one[0].measured / one[0].dense, limit), _error(one[1])

        again: list[tuple[Round, RankPlan]] = []
        for entry, plan in sorted(tried, key=rank)[:_CONFIRMED]:
            with _written(program, plan, baseline) as file:
                dense, compiled = self._timed(program, baseline, file)
            again.append((replace(entry, dense=dense, measured=compiled), plan))
            if compiled <= limit * dense:
                break
        return min(again, key=rank)

    def _timed(self, program: Program, baseline: Path, file: Path) -> tuple[float, float]:
        """Median seconds of the dense model and of another, in turn."""
        dense, other = time_models([baseline, file], timing_inputs(program), program.target, seconds=self.seconds)
        return dense.median, other.median

    def _again(self, program: Program, candidates: Candidates, plan: RankPlan, latency: float) -> RankPlan:
        budget = replace(program.budget, latency=latency)
        if plan.selector in ("", HAND):
            raise InputError("'rehearse' chooses again, and this plan was given, not chosen: leave 'rehearse' out")
        selector = make(RankSelector, plan.selector)
        again = selector.select(candidates, program.facts[Importances].scores, budget)
        return replace(again, reasons={**again.reasons, **candidates.reasons})


def _error(plan: RankPlan) -> float:
    return sum(choice.error**2 for choice in plan.choices.values())


@contextlib.contextmanager
def _written(program: Program, plan: RankPlan, dense: Path) -> Iterator[Path]:
    """The plan's graph as an ONNX file, as long as it lasts."""
    with tempfile.TemporaryDirectory(prefix="tdcompile-") as folder:
        file = Path(folder) / "rehearsal.onnx"
        _write(program, plan, dense, file)
        yield file


def _write(program: Program, plan: RankPlan, dense: Path, file: Path) -> None:
    """The plan's graph as ONNX: the dense model with its layers exchanged where that can be done, else an export."""
    grafts = {}
    for name, site in sites(program).items():
        choice = plan.choices[name]
        if not choice.is_dense:
            form = choice.decomposition
            plain = type(form).build is Decomposition.build  # otherwise there is more to it than the blueprint's layers
            chain = form.blueprint(site.layer, choice.ranks) if plain else ()
            grafts[name] = Graft(site.layer, len(site.calls), chain)
    if not all(graft.chain for graft in grafts.values()) or not graft_layers(dense, grafts, file):
        export_lowered(program, _shapes_of(program, plan), file, simplify=False)


def _shapes_of(program: Program, plan: RankPlan) -> fx.GraphModule:
    """The graph of a plan with random factors of the right shapes."""
    graph, generator = copy_graph(program.graph), torch.Generator().manual_seed(0)
    for name, site in sites(program).items():
        choice = plan.choices[name]
        if choice.is_dense:
            continue
        form = choice.decomposition
        shapes = [part.weight_shape for part in form.blueprint(site.layer, choice.ranks)]
        factors = [torch.randn(shape, generator=generator, dtype=site.weight.dtype) for shape in shapes]
        bias = torch.zeros(site.layer.out_channels, dtype=site.weight.dtype) if site.layer.bias else None
        replace_module(graph, name, form.build(site.layer, choice.ranks, factors, bias))
    graph.recompile()
    return graph


def _slower(plan: RankPlan, dense: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, Reason]:
    """The replaced layers that were not faster inside the graph."""
    return {
        name: Reason(
            ReasonCode.SLOWER_IN_GRAPH,
            f"{choice.form}{list(choice.ranks)} took {measured[name] * 1e3:.3f} ms inside the graph, "
            f"the dense layer {dense[name] * 1e3:.3f} ms",
        )
        for name, choice in plan.choices.items()
        if not choice.is_dense and 0.0 < dense[name] <= measured[name]
    }


def _without(candidates: Candidates, plan: RankPlan, slower: Mapping[str, Reason]) -> Candidates:
    """The table without the forms that were slower, at their ranks and every dearer one."""
    layers = dict(candidates.layers)
    for name in slower:
        form = plan.choices[name].decomposition
        worst = _listed(layers[name], plan.choices[name]).cost.seconds
        layers[name] = tuple(o for o in layers[name] if o.decomposition != form or o.cost.seconds < worst)
    return replace(candidates, layers=layers)


def _in_step(candidates: Candidates, dense: Mapping[str, float]) -> Candidates:
    """The table with all prices of a layer scaled to its dense time in the graph; the rest absorbs the difference."""
    layers = {}
    for name, options in candidates.layers.items():
        known = dense_of(options).cost.seconds
        scale = dense[name] / known if dense[name] > 0.0 and known > 0.0 else 1.0
        layers[name] = tuple(_scaled(option, scale) for option in options)
    moved = replace(candidates, layers=layers)
    whole = candidates.dense.seconds
    return replace(moved, rest=replace(moved.rest, seconds=moved.rest.seconds + whole - moved.dense.seconds))


def _ratios(plan: RankPlan, candidates: Candidates, measured: Mapping[str, float], share: float) -> dict[_Pair, float]:
    """By layer and form: seconds in the graph over those in the table.

    A profile tells how the replaced layers share the time; how much it is together, the run of the whole graph tells
    better, in which whatever else the plan has made slower or faster is theirs.

    Args:
        plan: what was measured.
        candidates: the table.
        measured: seconds of each layer in the profile.
        share: seconds of the whole graph over the dense one's.
    """
    kept = candidates.rest.seconds
    table, profile = {}, {}
    for name, choice in plan.choices.items():
        price = _listed(candidates.layers[name], choice).cost.seconds
        if choice.is_dense or measured[name] <= 0.0 or price <= 0.0:
            kept += price
        else:
            table[name], profile[name] = price, measured[name]
    left = share * candidates.dense.seconds - kept
    scale = max(left, 0.0) / sum(profile.values()) if profile else 1.0
    return {(name, plan.choices[name].decomposition): _bounded(scale * profile[name] / table[name]) for name in table}


def _learned(candidates: Candidates, seen: Mapping[_Pair, Sequence[float]]) -> Candidates:
    """The table with each form priced by what was seen of it: in its layer, else in other layers, else of any form.

    A plan is made of the forms whose prices are most too low. Were only those corrected that have been run, the next
    plan would be made of the next ones; so what has not been run is taken for one of the dearer ones.
    """
    forms: dict[Decomposition, list[float]] = {}
    for (_, form), ratios in seen.items():
        forms.setdefault(form, []).append(fmean(ratios))
    usual = {form: _upper(ratios) for form, ratios in forms.items()}
    any_form = _upper([fmean(ratios) for ratios in seen.values()]) if seen else 1.0

    def factor(name: str, option: Candidate) -> float:
        if option.is_dense:
            return 1.0
        form = option.decomposition
        return fmean(seen[name, form]) if (name, form) in seen else usual.get(form, any_form)

    layers = {
        name: tuple(_scaled(option, factor(name, option)) for option in options)
        for name, options in candidates.layers.items()
    }
    return replace(candidates, layers=layers)


def _upper(ratios: Sequence[float]) -> float:
    """The upper quartile."""
    return float(np.quantile(ratios, 0.75))


def _profile_runs(seconds: float) -> int:
    """How often a profile runs a network that takes so long: a small one's kernels need more runs to be told apart."""
    return round(min(max(_PROFILE_SECONDS / max(seconds, 1e-6), 7), 100))


def _bounded(ratio: float) -> float:
    return min(max(ratio, 1 / _FARTHEST), _FARTHEST)


def _listed(options: Sequence[Candidate], choice: Candidate) -> Candidate:
    """The table's entry of a choice; the choice itself where it is no longer in the table."""
    return next((o for o in options if (o.decomposition, o.ranks) == (choice.decomposition, choice.ranks)), choice)


def _scaled(candidate: Candidate, factor: float) -> Candidate:
    return replace(candidate, cost=replace(candidate.cost, seconds=candidate.cost.seconds * factor))


def _priced(plan: RankPlan, candidates: Candidates) -> RankPlan:
    """The plan with its costs from the table."""
    choices = {name: _listed(candidates.layers[name], choice) for name, choice in plan.choices.items()}
    return replace(plan, choices=choices, predicted=candidates.cost(choices), dense=candidates.dense)
