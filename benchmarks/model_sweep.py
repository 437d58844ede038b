"""Networks that nobody wrote for tdcompile, each compiled, exported and verified: what works, what does not, why."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import zoo
from common import publish

import tdcompile
from tdcompile.compiler import Compiled
from tdcompile.errors import InputError, TdcompileError
from tdcompile.network import Network
from tdcompile.registry import find
from tdcompile.target import Target


def main(
    only: Annotated[str, typer.Option(help="networks whose names contain one of these, comma-separated")] = "",
    sources: Annotated[str, typer.Option(help="of: transformers, models, torchvision, timm")] = "transformers,models",
    budget: Annotated[str, typer.Option(help="e.g. macs=0.6")] = "macs=0.6",
    frontend: Annotated[str, typer.Option(help="auto, fx or export")] = "auto",
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the table here")] = None,
) -> None:
    """Random weights: what is tested is that a network compiles and stays right, not how accurate it is.

    Every model is run in onnxruntime against its PyTorch network at batches of 1, 2 and 5.
    """
    limit = dict([budget.split("=")])
    rows = []
    for name, build in _networks(sources.split(",")):
        if not any(part in name for part in only.split(",")):
            continue
        begun = time.perf_counter()
        row: dict[str, Any] = {"network": name}
        try:
            torch.manual_seed(seed)
            module, inputs = build()
            compiled = tdcompile.compile(
                module.eval(),
                inputs,
                budget={key: float(share) for key, share in limit.items()},
                frontend=frontend,
                seed=seed,
            )
            row |= {"outcome": "compiled", **_row(compiled)}
        except TdcompileError as error:
            kind = "refused" if isinstance(error, InputError) else "failed"
            row |= {"outcome": kind, "why": f"{type(error).__name__}: {error}"}
        except Exception as error:  # noqa: BLE001  # what is not our own error is a defect, and a row of the table
            row |= {"outcome": "crashed", "why": f"{type(error).__name__}: {str(error).splitlines()[:1]}"}
        row["seconds"] = time.perf_counter() - begun
        rows.append(row)
        print({key: f"{v:.3g}" if isinstance(v, float) else v for key, v in row.items()}, flush=True)
    counts = Counter(row["outcome"] for row in rows)
    title = f"{len(rows)} networks at {budget}: " + ", ".join(f"{count} {what}" for what, count in counts.items())
    publish(title, rows, seed, Target(), json)


def _networks(sources: list[str]) -> Iterator[tuple[str, Any]]:
    if "models" in sources:
        for name, network in find(Network).items():
            made = network()
            yield (
                f"models/{name}",
                lambda made=made: (made.build(), tuple(torch.randn(1, *s) for s in made.input_shapes)),
            )
    for source in sources:
        if source != "models":
            yield from ((f"{source}/{name}", build) for name, build in zoo.ZOOS[source]())


def _row(compiled: Compiled) -> dict[str, Any]:
    report = compiled.report
    dense = [layer for layer in report.layers if layer.decomposition == "dense"]
    reasons = Counter(layer.refusal.code if layer.refusal else "?" for layer in dense)
    return {
        "front end": report.frontend,
        "layers": len(report.layers),
        "rewritten": len(report.layers) - len(dense),
        "left dense": ", ".join(f"{count} {code}" for code, count in reasons.most_common()) or "–",
        "MACs dense / compiled": report.ratio.macs,
        "latency dense / compiled": report.ratio.latency,
        "parity": report.parity.max_rel,
    }


if __name__ == "__main__":
    typer.run(main)
