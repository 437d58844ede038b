"""Latency under ``--budget latency=…``: measured, predicted, and the share of saved MACs that became saved time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from common import network, publish

import tdcompile
from tdcompile.backend.session import time_models
from tdcompile.ir.target import Target


def main(
    networks: Annotated[str, typer.Option(help="comma-separated names of reference networks")] = (
        "resnet18,resnet50,vgg16"
    ),
    budget: Annotated[float, typer.Option(help="share of the dense latency that may be kept")] = 0.5,
    threads: int = 1,
    repeat: Annotated[int, typer.Option(help="interleaved measurements of each pair of models")] = 3,
    seconds: Annotated[float, typer.Option(help="length of one measurement")] = 6.0,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the table here")] = None,
) -> None:
    """Compile each network without data; time it and its dense original alternately and report medians."""
    target, rows = Target(threads=threads), []
    for name in networks.split(","):
        module, sample = network(name, seed)
        compiled = tdcompile.compile(module, sample, budget={"latency": budget}, threads=threads, seed=seed)
        models = [compiled.folder / "dense.onnx", compiled.onnx]
        rounds = [time_models(models, [sample], target, seconds=seconds) for _ in range(repeat)]
        shares = sorted(1 / after.speedup.value for _, after in rounds)
        noise = time_models([models[0], models[0]], [sample], target, seconds=seconds)
        share, report = shares[len(shares) // 2], compiled.report
        dense_ms = sorted(before.median for before, _ in rounds)[len(rounds) // 2] * 1e3
        predicted = compiled.plan.predicted.seconds / compiled.plan.dense.seconds
        rows.append(
            {
                "network": name,
                "dense ms": dense_ms,
                "compiled ms": dense_ms * share,
                "share measured": share,
                "lowest and highest": [shares[0], shares[-1]],
                "dense against itself": 1 / noise[1].speedup.value,
                "MACs dense / compiled": report.ratio.macs,
                "realised": 1 / share / report.ratio.macs,
                "predicted / measured": predicted / share,
                "replaced": sum(layer.decomposition != "dense" for layer in report.layers),
                "layers": len(report.layers),
                "rounds in graph": len(report.iterations),
            }
        )
        publish(f"Latency at budget {budget:g}", rows[-1:], seed, target, None)
    publish(f"Latency at budget {budget:g}, batch 1", rows, seed, target, json)


if __name__ == "__main__":
    typer.run(main)
