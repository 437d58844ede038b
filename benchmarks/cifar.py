"""Accuracy on CIFAR-10 at a budget: our default beside plain uniform HOSVD, before and after tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import percent, publish, trained

import tdcompile
from tdcompile.compiler import Compiled
from tdcompile.data.task import Task
from tdcompile.ir.target import Target

HOSVD = "plain HOSVD, uniform ranks"
UNIFORM = "propose{{decompose=tucker2}},score{{by=none}},choose{{by=uniform}},factorize{tail},fold-batchnorm,drop-dead"


def main(
    data: Annotated[str, typer.Option(help="parquet:DIR with the images")],
    weights: Annotated[Path, typer.Option(help="safetensors of the dense network")],
    network: str = "resnet20",
    budget: Annotated[str, typer.Option(help="e.g. macs=0.5")] = "macs=0.5",
    tune: Annotated[str, typer.Option(help="none, or options of finetune, e.g. epochs=5")] = "none",
    decompose: Annotated[str, typer.Option(help="one row each, separated by ';'")] = "auto",
    ranks: Annotated[str, typer.Option(help="rank selectors, one row each, separated by ';'")] = "knapsack",
    importance: Annotated[str, typer.Option(help="scores, one row each, separated by ';'")] = "auto",
    baseline: Annotated[
        bool, typer.Option(help="also plain uniform HOSVD, without and with re-estimated norms")
    ] = True,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the table here")] = None,
) -> None:
    """Compile a trained network at a budget in several ways; measure accuracy on all 10,000 test images."""
    module, train, test = trained(network, weights, data, seed)
    task, (name, share) = Task(train, test, source=data), budget.split("=")

    def compiled(**options: Any) -> Compiled:
        return tdcompile.compile(
            module, torch.randn(1, 3, 32, 32), data=task, budget={name: float(share)}, seed=seed, **options
        )

    rows = []
    if baseline:
        rows.append(_row(HOSVD, compiled(pipeline=UNIFORM.format(tail=""))))
        rows.append(_row(f"{HOSVD}, batch norm re-estimated", compiled(pipeline=UNIFORM.format(tail=",recalibrate"))))
    for form in decompose.split(";"):
        for selector in ranks.split(";"):
            for score in importance.split(";"):
                made = compiled(decompose=tuple(form.split(",")), ranks=selector, importance=score, tune=tune)
                rows.append(_row(f"{form}, {selector}, {score}, tune {tune}", made))
                publish("CIFAR-10", rows[-1:], seed, Target(), None)
    publish(f"{network} on CIFAR-10 at {budget}", rows, seed, Target(), json)


def _row(title: str, compiled: Compiled) -> dict[str, Any]:
    report = compiled.report
    return {
        "how": title,
        "dense %": percent(report.dense.score),
        "before tuning %": percent(report.compiled.score_before_tuning),
        "compiled %": percent(report.compiled.score),
        "MACs dense / compiled": report.ratio.macs,
        "params dense / compiled": report.ratio.params,
        "latency dense / compiled": report.ratio.latency,
        "seconds": report.seconds["total"],
    }


if __name__ == "__main__":
    typer.run(main)
