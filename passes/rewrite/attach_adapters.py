"""``attach-adapters``: add a low-rank adapter beside every layer's dense weight; the function does not change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, fx

from tdcompile.core.decomposition import Decomposition
from tdcompile.core.passes import RewritePass, Rewritten
from tdcompile.core.registry import make
from tdcompile.ir.diagnostics import Diagnostic, Reason
from tdcompile.ir.graph_edits import replace_module
from tdcompile.ir.program import Change, Program, Site, kept_dense, sites
from tdcompile.numerics.covariance import Identity
from tdcompile.support.options import Share
from tdcompile.support.progress import report_progress
from tdcompile.training.adapters import Parallel

FORMS = ("tucker2", "svd")


@dataclass(frozen=True)
class AttachAdapters(RewritePass):
    """Tucker-2 adapters for convolutions, truncated SVD for linear layers and 1x1 convolutions: progressive Tucker.

    The supplement of the method gives no formula and no schedule. We use y = layer(x; a (W₀ − T(θ₀)) + T(θ)), which is
    exact at the start. ``anneal`` moves a from 1 to 0 and cuts ranks; ``detach-dense`` keeps only the adapters.

    Attributes:
        rank: initial ranks of the adapters, as a share of the full ranks.
        init: ``exact`` starts from the decomposition of the weight, ``zero`` from a zero product, as LoRA does.
    """

    name: ClassVar[str] = "attach-adapters"
    rank: Share = 0.9
    init: Literal["exact", "zero"] = "exact"

    def rewrite(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        """Replace every layer that one of the forms fits by a parallel layer."""
        found = sites(program)
        kept = kept_dense(program, found)
        history: list[Change | Diagnostic] = []
        for done, (name, site) in enumerate(found.items(), start=1):
            report_progress(done, len(found), name)
            made = kept.get(name) or self._adapted(site)
            if isinstance(made, Parallel):
                replace_module(graph, name, made)
                history.append(Change(name, self.name, f"{made.form}{list(made.ranks)} beside the dense weight"))
            else:
                history.append(made.about(name))
        return Rewritten(graph, history)

    def _adapted(self, site: Site) -> Parallel | Reason:
        forms = [make(Decomposition, name) for name in FORMS]
        form = next((form for form in forms if form.refuse(site.layer) is None), None)
        if form is None:
            reason = forms[0].refuse(site.layer)
            assert reason is not None  # the search above would have returned this form
            return reason
        ranks = tuple(max(1, round(self.rank * most)) for most in form.exact_ranks(site.layer))
        factors = form.factorize(site.layer, site.weight, ranks, Identity.of(site.weight))
        bias = site.module.bias
        assert bias is None or isinstance(bias, Tensor)  # the types that convolutions and linear layers use
        return Parallel(site.layer, str(form.spec()), ranks, site.weight, factors, bias, zero=self.init == "zero")
