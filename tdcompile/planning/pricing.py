"""``Prices``: the costs of layers, chains and networks without a table of candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from tdcompile.core.cost_model import CostModel
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.plan import within
from tdcompile.core.registry import only
from tdcompile.errors import BudgetError
from tdcompile.ir.layer import Layer, Ranks
from tdcompile.ir.program import Program, Site, parameters_of, sites_of
from tdcompile.ir.target import LIMITED, Cost, Target, total
from tdcompile.planning.allocation import out_of_reach


def price(layer: Layer, target: Target, counter: CostModel, timer: CostModel | None) -> Cost:
    """Return the cost of a layer by one model, with the seconds of the other if there is one."""
    counted = counter.price(layer, target)
    return counted if timer is None else replace(counted, seconds=timer.price(layer, target).seconds)


def over_calls(cost: Cost, calls: int) -> Cost:
    """Return the summed cost of all calls of a layer with its parameters counted once."""
    return replace(cost, params=cost.params / calls)


class Prices:
    """Costs by the default counter, and under a latency budget the seconds of the default timer.

    Args:
        program: its dense network is priced, for its target and budget.

    Attributes:
        sites: the layers of the dense network, by name.
        layers: the cost of each of them, over all its calls.
        dense: the cost of the dense network in the target's precision.
    """

    def __init__(self, program: Program) -> None:
        self._target = program.target
        self._counter = only(CostModel, "default_counter")()
        self._timer = only(CostModel, "default_timer")() if program.budget.latency is not None else None
        self.sites: Mapping[str, Site] = sites_of(program.dense, program.inputs)
        self.layers = {name: over_calls(self.of(site.calls), len(site.calls)) for name, site in self.sites.items()}
        known = total(list(self.layers.values()))
        self.dense = replace(known, params=float(parameters_of(program.dense)))
        self._rest = self.dense - known
        self._budget = program.budget

    @cached_property
    def limits(self) -> dict[str, float]:
        """The upper limit of a plan's cost, by field.

        Raises:
            InputError: the budget limits nothing.
        """
        return self._budget.limits(self.whole)

    @cached_property
    def whole(self) -> Cost:
        """The cost of the dense network in fp32: budgets are shares of it."""
        if self._timer is None or self._target.precision == "fp32":
            return self.dense
        target = replace(self._target, precision="fp32")
        calls = [call for site in self.sites.values() for call in site.calls]
        seconds = sum(self._timer.price(call, target).seconds for call in calls)
        return replace(self.dense, seconds=self._rest.seconds + seconds)

    def of(self, chain: Sequence[Layer]) -> Cost:
        """Return the cost of a chain of layers."""
        return total([price(part, self._target, self._counter, self._timer) for part in chain])

    def at(self, name: str, form: Decomposition, ranks: Ranks) -> Cost:
        """Return the cost of a decomposed layer over all its calls."""
        calls = self.sites[name].calls
        return over_calls(self.of([part for call in calls for part in form.blueprint(call, ranks)]), len(calls))

    def network(self, changed: Mapping[str, Cost]) -> Cost:
        """Return the cost of the network with other costs for some layers."""
        return self._rest + total([changed.get(name, cost) for name, cost in self.layers.items()])

    def check(self, least: Cost, who: str) -> None:
        """Check before a search that the least cost is within the budget.

        Args:
            least: the cost of the network at the smallest ranks.
            who: names these ranks in the message.

        Raises:
            BudgetError: it is not; the message states the shares that are reachable.
        """
        if within(least, self.limits):
            return
        fields = {name: LIMITED[name] for name in self._budget.shares}
        lowest = {name: getattr(least, field) / getattr(self.whole, field) for name, field in fields.items()}
        raise BudgetError(f"{who}: {out_of_reach(lowest, self._budget)}; raise the budget")
