"""``detach-dense``: parallel layers become the plain chains of their adapters; no dense branch is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from tdcompile.decomposition import relative_error
from tdcompile.errors import TdcompileError
from tdcompile.facts import Fact
from tdcompile.kinds import RewritePass, Rewritten
from tdcompile.layer import Refusal
from tdcompile.pricing import Prices
from tdcompile.program import Change, Program
from tdcompile.progressive import Parallel, parallels
from tdcompile.ranks import DENSE, Candidate, RankPlan
from tdcompile.surgery import outputs_of, replace_module

_ROUNDING = 1e-5


@dataclass(frozen=True)
class DetachDense(RewritePass):
    """Put the adapters' own chains in the place of parallel layers, sure that they compute the same."""

    name: ClassVar[str] = "detach-dense"
    gives: ClassVar[tuple[type[Fact], ...]] = (RankPlan,)

    def rewrite(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        """Replace them, and give the plan that they are.

        Raises:
            TdcompileError: a dense share is left, or the chains compute something else.
        """
        layers, history = parallels(graph), []
        for name, layer in layers.items():
            if layer.share != 0:
                raise TdcompileError(
                    f"detach-dense: '{name}' still has {layer.share:.1%} of its dense weight: anneal first"
                )
        before = outputs_of(graph, program.inputs)
        for name, layer in layers.items():
            new = layer.decomposition.build(layer.layer, layer.ranks, layer.truncated(), layer.bias)
            replace_module(graph, name, new)
            history.append(Change(name, self.name, f"{layer.form}{list(layer.ranks)}"))
        graph.recompile()
        _same(before, outputs_of(graph, program.inputs))
        return Rewritten(graph, history, [self._plan(program, layers)])

    @torch.no_grad()
    def _plan(self, program: Program, layers: Mapping[str, Parallel]) -> RankPlan:
        prices, found = Prices(program), layers
        refused = {entry.layer: entry for entry in program.history if isinstance(entry, Refusal)}
        choices, reasons = {}, {}
        for name, site in prices.sites.items():
            choices[name] = Candidate(DENSE, (), 0.0, prices.layers[name])
            if name in found:
                layer = found[name]
                error = relative_error(site.weight, layer.adapter(), None)
                cost = prices.at(name, layer.decomposition, layer.ranks)
                choices[name] = Candidate(layer.form, layer.ranks, error, cost, layer.decomposition.modes)
            else:
                reasons[name] = refused.get(name, Refusal(name, "refused", "it has no adapter"))
        predicted = prices.network({name: choice.cost for name, choice in choices.items()})
        return RankPlan(choices, predicted, prices.dense, selector=self.name, reasons=reasons)


def _same(before: list[Tensor], after: list[Tensor]) -> None:
    for one, other in zip(before, after, strict=True):
        off, scale = float((one - other).abs().max()), float(one.abs().max())
        if not off <= _ROUNDING * max(scale, 1.0) * 10:
            raise TdcompileError(
                f"detach-dense: the chains differ from the adapters by {off:.3g} on a scale of {scale:.3g}"
            )
