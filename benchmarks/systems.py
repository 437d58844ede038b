"""Published systems and ours at equal MACs: accuracy before and after equal tuning, cost and search time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import percent, publish, trained
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import tdcompile
from tdcompile.core.hooks import Hook
from tdcompile.core.passes import Pass
from tdcompile.data.task import Task
from tdcompile.errors import TdcompileError
from tdcompile.ir.program import Program
from tdcompile.ir.target import Target

# {tune} is the tuning of all systems; {training} holds its training options.
# Weights are plain if the authors used plain weights.
SYSTEMS = {
    "Tucker-2, same share": (
        "propose{{decompose=tucker2+svd}},score{{by=none}},choose{{by=uniform}},factorize,recalibrate{tune}"
    ),
    "Tucker-2 by energy": (
        "propose{{decompose=tucker2+svd}},score{{by=none}},choose{{by=energy}},factorize,recalibrate{tune}"
    ),
    "Tucker-2 by VBMF (Kim et al.)": (
        "propose{{decompose=tucker2+svd,spectra=true}},score{{by=none}},choose{{by=vbmf}},factorize,recalibrate{tune}"
    ),
    "equal relative error, CP, Tucker, TT": (
        "propose{{decompose=cp4+tucker2+tt+svd}},score{{by=none}},choose{{by=equal-error}},factorize,recalibrate{tune}"
    ),
    "LWIQ": "score{{by=lwiq}},propose{{decompose=tt+svd}},choose{{by=lwiq}},factorize,recalibrate{tune}",
    "RENE (TT)": "rene,factorize,recalibrate{tune}",
    "RENE (TT, coefficients by data)": "rene{{mode=data}},factorize,recalibrate{tune}",
    "RENE (CP)": "rene{{form=cp}},factorize,recalibrate{tune}",
    "progressive Tucker": "attach-adapters,anneal{{{training}}},detach-dense",
    "probe of every layer": (
        "calibrate,score{{by=probe}},propose,choose{{by=knapsack}},factorize,recalibrate,refit{tune}"
    ),
    "ours, no refit": "calibrate,score,propose,choose,factorize,recalibrate{tune}",
    "ours": "calibrate,score,propose,choose,factorize,recalibrate,refit{tune}",
}
SEARCH = ("calibrate", "score", "propose", "choose", "rene", "anneal")


class Passes(Hook):
    """Count the samples that go through the whole network during the search for a plan."""

    def __init__(self) -> None:
        self.samples, self._searching = 0, False
        self._hook = register_module_forward_pre_hook(self._see)

    def started(self, step: Pass, position: int, of: int) -> None:
        """Start counting if the pass belongs to the search."""
        self._searching = step.name in SEARCH

    def finished(self, step: Pass, program: Program, seconds: float) -> None:
        """Pause counting until the next pass."""
        self._searching = False

    def close(self) -> int:
        """Stop counting; return the count."""
        self._hook.remove()
        return self.samples

    def _see(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self._searching and isinstance(module, nn.Conv2d) and module.in_channels == 3:  # it reads the images
            self.samples += len(arguments[0])


def main(
    data: Annotated[str, typer.Option(help="parquet:DIR with the images")],
    weights: Annotated[Path, typer.Option(help="safetensors of the dense network")],
    network: str = "resnet20",
    macs: Annotated[float, typer.Option(help="share of the MACs that is kept")] = 0.5,
    epochs: Annotated[
        float, typer.Option(help="of tuning; 0 is none, and leaves out what is nothing but training")
    ] = 0,
    options: Annotated[str, typer.Option(help="more options of finetune, e.g. lr=0.01,precision=bf16")] = "",
    only: Annotated[str, typer.Option(help="systems of these names, or whose names contain one, comma-separated")] = "",
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the table here")] = None,
) -> None:
    """Measure accuracy on all 10,000 test images; test accuracy chooses nothing."""
    module, train, test = trained(network, weights, data, seed)
    training = ",".join(filter(None, (f"epochs={epochs:g}", options)))
    tune = f",finetune{{{training}}}" if epochs else ""
    rows: list[dict[str, Any]] = []
    for name, text in SYSTEMS.items():
        if not _wanted(name, only.split(",")) or ("{training}" in text and not epochs):
            continue
        pipeline = text.format(tune=tune, training=training) + ",fold-batchnorm,drop-dead"
        task, passes = Task(train, test, source=data), Passes()
        try:
            report = tdcompile.compile(
                module,
                torch.randn(1, 3, 32, 32),
                data=task,
                budget={"macs": macs},
                seed=seed,
                pipeline=pipeline,
                watch=passes,
            ).report
        except TdcompileError as error:  # a system that exceeds the budget becomes a row too
            rows.append({"system": name, "failed": str(error)})
            continue
        finally:
            searched = passes.close()
        before = report.compiled.score_before_tuning
        rows.append(
            {
                "system": name,
                "dense %": percent(report.dense.score),
                "before tuning %": percent(before) if epochs else None,
                "accuracy %": percent(report.compiled.score),
                "MACs dense / compiled": report.ratio.macs,
                "params dense / compiled": report.ratio.params,
                "latency dense / compiled": report.ratio.latency,
                "search seconds": sum(report.seconds.get(step, 0.0) for step in SEARCH),
                "search samples": searched,
                "seconds": report.seconds["total"],
            }
        )
        publish(f"{network}: {name}", rows[-1:], seed, Target(), None)
    title = f"Systems at {macs:g} of the MACs: {network} on CIFAR-10, {epochs:g} epochs of tuning"
    publish(title, rows, seed, Target(), json)


def _wanted(name: str, parts: list[str]) -> bool:
    """Return whether a system is selected: a full name matches exactly, any other part matches as a substring."""
    return any(part == name if part in SYSTEMS else part in name for part in parts)


if __name__ == "__main__":
    typer.run(main)
