"""``factorize``: replace the layers of a plan by their chains of small layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from tdcompile.core.decomposition import Decomposition, reading
from tdcompile.core.passes import RewritePass, Rewritten
from tdcompile.core.plan import RankPlan
from tdcompile.errors import InputError, during, nearest
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode
from tdcompile.ir.facts import Fact
from tdcompile.ir.graph_edits import replace_module
from tdcompile.ir.layer import Layer, Ranks
from tdcompile.ir.measurements import input_covariance
from tdcompile.ir.program import Change, Program, kept_dense, sites
from tdcompile.numerics.covariance import Covariance
from tdcompile.planning.plan_file import check, estimated
from tdcompile.support.form_seconds import FormSeconds, timed
from tdcompile.support.options import Workers
from tdcompile.support.process_pool import parallel_map
from tdcompile.support.progress import report_progress

_Work = tuple[Decomposition, Layer, Tensor, Ranks, Covariance]


@dataclass(frozen=True)
class Factorize(RewritePass):
    """Replace every layer that the plan does not leave dense.

    Attributes:
        jobs: number of layers factorised in parallel, each in a process.
    """

    name: ClassVar[str] = "factorize"
    needs: ClassVar[tuple[type[Fact], ...]] = (RankPlan,)
    jobs: Workers = 1

    def run(self, program: Program) -> Program:
        """Run the rewrite; a plan by hand first gets the errors of the layers' outputs."""
        return super().run(estimated(program))

    def rewrite(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        """Factorise each layer's weight, output-error optimal if there is calibration data.

        Raises:
            InputError: the plan names a layer, form or rank that does not exist, or a layer that must stay dense.
        """
        found, chosen = sites(program), program.facts[RankPlan].choices
        for name in chosen:
            if name not in found:
                raise InputError(f"the plan is for another network: it has no layer '{name}'; {nearest(name, found)}")
        replaced = {name: choice for name, choice in chosen.items() if not choice.is_dense}
        kept = kept_dense(program, found)
        for name, choice in replaced.items():
            check(found[name], choice, kept)
        work = (
            (
                choice.decomposition,
                site.layer,
                site.weight,
                choice.ranks,
                input_covariance(program.facts, name, site.weight),
            )
            for name, choice in replaced.items()
            for site in (found[name],)
        )
        history: list[Change | Diagnostic] = []
        made = zip(replaced.items(), parallel_map(_factors, work, self.jobs), strict=True)
        spent = FormSeconds(self.name)
        for done, ((name, choice), (factors, seconds)) in enumerate(made, start=1):
            spent.add(choice.decomposition.name, seconds)
            spent.layer_done(name)
            form, site = choice.decomposition, found[name]
            bias = site.module.bias
            assert bias is None or isinstance(bias, Tensor)  # the types that convolutions and linear layers use
            with during(f"in the decomposition {form.told()} on the layer '{name}'"):
                replace_module(graph, name, form.build(site.layer, choice.ranks, factors, bias))
            history.append(Change(name, self.name, f"{choice.form}{list(choice.ranks)}"))
            if (caution := form.caution(site.layer, site.weight, factors)) is not None:
                history.append(Diagnostic("warning", DiagnosticCode.CAUTION, f"'{name}': {caution}", name))
            report_progress(done, len(replaced), name)
        spent.all_done()
        return Rewritten(graph, history)


def _factors(work: _Work) -> tuple[tuple[Tensor, ...], float]:
    """Return the factors of one layer, and the seconds that they took."""
    return timed(_factors_of, work)


def _factors_of(work: _Work) -> tuple[Tensor, ...]:
    form, layer, weight, ranks, covariance = work
    with during(f"in the decomposition {form.told()} of a layer {layer.weight_shape}"), reading(form, weight):
        return form.factorize(layer, weight, ranks, covariance)
