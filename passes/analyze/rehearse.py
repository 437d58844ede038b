"""``rehearse``: measure a plan's graph with random factors against the dense graph, before factors are computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import ClassVar

import numpy as np

from tdcompile.backend.lowering import timing_inputs
from tdcompile.backend.profile import confirmed_slower, layer_seconds
from tdcompile.backend.session import time_models
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.passes import AnalysisPass
from tdcompile.core.plan import Candidate, Candidates, Importances, RankPlan, dense_of
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.registry import make
from tdcompile.errors import BudgetError, InputError
from tdcompile.ir.diagnostics import Reason
from tdcompile.ir.facts import Fact
from tdcompile.ir.measurements import Baseline, Rehearsal, Round
from tdcompile.ir.program import Program
from tdcompile.ir.target import Budget, Precision
from tdcompile.passes.analyze._plan_graph import written
from tdcompile.planning.allocation import keeps_counts, lowest_shares
from tdcompile.planning.plan_file import HAND
from tdcompile.support.options import Count, NonNegative, Share
from tdcompile.support.progress import report_progress

_FARTHEST = 2.0  # largest correction of a price, as a factor or its inverse
_CONFIRMED = 3  # plans to measure a second time if no plan was accepted
_ROUNDING = 1e-6  # the sum of the cheapest candidates is within the budget that it defines
_CHECKS = 2  # of the layers of the accepted plan
_Pair = tuple[str, Decomposition]  # a layer's name and its form
_PROFILE_SECONDS = 0.3  # approximate duration of a profile of the dense network


@dataclass(frozen=True)
class _Bench:
    """Measures plans against the dense network.

    Attributes:
        program: the dense network.
        dense: its model in fp32: budgets are shares of its latency.
        own: its model in the precision of the plans: a layer of a plan is compared with the layer there.
        precision: number format of the plans.
        seconds: duration of a measurement.
    """

    program: Program
    dense: Path
    own: Path
    precision: Precision
    seconds: float

    @classmethod
    def of(cls, program: Program, precision: Precision, seconds: float) -> _Bench:
        baseline = program.facts[Baseline]
        return cls(program, baseline.model, baseline.at(precision)[0], precision, seconds)

    def written(self, choices: Mapping[str, Candidate]) -> contextlib.AbstractContextManager[Path]:
        """Write the graph of a plan to a file that exists within the context."""
        return written(self.program, choices, self.dense, self.precision)

    def timed(self, file: Path) -> tuple[float, float]:
        """Return the seconds of the dense model in fp32 and of a plan; their ratio is paired by rounds."""
        inputs, target = timing_inputs(self.program), self.program.target
        dense, other = time_models([self.dense, file], inputs, target, seconds=self.seconds)
        return dense.median, dense.median / other.speedup.value

    def profiles(self, file: Path, layers: Iterable[str], runs: int) -> tuple[dict[str, float], dict[str, float]]:
        """Return the seconds of each layer in the dense model of the plans' precision and in a plan."""
        names, inputs = list(layers), timing_inputs(self.program)
        dense, other = (layer_seconds(model, names, inputs, self.program.target, runs) for model in (self.own, file))
        return dense, other


