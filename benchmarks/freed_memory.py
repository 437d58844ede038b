"""Batches inferred and steps trained with and without keeping freed memory in the process."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from common import network, publish

from tdcompile.ir.target import Target
from tdcompile.support.heap import keep_freed_memory


def main(
    networks: Annotated[str, typer.Option(help="comma-separated")] = "resnet56,resnet50",
    images: Annotated[str, typer.Option(help="of a batch, for each network, comma-separated")] = "128,8",
    batches: Annotated[int, typer.Option(help="of each turn")] = 4,
    rounds: int = 5,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the table here")] = None,
) -> None:
    """Alternate both variants in PyTorch on the CPU in fp32, with random weights and images; a step has no update."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, size in zip(networks.split(","), map(int, images.split(",")), strict=True):
        module, example = network(name, seed)
        x = torch.randn(size, *example.shape[1:], generator=torch.Generator().manual_seed(seed))
        for what, trains in (("inference", False), ("training steps", True)):
            module.train(trains).requires_grad_(trains)
            returned, kept = [], []
            for turn in range(rounds + 1):
                some = [_seconds(module, x, batches, nullcontext()), _seconds(module, x, batches, keep_freed_memory())]
                if turn:  # the first turn warms up
                    returned.append(some[0])
                    kept.append(some[1])
            ratios = sorted(b / a for a, b in zip(returned, kept, strict=True))
            rows.append(
                {
                    "network": name,
                    f"{batches} batches": f"{what}, {size} images a batch",
                    "seconds, returned": median(returned),
                    "seconds, kept": median(kept),
                    "ratio": median(kept) / median(returned),
                    "lowest and highest": [ratios[0], ratios[-1]],
                }
            )
    publish("Freed memory kept by the process", rows, seed, Target(), json)


def _seconds(module: torch.nn.Module, x: torch.Tensor, batches: int, memory: AbstractContextManager[None]) -> float:
    begun = time.perf_counter()
    with memory:
        for _ in range(batches):
            answer = module(x)
            if answer.requires_grad:
                answer.square().mean().backward()
    return time.perf_counter() - begun


if __name__ == "__main__":
    typer.run(main)
