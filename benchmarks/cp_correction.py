"""What error-preserving correction of CP costs in error, and what it brings in sensitivity and in tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer
from common import publish, trained
from torch import Tensor

import tdcompile
from tdcompile.decomposition import Decomposition, relative_error
from tdcompile.degeneracy import sensitivity
from tdcompile.pipeline import Pipeline
from tdcompile.program import Program, sites
from tdcompile.ranks import DENSE, RankPlan
from tdcompile.registry import make
from tdcompile.target import Budget, Target
from tdcompile.task import Task, accuracy


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
    """The rows of a form have the same ranks, one fraction for all layers, and factors of the weights alone."""
    module, train, test = trained(network, weights, data, seed)
    program = tdcompile.trace(module, (torch.randn(2, 3, 32, 32),))
    program = program.with_(task=Task(train, test, source=data), budget=Budget(macs=macs), seed=seed)
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
                    "before tuning %": _percent(before),
                    "after tuning %": _percent(after),
                }
            )
            publish(f"{form}, correct {correction}", rows[-1:], seed, Target(), None)
    publish(f"Correction of CP: {network} at {macs:g} of the MACs, {tune}", rows, seed, Target(), json)


def _with(plan: RankPlan, form: str) -> RankPlan:
    choices = {
        name: choice if choice.decomposition == DENSE else replace(choice, decomposition=form)
        for name, choice in plan.choices.items()
    }
    return replace(plan, choices=choices)


def _figures(program: Program, plan: RankPlan) -> list[tuple[float, float]]:
    """Of every replaced layer the relative error of its weight and the sensitivity of its CP."""
    found, figures = sites(program), []
    for name, choice in plan.choices.items():
        if choice.decomposition != DENSE:
            site, form = found[name], make(Decomposition, choice.decomposition)
            factors = form.factorize(site.layer, site.weight, choice.ranks, None)
            error = relative_error(site.weight, form.reconstruct(site.layer, factors), None)
            figures.append((error, sensitivity(_matrices(factors))))
    return figures


def _matrices(weights: Sequence[Tensor]) -> list[Tensor]:
    """The factors ``(I_n, rank)`` of a CP from the weights of its chain: all but the last have the rank first."""
    *others, last = (weight.detach().double().flatten(1) for weight in weights)
    return [last, *(factor.T for factor in others)]


def _ratio(figures: list[tuple[float, float]], first: list[tuple[float, float]], which: int) -> float:
    return fmean(figure[which] / other[which] for figure, other in zip(figures, first, strict=True))


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share * 100:.2f}"


if __name__ == "__main__":
    typer.run(main)
