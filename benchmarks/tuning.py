"""One compressed network, tuned in several ways, to judge ``finetune``'s defaults."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from common import percent, publish, traced

from tdcompile.core.pipeline import Pipeline
from tdcompile.data.metrics import accuracy
from tdcompile.ir.target import Target
from tdcompile.training.run_state import Tuning

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
    """Compare tunings of one plan with equal factors and repair; measure accuracy on all 10,000 test images.

    A held-out split of the training part chooses the epoch that is kept. The last epoch is reported beside it.
    """
    program, _, test = traced(network, weights, data, macs, seed)
    program = Pipeline.parse(PLAN).run(program)
    before, rows = accuracy(program.graph, test), list[dict[str, Any]]()
    for options in tune.split(";"):
        begun = time.perf_counter()
        with TemporaryDirectory() as folder:
            after = Pipeline.parse(f"finetune{{{options}}}").run(program.with_(workspace=Path(folder)))
            seconds = time.perf_counter() - begun
            state = torch.load(Path(folder) / "finetune" / "state.pt", weights_only=True)
        tuning, kept = after.facts[Tuning], accuracy(after.graph, test)
        last, ended = tuning.curve[-1], kept
        if tuning.best_epoch != last.epoch:
            after.graph.load_state_dict(state["average"] or state["model"])
            ended = accuracy(after.graph, test)
        rows.append(
            {
                "finetune": options,
                "rate": tuning.rate,
                "held-out before %": percent(tuning.start_score),
                "held-out last %": percent(last.heldout_score),
                "kept": f"epoch {tuning.best_epoch}" if tuning.best_epoch else "the start",
                "test before %": percent(before),
                "test last %": percent(ended),
                "test kept %": percent(kept),
                "seconds": seconds,
            }
        )
        publish(f"{network}: {options}", rows[-1:], seed, Target(), None)
    publish(f"finetune on {network} at {macs:g} of the MACs, CIFAR-10", rows, seed, Target(), json)


if __name__ == "__main__":
    typer.run(main)
