"""``SingleRanks``: costs and errors of layers at tied ranks, one number for each layer, and their fit to a budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from heapq import heapify, heappop, heappush

import torch
from torch import Tensor

from tdcompile.core.decomposition import Decomposition
from tdcompile.core.plan import Candidate, RankPlan, within
from tdcompile.core.rank_space import tied
from tdcompile.ir.diagnostics import Reason, ReasonCode
from tdcompile.ir.layer import Ranks
from tdcompile.ir.program import Program
from tdcompile.ir.target import Cost
from tdcompile.numerics.covariance import Identity
from tdcompile.planning.pricing import Prices

WHOLE = 0  # stands for the dense layer among ranks: full cost, no error
_GAIN = 1e-6  # least reduction of the squared relative error that more rank must bring


class SingleRanks(Prices):
    """Costs and errors by layer and rank, computed once and cached.

    Args:
        program: provides the layers and the budget.
        forms: the decomposition of each layer that may be replaced, by the layer's name.
    """

    def __init__(self, program: Program, forms: Mapping[str, Decomposition]) -> None:
        super().__init__(program)
        self.forms = forms
        self._costs: dict[tuple[str, int], Cost] = {}
        self._errors: dict[tuple[str, int], float] = {}

    def ranks(self, name: str, rank: int) -> Ranks:
        """Return the tied ranks of a layer for one number."""
        return tied(self.forms[name].exact_ranks(self.sites[name].layer), rank)

    def most(self, name: str) -> int:
        """Return the largest rank to look at.

        A rank of an unfolding is at most C and T. One that truncates no unfolding, as in CP, goes up to break-even.
        """
        layer, form = self.sites[name].layer, self.forms[name]
        if not any(form.modes):
            each = sum(part.macs for part in form.blueprint(layer, (1,)))
            return max(1, min(layer.macs // max(each, 1), form.exact_ranks(layer)[0]))
        return min(layer.in_channels, layer.out_channels)

    def end(self, name: str) -> int:
        """Return the largest rank on the ladder that is cheaper than dense; ``WHOLE`` if none is."""
        return max(self._ladder(name, 1))

    def cost(self, name: str, rank: int) -> Cost:
        """Return the cost of a layer at a rank."""
        if rank == WHOLE:
            return self.layers[name]
        if (name, rank) not in self._costs:
            self._costs[name, rank] = self.at(name, self.forms[name], self.ranks(name, rank))
        return self._costs[name, rank]

    def share(self, name: str, rank: int) -> float:
        """Return the cost divided by that of the dense layer, in the limited field where it is largest."""
        cost, dense = self.cost(name, rank), self.layers[name]
        return max(float(getattr(cost, f)) / max(float(getattr(dense, f)), 1e-30) for f in self.limits)

    def error(self, name: str, rank: int) -> float:
        """Return the relative error of the weight."""
        if rank == WHOLE:
            return 0.0
        if (name, rank) not in self._errors:
            self._learn(name, [rank])
        return self._errors[name, rank]

    def load(self, shares: Mapping[str, Tensor], settled: Mapping[str, float]) -> Tensor:
        """Return the cost of the network divided by the limit, for the limit where it is largest.

        Args:
            shares: for each layer in the search, its share of the dense layer's cost, at most 1.
            settled: share of the dense cost for each layer whose search has ended. All other layers are dense.
        """
        loads = []
        for f, limit in self.limits.items():
            each = {name: float(getattr(cost, f)) for name, cost in self.layers.items()}
            fixed = sum(cost * settled.get(name, 1.0) for name, cost in each.items() if name not in shares)
            moving = torch.stack([share * each[name] for name, share in shares.items()]).sum()
            loads.append((float(getattr(self.dense, f)) - sum(each.values()) + fixed + moving) / limit)
        return torch.stack(loads).max()

    def part(self, name: str) -> float:
        """Return the dense layer's largest share of a limit."""
        return max(float(getattr(self.layers[name], f)) / limit for f, limit in self.limits.items())

    def spent(self, ranks: Mapping[str, int]) -> Cost:
        """Return the cost of the network with each layer at its rank, or dense if that is cheaper."""
        return self.network({n: self.cost(n, rank) for n, rank in ranks.items() if self.share(n, rank) < 1})

    def fitted(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """Return ranks that fit the budget.

        While the plan exceeds the budget, lower the rank whose squared error grows least for its saving. Then raise
        ranks while the budget allows, first the one whose squared error falls most for its cost. A step may skip many
        ranks, or go to ``WHOLE`` or back, because errors jump at break-even. A layer stays if more rank gains nothing.

        Raises:
            BudgetError: not even the smallest ranks meet the budget.
        """
        made = {name: rank if self.share(name, rank) < 1 else WHOLE for name, rank in ranks.items()}
        ladders = {name: self._ladder(name, rank) for name, rank in made.items()}
        for name, ladder in ladders.items():
            self._learn(name, [rank for rank in ladder if rank != WHOLE])
        spent = self._descend(made, ladders)
        rises = {name: self._rises(name, ladders[name], rank) for name, rank in made.items()}
        best = [(-rise[0][0], name) for name, rise in rises.items() if rise]
        heapify(best)
        while best:
            name = heappop(best)[1]
            more = rises[name].pop(0)[1]
            grown = spent - self.cost(name, made[name]) + self.cost(name, more)
            if within(grown, self.limits):
                made[name], spent = more, grown
                rises[name] = self._rises(name, ladders[name], more)
            if rises[name]:
                heappush(best, (-rises[name][0][0], name))
        return made

    def _descend(self, made: dict[str, int], ladders: Mapping[str, Sequence[int]]) -> Cost:
        """Lower the ranks in place until they are within the budget; return the cost of the network."""
        spent = self.spent(made)
        best = [(*fall, name) for name, rank in made.items() if (fall := self._fall(name, ladders[name], rank))]
        heapify(best)
        while not within(spent, self.limits):
            if not best:  # no step saves the limit that each layer uses most
                made |= self._least(made)
                spent = self.spent(made)
                self.check(spent, "one rank a layer")
                return spent
            _, less, name = heappop(best)
            spent = spent - self.cost(name, made[name]) + self.cost(name, less)
            made[name] = less
            if (fall := self._fall(name, ladders[name], less)) is not None:
                heappush(best, (*fall, name))
        return spent

    def reachable(self, names: Iterable[str]) -> None:
        """Check before a search that the smallest ranks of these layers meet the budget.

        Raises:
            BudgetError: they do not; the message states what is reachable.
        """
        self.check(self.spent(self._least(names)), "one rank a layer")

    def plan(self, ranks: Mapping[str, int], kept: Mapping[str, Reason], selector: str) -> RankPlan:
        """Return the plan of these ranks. A layer stays dense if it is kept, has no rank, or would not be cheaper.

        Args:
            ranks: the rank of each layer; ``WHOLE`` for one that stays dense.
            kept: why layers must stay dense.
            selector: text form of the pass that found the ranks.
        """
        choices, reasons = {}, dict(kept)
        for name in self.sites:
            choices[name] = Candidate.dense(self.layers[name])
            if name in reasons:
                continue
            if name not in self.forms:
                reasons[name] = Reason(ReasonCode.REFUSED, "neither the search's form nor svd applies to it")
            elif name not in ranks:
                alone = "the search's form has rank 1 alone here, so nothing to search for; dense loses nothing"
                reasons[name] = Reason(ReasonCode.DENSE_IS_BEST, alone)
            elif ranks[name] == WHOLE:
                reasons[name] = self._whole(name)
            elif self.share(name, rank := ranks[name]) >= 1:
                reasons[name] = Reason(ReasonCode.NOT_CHEAPER, f"at the rank found, {rank}, it costs more than dense")
            else:
                form, cost = self.forms[name], self.cost(name, rank)
                choices[name] = Candidate(form, self.ranks(name, rank), self.error(name, rank), cost, form.modes)
        spent = self.network({name: choice.cost for name, choice in choices.items()})
        return RankPlan(choices, spent, self.whole, selector=selector, reasons=reasons)

    def _whole(self, name: str) -> Reason:
        """Return why a searched layer stays dense."""
        least = self._cheapest(name)
        if least == WHOLE:
            return Reason(ReasonCode.NOT_CHEAPER, "no rank for this layer is cheaper than dense")
        lost = (
            f"rank {least} saves {1 - self.share(name, least):.3g} of its cost at error {self.error(name, least):.3g}"
        )
        return Reason(ReasonCode.DENSE_IS_BEST, f"dense is best here under the budget: {lost}")

    def _least(self, names: Iterable[str]) -> dict[str, int]:
        """Return rank 1 for each layer; the cheapest rank if that misses the budget: measured prices need not rise."""
        ones = {name: 1 if self.share(name, 1) < 1 else WHOLE for name in names}
        if within(self.spent(ones), self.limits):
            return ones
        return {name: self._cheapest(name) for name in ones}

    def _cheapest(self, name: str) -> int:
        return min(self._ladder(name, 1), key=partial(self.share, name))

    def _ladder(self, name: str, rank: int) -> list[int]:
        """Return ranks that are cheaper than dense, about a tenth apart, including this one; then ``WHOLE``."""
        rungs, at = {rank, self.most(name)}, 1  # not every rank: measuring takes time
        while at <= self.most(name):
            rungs.add(at)
            at = max(at + 1, int(at * 1.1))
        return [*sorted(rung for rung in rungs if rung != WHOLE and self.share(name, rung) < 1), WHOLE]

    def _fall(self, name: str, ladder: Sequence[int], rank: int) -> tuple[float, int] | None:
        """Return the cheaper rank of least squared error for its saving, after that ratio; None if none is cheaper."""
        share = self.share(name, rank)
        return min(
            ((self._slope(name, less, rank), less) for less in ladder if self.share(name, less) < share), default=None
        )

    def _rises(self, name: str, ladder: Sequence[int], rank: int) -> list[tuple[float, int]]:
        """Return ranks of less error, each after its reduction for its cost, the largest reduction first."""
        error = self.error(name, rank) ** 2
        better = [more for more in ladder if error - self.error(name, more) ** 2 > _GAIN]
        return sorted(((self._slope(name, rank, more), more) for more in better), reverse=True)

    def _learn(self, name: str, ranks: Sequence[int]) -> None:
        site, missing = self.sites[name], [rank for rank in ranks if (name, rank) not in self._errors]
        space = [self.ranks(name, rank) for rank in missing]
        plain = Identity.of(site.weight)
        found = self.forms[name].errors(site.layer, site.weight, space, plain) if space else []
        self._errors |= {(name, rank): float(error) for rank, error in zip(missing, found, strict=True)}

    def _slope(self, name: str, low: int, high: int) -> float:
        """Return the difference in squared error between two ranks, divided by their difference in cost."""
        spent = (self.share(name, high) - self.share(name, low)) * self.part(name)
        return (self.error(name, low) ** 2 - self.error(name, high) ** 2) / max(spent, 1e-30)