@dataclass(frozen=True)
class Rehearse(AnalysisPass):
    """Measure the plan in the whole graph, put slower layers back to dense, and choose again.

    Latency does not depend on the values of weights, so random factors of the plan's shapes show its cost. The
    measurements correct the prices for the next choice. A layer counts as slower if two profiles agree.

    Attributes:
        rounds: maximum number of plans to measure.
        over: allowed relative excess of the measured latency over the budget.
        tolerance: allowed relative difference between predicted and measured latency.
        seconds: duration of the measurement in each round.
        aim: share of the budget to choose plans for. Measurements vary by about the rest; a plan that aims at the
            whole budget would exceed it half of the time.
    """

    name: ClassVar[str] = "rehearse"
    needs: ClassVar[tuple[type[Fact], ...]] = (Baseline, Candidates, Importances, RankPlan)
    gives: ClassVar[tuple[type[Fact], ...]] = (RankPlan, Rehearsal, Candidates)
    rounds: Count = 8
    over: NonNegative = 0.01
    tolerance: NonNegative = 0.02
    seconds: NonNegative = 1.5
    aim: Share = 0.995

    def analyze(self, program: Program) -> tuple[RankPlan, Rehearsal, Candidates]:
        """Return the accepted plan with its measured latency, the figures of each round, and the corrected prices."""
        share = program.budget.latency
        plan, candidates = program.facts[RankPlan], program.facts[Candidates]
        if share is None:
            return plan, Rehearsal(()), candidates
        aim = share if share == 1.0 else self.aim * share  # the dense network meets a share of 1
        inputs, bench = timing_inputs(program), _Bench.of(program, candidates.precision, self.seconds)
        runs = _profile_runs(plan.dense.seconds)
        in_dense = layer_seconds(bench.own, candidates.layers, inputs, program.target, runs)
        candidates = _in_step(candidates, in_dense)
        with contextlib.suppress(BudgetError):  # a plan exists at the first prices: try it anyway
            plan = self._again(program, candidates, plan, aim)
        if all(choice.is_dense for choice in plan.choices.values()):
            return plan, Rehearsal(()), candidates  # nothing to compare: a measurement would show noise only
        back: dict[str, Reason] = {}
        tried: list[tuple[Round, RankPlan]] = []
        seen: dict[_Pair, list[float]] = {}
        best: tuple[Round, RankPlan] | None = None
        for number in range(1, self.rounds + 1):
            with bench.written(plan.choices) as file:
                dense, compiled = bench.timed(file)
                in_plan = layer_seconds(file, candidates.layers, inputs, program.target, runs)
                profile = partial(bench.profiles, file, candidates.layers, runs)
                slower = confirmed_slower(plan, (in_dense, in_plan), profile)
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
            learned = _learned(candidates, seen)
            try:
                plan = self._again(program, learned, plan, aim)
            except BudgetError:
                break
            none = all(choice.is_dense for choice in plan.choices.values())
            if _lowest(learned, program.budget) > aim and (none or any(_same(plan, one) for _, one in tried)):
                break  # the fastest plan by price is dense or has been measured
        entry, plan = best or self._confirmed(bench, tried, share * (1 + self.over))
        for _ in range(_CHECKS):
            slower = _slower_now(bench, plan, runs)
            if not slower:
                break
            fewer = _put_back(plan, candidates, slower)
            if not keeps_counts(fewer, program.budget):
                break
            with bench.written(fewer.choices) as file:
                dense, compiled = bench.timed(file)
            if compiled / dense > entry.measured / entry.dense * (1 + self.over):
                break  # slower as a whole: the profile does not show what these layers save elsewhere
            plan, back = fewer, back | slower
            entry = Round(plan.predicted.seconds / plan.dense.seconds * dense, compiled, dense, tuple(slower))
            tried.append((entry, plan))
        # Factors do not change the latency: the measurement replaces the prediction.
        seconds = entry.measured / entry.dense * plan.dense.seconds
        plan = replace(plan, predicted=replace(plan.predicted, seconds=seconds))
        reasons = {**plan.reasons, **{n: r for n, r in back.items() if plan.choices[n].is_dense}}
        rounds = Rehearsal(tuple(one for one, _ in tried))
        return replace(plan, reasons=reasons), rounds, _learned(candidates, seen)

    def _confirmed(
        self, bench: _Bench, tried: Sequence[tuple[Round, RankPlan]], limit: float
    ) -> tuple[Round, RankPlan]:
        """Measure the best plans again; return the one of least error within the limit, or the fastest if none is.

        The one that fits among several noisy measurements is probably too good; a second measurement is fair.
        """

        def rank(one: tuple[Round, RankPlan]) -> tuple[float, float]:
            return max(one[0].measured / one[0].dense, limit), _error(one[1])

        again: list[tuple[Round, RankPlan]] = []
        for entry, plan in sorted(tried, key=rank)[:_CONFIRMED]:
            with bench.written(plan.choices) as file:
                dense, compiled = bench.timed(file)
            again.append((replace(entry, dense=dense, measured=compiled), plan))
            if compiled <= limit * dense:
                break
        return min(again, key=rank)

    def _again(self, program: Program, candidates: Candidates, plan: RankPlan, latency: float) -> RankPlan:
        # a latency that the prices deny: the fastest plan, which the next measurement judges
        lowest = _lowest(candidates, program.budget) * (1 + _ROUNDING)
        budget = replace(program.budget, latency=min(max(latency, lowest), 1.0))
        if plan.selector in ("", HAND):
            raise InputError("'rehearse' chooses again, and this plan was given, not chosen: leave 'rehearse' out")
        selector = make(RankSelector, plan.selector)
        again = selector.select(candidates, program.facts[Importances].scores, budget)
        return replace(again, reasons={**again.reasons, **candidates.reasons})


def _lowest(candidates: Candidates, budget: Budget) -> float:
    return lowest_shares(candidates, budget)["latency"]


def _error(plan: RankPlan) -> float:
    return sum(choice.error**2 for choice in plan.choices.values())


def _slower_now(bench: _Bench, plan: RankPlan, runs: int) -> dict[str, Reason]:
    """Profile the accepted plan again; return its layers that are not faster.

    One profile may miss such a layer, and the plans that were tried may hold layers that were put back later.
    """
    with bench.written(plan.choices) as file:
        profile = partial(bench.profiles, file, plan.choices, runs)
        return confirmed_slower(plan, profile(), profile)


