"""``factorize``: put the chosen chains of small layers in place of the layers of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from tdcompile.calibration import Calibration
from tdcompile.errors import InputError, nearest
from tdcompile.facts import Fact
from tdcompile.kinds import RewritePass, Rewritten, tick
from tdcompile.planfile import check
from tdcompile.program import Change, Program, sites
from tdcompile.ranks import DENSE, RankPlan
from tdcompile.surgery import replace_module


@dataclass(frozen=True)
class Factorize(RewritePass):
    """Replace every layer that the plan does not leave dense."""

    name: ClassVar[str] = "factorize"
    needs: ClassVar[tuple[type[Fact], ...]] = (RankPlan,)

    def rewrite(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        """Factorise each layer's weight, output-error optimal where there are moments.

        Raises:
            InputError: the plan names a layer, form or rank that this network does not have.
        """
        found, chosen = sites(program), program.facts[RankPlan].choices
        calibration = program.facts.get(Calibration)
        moments = calibration.moments if calibration else {}
        for name in chosen:
            if name not in found:
                raise InputError(f"the plan is for another network: it has no layer '{name}'; {nearest(name, found)}")
        replaced = {name: choice for name, choice in chosen.items() if choice.decomposition != DENSE}
        history = []
        for done, (name, choice) in enumerate(replaced.items(), start=1):
            form, site = check(found[name], choice), found[name]
            factors = form.factorize(site.layer, site.weight, choice.ranks, moments.get(name))
            bias = site.module.bias
            assert bias is None or isinstance(bias, Tensor)  # what convolutions and linear layers have
            replace_module(graph, name, form.build(site.layer, choice.ranks, factors, bias))
            history.append(Change(name, self.name, f"{choice.decomposition}{list(choice.ranks)}"))
            tick(done, len(replaced), name)
        return Rewritten(graph, history)
