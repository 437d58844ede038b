"""``SingleRanks``: layers in forms of one rank number each: what they cost and lose, and their fit to a budget."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tdcompile.decomposition import Decomposition
from tdcompile.errors import BudgetError
from tdcompile.pricing import Prices
from tdcompile.program import Program
from tdcompile.ranks import Ranks, within
from tdcompile.target import Cost


class SingleRanks(Prices):
    """Costs and errors by layer and rank, each worked out once.

    Args:
        program: gives the layers and the budget.
        forms: the decomposition of each layer that may be replaced.
    """

    def __init__(self, program: Program, forms: Mapping[str, Decomposition]) -> None:
        super().__init__(program)
        self.forms, self._budget = forms, program.budget
        self._errors: dict[tuple[str, int], float] = {}

    def ranks(self, name: str, rank: int) -> Ranks:
        """The form's ranks for one number, each at most what the layer has."""
        return tuple(min(rank, most) for most in self.forms[name].exact_ranks(self.sites[name].layer))

    def most(self, name: str) -> int:
        """The largest rank to look at: the smaller of C and T, and for CP as far as it is cheaper than dense."""
        layer, form = self.sites[name].layer, self.forms[name]
        if form.name.startswith("cp"):
            each = sum(part.macs for part in form.blueprint(layer, (1,)))
            return max(1, min(layer.macs // max(each, 1), form.exact_ranks(layer)[0]))
        return min(layer.in_channels, layer.out_channels)

    def cost(self, name: str, rank: int) -> Cost:
        """Of a layer at a rank."""
        return self.at(name, self.forms[name], self.ranks(name, rank))

    def share(self, name: str, rank: int) -> float:
        """Cost over that of the dense layer, in the field that is worst off."""
        cost, dense = self.cost(name, rank), self.layers[name]
        return max(float(getattr(cost, f)) / max(float(getattr(dense, f)), 1e-30) for f in self.limits)

    def error(self, name: str, rank: int) -> float:
        """Relative, of the weight."""
        if (name, rank) not in self._errors:
            site = self.sites[name]
            found = self.forms[name].errors(site.layer, site.weight, [self.ranks(name, rank)], None)
            self._errors[name, rank] = float(found[0])
        return self._errors[name, rank]

    def load(self, shares: Mapping[str, Tensor], settled: Mapping[str, float]) -> Tensor:
        """What the network costs over the limit, the worst limit counting.

        Args:
            shares: of the dense layer's cost, of the layers that are searched.
            settled: the same of layers whose search is over; the rest is dense.
        """
        loads = []
        for f, limit in self.limits.items():
            each = {name: float(getattr(cost, f)) for name, cost in self.layers.items()}
            fixed = sum(cost * min(settled.get(name, 1.0), 1.0) for name, cost in each.items() if name not in shares)
            moving = torch.stack([share.clamp(max=1) * each[name] for name, share in shares.items()]).sum()
            loads.append((float(getattr(self.dense, f)) - sum(each.values()) + fixed + moving) / limit)
        return torch.stack(loads).max()

    def spent(self, ranks: Mapping[str, int]) -> Cost:
        """Of the network, with each layer at its rank where that is cheaper than dense."""
        return self.network({n: self.cost(n, rank) for n, rank in ranks.items() if self.share(n, rank) < 1})

    def fitted(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """The ranks made to fit the budget, a tenth at a time.

        Off the layer whose squared error grows least for what it saves, while the plan is over the budget; then on to
        the layer whose squared error falls most for what it costs, while it stays within.

        Raises:
            BudgetError: not even the smallest ranks meet the budget.
        """
        made = dict(ranks)
        while not within(self.spent(made), self.limits):
            steps = [
                (self._slope(name, less, rank), name, less)
                for name, rank in made.items()
                if (less := min(rank - 1, int(rank * 0.9))) >= 1 and self.share(name, less) < self.share(name, rank)
            ]
            if not steps:
                raise BudgetError(f"there is no plan within {self._budget} of one rank a layer: raise the budget")
            _, name, less = min(steps)
            made[name] = less
        growing = {name for name, rank in made.items() if rank < self.most(name)}
        while growing:
            name = max(growing, key=lambda name: (self._slope(name, made[name], _more(made[name])), name))
            more = {**made, name: min(_more(made[name]), self.most(name))}
            if within(self.spent(more), self.limits):
                made = more
            if made is not more or made[name] == self.most(name):
                growing.remove(name)
        return made

    def _slope(self, name: str, low: int, high: int) -> float:
        """Squared error between two ranks, for each part of the limits between them."""
        dense = self.layers[name]
        part = max(float(getattr(dense, f)) / limit for f, limit in self.limits.items())
        spent = (self.share(name, high) - self.share(name, low)) * part
        return (self.error(name, low) ** 2 - self.error(name, high) ** 2) / max(spent, 1e-30)


def _more(rank: int) -> int:
    return max(rank + 1, int(rank * 1.1))
