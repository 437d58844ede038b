"""One compressed network, tuned in several ways: how good are ``finetune``'s defaults?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from common import percent, publish, traced

from tdcompile.pipeline import Pipeline
from tdcompile.target import Target
from tdcompile.task import accuracy
from tdcompile.tuning import Tuning

PLAN = "calibrate,score,propose,choose,factorize,recalibrate,refit"


def main(
    data: Annotated[str, typer.Option(help="parquet:DIR with the images")],
    weights: Annotated[Path, typer.Option(help="safetensors of the dense network")],
    network: str = "resnet20",
    macs: Annotated[float, typer.Option(help="share of the MACs that is kept")] = 0.3,
    tune: Annotated[str, typer.Option(help="options of finetune, one row each, separated by ';'")] = "epochs=1",
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the table here")] = None,
) -> None:
    """The plan, its factors and the repair are the same in every row; test accuracy is of all 10,000 images."""
    program, _, test = traced(network, weights, data, macs, seed)
    program = Pipeline.parse(PLAN).run(program)
    before, rows = accuracy(program.graph, test), list[dict[str, Any]]()
    for options in tune.split(";"):
        begun = time.perf_counter()
        after = Pipeline.parse(f"finetune{{{options}}}").run(program)
        tuning = after.facts[Tuning]
        kept = next((epoch for epoch in tuning.curve if epoch.epoch == tuning.best_epoch), None)
        rows.append(
            {
                "finetune": options,
                "rate": tuning.rate,
                "held-out before %": percent(tuning.start_accuracy),
                "held-out after %": percent(kept.heldout_accuracy) if kept else "the start was kept",
                "test before %": percent(before),
                "test after %": percent(accuracy(after.graph, test)),
                "seconds": time.perf_counter() - begun,
            }
        )
        publish(f"{network}: {options}", rows[-1:], seed, Target(), None)
    publish(f"finetune on {network} at {macs:g} of the MACs, CIFAR-10", rows, seed, Target(), json)


if __name__ == "__main__":
    typer.run(main)
