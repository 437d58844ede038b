"""``factorize``: put the chosen chains of small layers in place of the layers of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from tdcompile.calibration import Calibration
from tdcompile.decomposition import Decomposition
from tdcompile.errors import InputError, nearest
from tdcompile.facts import Fact
from tdcompile.kinds import Rewritten, RewritePass, tick
from tdcompile.program import Change, Program, Site, sites
from tdcompile.ranks import DENSE, Candidate, RankPlan
from tdcompile.registry import make
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


def check(site: Site, choice: Candidate) -> Decomposition:
    """The decomposition of a choice, made sure that it fits the layer.

    Raises:
        InputError: it refuses the layer, or the ranks are not ranks of it.
    """
    form = make(Decomposition, choice.decomposition)
    refusal = form.refuse(site.layer)
    if refusal is not None:
        raise InputError(f"the plan wants {choice.decomposition} for '{site.name}': {refusal.reason}")
    full = form.exact_ranks(site.layer)
    fits = len(choice.ranks) == len(full) and all(1 <= r <= most for r, most in zip(choice.ranks, full, strict=True))
    if not fits:
        raise InputError(
            f"the plan wants {choice.decomposition}{list(choice.ranks)} for '{site.name}': "
            f"expected {len(full)} rank(s), each at least 1 and at most {list(full)}"
        )
    return form
