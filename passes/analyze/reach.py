"""``reach``: refuse a budget that no plan meets, before data is read or a candidate's error is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

from tdcompile.backend.lowering import timing_inputs
from tdcompile.backend.profile import layer_seconds
from tdcompile.backend.session import time_models
from tdcompile.core.cost_model import CostModel
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.passes import AnalysisPass
from tdcompile.core.plan import Candidate, Candidates, dense_of
from tdcompile.core.registry import find, make, registered
from tdcompile.errors import BudgetError
from tdcompile.ir.facts import Fact
from tdcompile.ir.measurements import Baseline, Reachable
from tdcompile.ir.program import Program, Site, kept_dense, parameters_of, sites
from tdcompile.ir.target import LATENCY_TOLERANCE, Precision, total
from tdcompile.passes.analyze._layer_prices import Spaces, chain_of, cost_of, grain_of, prices_of, spaces_of
from tdcompile.passes.analyze._plan_graph import written
from tdcompile.planning.allocation import lowest_shares, out_of_reach, rounded_up, slower_in
from tdcompile.support.options import Count, NonNegative
from tdcompile.support.progress import report_progress

# Prices differ from times in the graph by up to a factor of 2 (``rehearse``). A plan whose price is at most this share
# of the budget is not measured.
_SAFE = 0.5
_UNKNOWN = 1.0  # the error of a candidate, which plays no part here


@dataclass(frozen=True)
class Reach(AnalysisPass):
    """Find the cheapest plan, whatever its errors, and refuse a budget below it.

    Parameters and multiply-accumulates are counted. Under a latency budget each layer gets its fastest form at the
    smallest ranks by the layers' prices. If that is not clearly within the budget, and int8 alone does not meet it, the
    plan is measured in the whole graph, the prices are corrected, and the fastest plan is measured again.

    Attributes:
        decompose: text forms of the decompositions to consider; all if empty.
        grain: see ``propose``.
        cost: cost model for parameters and multiply-accumulates.
        timer: cost model for seconds; used under a latency budget only.
        rounds: maximum number of plans to measure.
        seconds: duration of the measurement of a plan.
    """

    name: ClassVar[str] = "reach"
    takes: ClassVar[Mapping[str, str]] = {"decompose": "decompose", "grain": "grain"}
    gives: ClassVar[tuple[type[Fact], ...]] = (Reachable,)
    decompose: tuple[Annotated[str, registered(Decomposition)], ...] = ()
    grain: Count | None = None
    cost: Annotated[str, registered(CostModel)] = "analytic"
    timer: Annotated[str, registered(CostModel)] = "measured"
    rounds: Count = 3
    seconds: NonNegative = 1.0

    def analyze(self, program: Program) -> Reachable:
        """Return what was measured.

        Raises:
            BudgetError: the budget is out of reach; the message says what can be reached.
        """
        found, forms = sites(program), [make(Decomposition, text) for text in self.decompose or find(Decomposition)]
        kept, grain = kept_dense(program, found), grain_of(program, self.grain)
        precision = program.target.precision
        spaces = {
            name: {} if name in kept else spaces_of(site, forms, grain, precision) for name, site in found.items()
        }
        self._check_counts(program, found, spaces)
        if program.budget.latency is None:
            return Reachable()
        first = {name: {form: space[:1] for form, space in forms.items()} for name, forms in spaces.items()}
        return self._check_latency(program, program.budget.latency, self._candidates(program, found, first))

    def _candidates(self, program: Program, found: Mapping[str, Site], spaces: Mapping[str, Spaces]) -> Candidates:
        precision = program.target.precision
        prices = prices_of(program, found, spaces, (self.cost, self.timer), precision)
        layers = {
            name: (
                Candidate.dense(cost_of(site.calls, prices[name], site)),
                *(
                    Candidate(form, ranks, _UNKNOWN, cost_of(chain_of(site, form, ranks), prices[name], site))
                    for form, space in spaces[name].items()
                    for ranks in space
                ),
            )
            for name, site in found.items()
        }
        known, baseline = total([dense_of(options).cost for options in layers.values()]), program.facts.get(Baseline)
        whole = replace(known, params=float(parameters_of(program.graph)))
        if baseline is None:
            return Candidates(layers, rest=whole - known)
        own = replace(whole, seconds=baseline.at(precision)[1])
        reference = replace(whole, seconds=baseline.seconds)
        return Candidates(layers, rest=own - known, precision=precision, reference=reference)

    def _check_counts(self, program: Program, found: Mapping[str, Site], spaces: Mapping[str, Spaces]) -> None:
        """Check the parameters and multiply-accumulates of the cheapest candidates.

        Raises:
            BudgetError: a budget is below them.
        """
        budget = replace(program.budget, latency=None)
        if not budget.shares:
            return
        program = program.with_(budget=budget)
        first = {name: {form: space[:1] for form, space in forms.items()} for name, forms in spaces.items()}
        if out_of_reach(lowest_shares(self._candidates(program, found, first), budget), budget) is None:
            return
        told = out_of_reach(lowest_shares(self._candidates(program, found, spaces), budget), budget)
        if told is not None:
            raise BudgetError(f"{told}; raise the budget or allow more decompositions")

    def _check_latency(self, program: Program, share: float, candidates: Candidates) -> Reachable:
        """Check the price of the fastest plan, then its measured latency.

        Raises:
            BudgetError: the latency is more than the tolerance above the budget.
        """
        baseline = program.facts.get(Baseline)
        if share == 1.0 or baseline is None:  # without a dense model ``choose`` decides by prices
            return Reachable()
        names = list(candidates.layers)
        model, seconds = baseline.at(program.target.precision)
        in_dense = layer_seconds(model, names, timing_inputs(program), program.target)
        table = {name: _in_step(options, in_dense[name]) for name, options in candidates.layers.items()}
        if _priced(candidates, table, seconds) * seconds <= _SAFE * share * baseline.seconds:
            return Reachable()
        limit = share * (1 + LATENCY_TOLERANCE)
        own = lowest = seconds / baseline.seconds  # the dense network in the plans' precision
        if lowest <= limit and lowest < 1.0:
            return Reachable(lowest)
        for measured in self._measured(program, baseline.model, candidates, table):
            lowest = min(lowest, measured)
            if lowest <= limit:
                return Reachable(lowest)
        raise BudgetError(_told(share, lowest, candidates.precision if own > 1.0 else None))

    def _measured(
        self, program: Program, baseline: Path, candidates: Candidates, table: dict[str, list[float]]
    ) -> Iterator[float]:
        """Yield measured shares of the dense latency: of the fastest plan by price, then by corrected prices.

        Args:
            program: the dense network.
            baseline: its ONNX model.
            candidates: the candidates of each layer.
            table: their seconds, which are corrected in place.
        """
        inputs, layers = timing_inputs(program), candidates.layers
        seen: list[dict[str, int]] = []
        for number in range(1, self.rounds + 1):
            places = {name: times.index(min(times)) for name, times in table.items()}
            choices = {name: layers[name][place] for name, place in places.items()}
            if places in seen or (candidates.precision == "fp32" and all(c.is_dense for c in choices.values())):
                return
            seen.append(places)
            with written(program, choices, baseline, program.target.precision) as file:
                _, timing = time_models([baseline, file], inputs, program.target, seconds=self.seconds)
                in_plan = layer_seconds(file, layers, inputs, program.target)
            report_progress(number, self.rounds, f"{1 / timing.speedup.value:.3f} of dense measured")
            yield 1 / timing.speedup.value
            for name, place in places.items():
                if not choices[name].is_dense and in_plan[name] > 0.0:
                    table[name][place] = in_plan[name]


def _priced(candidates: Candidates, table: Mapping[str, Sequence[float]], whole: float) -> float:
    """Return the share of the dense latency that the fastest candidates keep by price.

    Args:
        candidates: the candidates of each layer.
        table: their seconds inside the graph.
        whole: seconds of the dense network.
    """
    places = {name: options.index(dense_of(options)) for name, options in candidates.layers.items()}
    dense = sum(table[name][place] for name, place in places.items())
    rest = max(whole - dense, 0.0)  # a profile of layers on a busy machine may exceed the whole
    return (rest + sum(map(min, table.values()))) / max(rest + dense, 1e-12)


def _in_step(options: Sequence[Candidate], dense: float) -> list[float]:
    """Return the prices of a layer's candidates in seconds, scaled to its dense time in the graph if that is known."""
    known = dense_of(options).cost.seconds
    scale = dense / known if dense > 0.0 and known > 0.0 else 1.0
    return [scale * option.cost.seconds for option in options]


def _told(share: float, lowest: float, slow: Precision | None) -> str:
    """Return why a latency is out of reach.

    Args:
        share: the budget.
        lowest: what is reached.
        slow: the precision of the plans, if it makes the dense network slower than fp32 does.
    """
    least = lowest / (1 + LATENCY_TOLERANCE)
    asked = f"no plan keeps latency within {share:g} of dense: the cheapest one keeps {rounded_up(lowest)}"
    if lowest >= 1.0 and slow is not None:
        return f"{asked}, because {slower_in(slow)}"
    if lowest >= 1.0:
        return f"{asked}, because no layer has a faster form; ask for fewer MACs or parameters, or allow more forms"
    margin = f"a latency may exceed its budget by {LATENCY_TOLERANCE * 100:g} %"
    return f"{asked}, and {margin}: ask for latency={rounded_up(least)} or more, or allow more decompositions"
