"""``Prices``: what layers, chains and networks cost under a program's budget, where there is no table of candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from tdcompile.core.cost_model import CostModel
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.plan import within
from tdcompile.core.registry import make
from tdcompile.errors import BudgetError
from tdcompile.ir.layer import Layer, Ranks
from tdcompile.ir.program import Program, Site, parameters_of, sites_of
from tdcompile.ir.target import LIMITED, Cost, Target, total
from tdcompile.planning.allocation import out_of_reach


def price(layer: Layer, target: Target, counter: CostModel, timer: CostModel | None) -> Cost:
    """What one model counts; the seconds are those of the other, where there is one."""
    counted = counter.price(layer, target)
    return counted if timer is None else replace(counted, seconds=timer.price(layer, target).seconds)


class Prices:
    """Costs by the analytic model, and by measurement under a latency budget.

    Attributes:
        dense: what the dense network costs.
    """

    def __init__(self, program: Program) -> None:
        self._target = program.target
        self._counter = make(CostModel, "analytic")
        self._timer = make(CostModel, "measured") if program.budget.latency is not None else None
        self.sites: Mapping[str, Site] = sites_of(program.dense, program.inputs)
        self.layers = {name: self._once(name, self.of(site.calls)) for name, site in self.sites.items()}
        known = total(list(self.layers.values()))
        self.dense = replace(known, params=float(parameters_of(program.dense)))
        self._rest = self.dense - known
        self._budget = program.budget

    @cached_property
    def limits(self) -> dict[str, float]:
        """The most that a plan may cost, by field.

        Raises:
            InputError: the budget limits nothing.
        """
        return self._budget.limits(self.dense)

    def of(self, chain: Sequence[Layer]) -> Cost:
        """Of layers in a row."""
        return total([price(part, self._target, self._counter, self._timer) for part in chain])

    def at(self, name: str, form: Decomposition, ranks: Ranks) -> Cost:
        """Of a layer in a form, over all its calls; its parameters are there once."""
        calls = self.sites[name].calls
        return self._once(name, self.of([part for call in calls for part in form.blueprint(call, ranks)]))

    def network(self, changed: Mapping[str, Cost]) -> Cost:
        """Of the network with some layers at other costs."""
        return self._rest + total([changed.get(name, cost) for name, cost in self.layers.items()])

    def check(self, least: Cost, who: str) -> None:
        """See whether the least that there is keeps to the budget, before anything is searched for.

        Args:
            least: what the network costs at the smallest ranks.
            who: whose ranks they are, for the message.

        Raises:
            BudgetError: it does not; the message says what can be reached.
        """
        if within(least, self.limits):
            return
        fields = {name: LIMITED[name] for name in self._budget.shares}
        lowest = {name: getattr(least, field) / getattr(self.dense, field) for name, field in fields.items()}
        raise BudgetError(f"{who}: {out_of_reach(lowest, self._budget)}; raise the budget")

    def _once(self, name: str, cost: Cost) -> Cost:
        return replace(cost, params=cost.params / len(self.sites[name].calls))
