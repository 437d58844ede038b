"""Error-preserving correction of CP: its cost in error, and its gain in sensitivity and in tuning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from common import percent, publish, traced

from tdcompile.core.decomposition import Decomposition, relative_error
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import RankPlan
from tdcompile.core.registry import make
from tdcompile.data.metrics import accuracy
from tdcompile.ir.program import Program, sites
from tdcompile.ir.target import Target
from tdcompile.numerics.covariance import Identity
from tdcompile.numerics.cp_correction import sensitivity
from tdcompile.passes.decompose._cp import mode_matrices


def main(
    data: Annotated[str, typer.Option(help="parquet:DIR with the images")],
    weights: Annotated[Path, typer.Option(help="safetensors of the dense network")],
    network: str = "resnet20",
    forms: Annotated[str, typer.Option(help="CP forms, comma-separated")] = "cp,cp4",
    corrections: Annotated[str, typer.Option(help="ratios, comma-separated; the first is compared with")] = (
        "1,1.001,1.01,1.05"
    ),
    macs: Annotated[float, typer.Option(help="share of the MACs that is kept")] = 0.5,
    tune: Annotated[str, typer.Option(help="none, or options of finetune")] = "epochs=1,lr=0.01,holdout=0",
    evaluate: Annotated[int, typer.Option(help="test images of each measurement")] = 10_000,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the table here")] = None,
) -> None:
    """Compare forms at equal ranks: one fraction for all layers, with factors fitted to the weights alone."""
    program, _, test = traced(network, weights, data, macs, seed)
    rows = []
    for form in forms.split(","):
        chosen = Pipeline.parse(f"propose{{decompose={form}{{correct=1}}}},score{{by=none}},choose{{by=uniform}}").run(
            program
        )
        first: list[tuple[float, float]] = []
        for correction in corrections.split(","):
            plan = _with(chosen.facts[RankPlan], f"{form}{{correct={correction}}}")
            figures = _figures(chosen, plan)
            first = first or figures
            made = chosen.with_(facts=chosen.facts.having(plan))
            made = Pipeline.parse("factorize,recalibrate").run(made)
            before = accuracy(made.graph, test, evaluate)
            after = None
            if tune != "none":
                after = accuracy(Pipeline.parse(f"finetune{{{tune}}}").run(made).graph, test, evaluate)
            rows.append(
                {
                    "form": form,
                    "correct": correction,
                    "error, of the first": _ratio(figures, first, 0),
                    "sensitivity, of the first": _ratio(figures, first, 1),
                    "before tuning %": percent(before),
                    "after tuning %": percent(after),
                }
            )
            publish(f"{form}, correct {correction}", rows[-1:], seed, Target(), None)
    publish(f"Correction of CP: {network} at {macs:g} of the MACs, {tune}", rows, seed, Target(), json)


def _with(plan: RankPlan, form: str) -> RankPlan:
    choices = {
        name: choice if choice.is_dense else replace(choice, decomposition=make(Decomposition, form))
        for name, choice in plan.choices.items()
    }
    return replace(plan, choices=choices)


def _figures(program: Program, plan: RankPlan) -> list[tuple[float, float]]:
    """Return for every replaced layer the relative error of its weight and the sensitivity of its CP."""
    found, figures = sites(program), []
    for name, choice in plan.choices.items():
        if not choice.is_dense:
            site, form = found[name], choice.decomposition
            plain = Identity.of(site.weight)
            factors = form.factorize(site.layer, site.weight, choice.ranks, plain)
            error = relative_error(site.weight, form.reconstruct(site.layer, factors), plain)
            figures.append((error, sensitivity([matrix.double() for matrix in mode_matrices(factors)])))
    return figures


def _ratio(figures: list[tuple[float, float]], first: list[tuple[float, float]], which: int) -> float:
    return fmean(figure[which] / other[which] for figure, other in zip(figures, first, strict=True))


if __name__ == "__main__":
    typer.run(main)
