"""Duration of a tuning step in each precision: one plan, with precisions trained alternately."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from common import network as random_network
from common import publish

import tdcompile
from tdcompile.core.pipeline import Pipeline
from tdcompile.data.task import Task, Tensors
from tdcompile.ir.target import Budget, Device, Target
from tdcompile.training.run_state import Tuning


def main(
    networks: Annotated[str, typer.Option(help="comma-separated")] = "resnet20,resnet56",
    precisions: Annotated[str, typer.Option(help="fp16 needs a GPU; comma-separated")] = "fp32,bf16",
    macs: Annotated[float, typer.Option(help="share of the MACs that is kept")] = 0.3125,
    batch: int = 128,
    steps: Annotated[int, typer.Option(help="of each turn")] = 4,
    rounds: int = 5,
    device: Annotated[Device, typer.Option()] = "cpu",
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the table here")] = None,
) -> None:
    """Use random weights and images; a step is a dense forward pass, both compressed passes and an update."""
    rows: list[dict[str, Any]] = []
    for name in networks.split(","):
        module, example = random_network(name, seed)
        images = torch.randn(steps * batch, *example.shape[1:], generator=torch.Generator().manual_seed(seed))
        train = Tensors(images, torch.arange(len(images)) % 10)
        program = tdcompile.trace(module, (torch.cat([example, example]),))
        program = program.with_(task=Task(train), budget=Budget(macs=macs), target=Target(device), seed=seed)
        program = Pipeline.parse("score{by=none},propose,choose,factorize").run(program)
        seconds: dict[str, list[float]] = {precision: [] for precision in precisions.split(",")}
        for turn in range(rounds + 1):
            for precision, found in seconds.items():
                tune = f"finetune{{epochs=1,lr=1e-4,batch={batch},holdout=0,precision={precision}}}"
                took = Pipeline.parse(tune).run(program).facts[Tuning].seconds / steps
                found += [took] if turn else []  # the first turn warms up
        first = median(next(iter(seconds.values())))
        for precision, found in seconds.items():
            ratio = median(found) / first
            rows.append(
                {
                    "network": name,
                    "precision": precision,
                    "seconds a step": median(found),
                    "lowest": min(found),
                    "highest": max(found),
                    f"of {next(iter(seconds))}": ratio,
                }
            )
    publish(f"A training step of {batch} images at {macs:g} of the MACs", rows, seed, Target(device), json)


if __name__ == "__main__":
    typer.run(main)