def _same(plan: RankPlan, other: RankPlan) -> bool:
    """Return whether two plans have the same forms and ranks."""
    others = other.choices
    return all(
        (c.decomposition, c.ranks) == (others[n].decomposition, others[n].ranks) for n, c in plan.choices.items()
    )


def _put_back(plan: RankPlan, candidates: Candidates, slower: Mapping[str, Reason]) -> RankPlan:
    """Return the plan with slower layers dense."""
    choices = {n: dense_of(candidates.layers[n]) if n in slower else c for n, c in plan.choices.items()}
    return replace(plan, choices=choices, predicted=candidates.cost(choices), reasons={**plan.reasons, **slower})


def _without(candidates: Candidates, plan: RankPlan, slower: Mapping[str, Reason]) -> Candidates:
    """Return the candidates without the slower forms at their ranks and at more expensive ones."""
    layers = dict(candidates.layers)
    for name in slower:
        form = plan.choices[name].decomposition
        worst = _listed(layers[name], plan.choices[name]).cost.seconds
        layers[name] = tuple(o for o in layers[name] if o.decomposition != form or o.cost.seconds < worst)
    return replace(candidates, layers=layers)


def _in_step(candidates: Candidates, dense: Mapping[str, float]) -> Candidates:
    """Return the candidates scaled to each layer's dense time in the graph; the rest absorbs the difference."""
    layers = {}
    for name, options in candidates.layers.items():
        known = dense_of(options).cost.seconds
        scale = dense[name] / known if dense[name] > 0.0 and known > 0.0 else 1.0
        layers[name] = tuple(_scaled(option, scale) for option in options)
    moved = replace(candidates, layers=layers)
    whole = candidates.dense.seconds
    return replace(moved, rest=replace(moved.rest, seconds=moved.rest.seconds + whole - moved.dense.seconds))


def _ratios(plan: RankPlan, candidates: Candidates, measured: Mapping[str, float], share: float) -> dict[_Pair, float]:
    """Return the seconds in the graph divided by those of the candidate, by layer and form.

    The profile divides the time among the replaced layers. Their sum comes from the run of the whole graph, which is
    more accurate and includes side effects of the plan on other layers.

    Args:
        plan: the measured plan.
        candidates: the current prices.
        measured: seconds of each layer in the profile.
        share: seconds of the whole graph divided by those of the dense graph in fp32.
    """
    kept = candidates.rest.seconds
    table, profile = {}, {}
    for name, choice in plan.choices.items():
        price = _listed(candidates.layers[name], choice).cost.seconds
        if choice.is_dense or measured[name] <= 0.0 or price <= 0.0:
            kept += price
        else:
            table[name], profile[name] = price, measured[name]
    left = share * candidates.whole.seconds - kept
    scale = max(left, 0.0) / sum(profile.values()) if profile else 1.0
    return {(name, plan.choices[name].decomposition): _bounded(scale * profile[name] / table[name]) for name in table}


def _learned(candidates: Candidates, seen: Mapping[_Pair, Sequence[float]]) -> Candidates:
    """Return the candidates with corrected prices: from the same layer, else from other layers, else from any form.

    A plan consists of the forms whose prices are too low. If only measured forms were corrected, the next plan would
    consist of the next such forms. So a form without a measurement gets a high correction, the upper quartile.
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
    """Return the upper quartile."""
    return float(np.quantile(ratios, 0.75))


def _profile_runs(seconds: float) -> int:
    """Return the number of runs for a profile; short kernels need more runs for a stable figure."""
    return round(min(max(_PROFILE_SECONDS / max(seconds, 1e-6), 7), 100))


def _bounded(ratio: float) -> float:
    return min(max(ratio, 1 / _FARTHEST), _FARTHEST)


def _listed(options: Sequence[Candidate], choice: Candidate) -> Candidate:
    """Return the candidate of a choice; the choice itself if it is no longer a candidate."""
    return next((o for o in options if (o.decomposition, o.ranks) == (choice.decomposition, choice.ranks)), choice)


def _scaled(candidate: Candidate, factor: float) -> Candidate:
    return replace(candidate, cost=replace(candidate.cost, seconds=candidate.cost.seconds * factor))


def _priced(plan: RankPlan, candidates: Candidates) -> RankPlan:
    """Return the plan with the costs of the candidates."""
    choices = {name: _listed(candidates.layers[name], choice) for name, choice in plan.choices.items()}
    return replace(plan, choices=choices, predicted=candidates.cost(choices), dense=candidates.whole)
