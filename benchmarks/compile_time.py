"""Seconds and memory of a compilation without tuning, with an empty and with a warm cache of measured costs."""

from __future__ import annotations

import json as jsonlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from common import network, publish

import tdcompile
from tdcompile.ir.target import Target


def main(
    networks: Annotated[str, typer.Option(help="comma-separated names of reference networks")] = (
        "resnet50,vgg16,vit_tiny"
    ),
    budget: float = 0.5,
    seed: int = 0,
    one: Annotated[str | None, typer.Option(hidden=True, help="compile this one and print its figures")] = None,
    json: Annotated[Path | None, typer.Option(help="also write the table here")] = None,
) -> None:
    """Compile each network twice, each time in a new process, to measure imports and peak memory of one run."""
    if one is not None:
        module, sample = network(one, seed)
        report = tdcompile.compile(module, sample, budget={"latency": budget}, seed=seed).report
        print(jsonlib.dumps({"seconds": report.seconds, "peak": report.peak_memory_mb}))
        return
    rows = []
    for name in networks.split(","):
        with tempfile.TemporaryDirectory() as cache:
            for state in ("empty", "warm"):
                figures = _compile(name, budget, seed, cache)
                seconds = figures["seconds"]
                passes = sorted(seconds.items(), key=lambda item: -item[1])
                rows.append(
                    {
                        "network": name,
                        "cost cache": state,
                        "seconds": seconds["total"],
                        "peak MB": figures["peak"],
                        **{f"{step} s": s for step, s in passes[1:5]},
                    }
                )
                publish("Compile time", rows[-1:], seed, Target(), None)
    publish(f"Compile time at latency budget {budget:g}, no tuning", rows, seed, Target(), json)


def _compile(name: str, budget: float, seed: int, cache: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", name, "--budget", str(budget), "--seed", str(seed)]
    environment = {**os.environ, "TDCOMPILE_CACHE": cache}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    figures: dict[str, Any] = jsonlib.loads(output.splitlines()[-1])
    return figures


if __name__ == "__main__":
    typer.run(main)
