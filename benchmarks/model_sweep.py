"""Compile, export and verify networks from other libraries; report each outcome and its reason."""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import zoo
from common import publish
from results import Table
from torch import nn

import tdcompile
from tdcompile.compiler import Compiled
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.network import Network
from tdcompile.core.plan import Candidates, RankPlan, decompositions_of
from tdcompile.core.registry import find
from tdcompile.errors import BudgetError, InputError, TdcompileError
from tdcompile.frontend.select import Frontend
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.target import Budget, Cost, Target

Build = Callable[[], zoo.Built]


_FORMATS = {
    "MACs dense / compiled": ".2f",
    "latency dense / compiled": ".2f",
    "parity": ".0e",
    "full ranks": ".0e",
    "seconds": ".0f",
}
# Allowed difference of a network from its original at full ranks.
IDENTITY = 1e-4
# Forms fitted by iteration: their exact ranks only approximate the layer.
ITERATED = ("cp", "cp4")
# Budgets in the order tried: the next one if a budget is out of reach, as in mostly depthwise networks.
SHARES = (0.6, 0.8, 0.95)


def main(
    only: Annotated[str, typer.Option(help="networks whose names contain one of these, comma-separated")] = "",
    sources: Annotated[str, typer.Option(help="of: transformers, models, torchvision, timm")] = "transformers,models",
    frontend: Annotated[Frontend, typer.Option(help="auto, fx or export")] = "auto",
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the table here; rows of other networks stay")] = None,
) -> None:
    """Test with random weights that a network compiles and stays correct; accuracy is not measured.

    onnxruntime runs every model at batches of 1, 2 and 5 and is compared with the PyTorch network.
    """
    known = Table.read(json).records() if json is not None and json.is_file() else []
    rows: dict[str, dict[str, Any]] = {str(row["network"]): row for row in known}
    for name, build in _networks(sources.split(",")):
        if not any(part in name for part in only.split(",")):
            continue
        begun = time.perf_counter()
        rows[name] = {"network": name, **_tried(build, frontend, seed), "seconds": time.perf_counter() - begun}
        print({key: f"{v:.3g}" if isinstance(v, float) else v for key, v in rows[name].items()}, flush=True)
    counts = Counter(row["outcome"] for row in rows.values())
    title = f"{len(rows)} networks: " + ", ".join(f"{count} {what}" for what, count in counts.most_common())
    publish(title, list(rows.values()), seed, Target(), json, _FORMATS)


def _tried(build: Build, frontend: Frontend, seed: int) -> dict[str, Any]:
    for share in SHARES:
        try:
            torch.manual_seed(seed)
            module, inputs = build()
            made = tdcompile.compile(module.eval(), inputs, budget={"macs": share}, frontend=frontend, seed=seed)
            full = _at_full_ranks(module, inputs, frontend, seed)
            outcome = "compiled" if full <= IDENTITY else "failed"
            why = f"at full ranks its outputs differ by {full:.1e} of the largest"
            return {"outcome": outcome, "why": why, "budget": f"macs={share}", **_row(made), "full ranks": full}
        except BudgetError as error:
            refused = {"outcome": "refused", "why": f"{type(error).__name__}: {error}"}
        except TdcompileError as error:
            kind = "refused" if isinstance(error, InputError) else "failed"
            return {"outcome": kind, "why": f"{type(error).__name__}: {error}"}
        except Exception as error:  # noqa: BLE001  # an error of another class is a defect and becomes a row
            return {"outcome": "crashed", "why": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    return refused


def _at_full_ranks(module: nn.Module, inputs: Any, frontend: Frontend, seed: int) -> float:
    """Return the largest relative difference of outputs after each layer takes a random form at exact ranks."""
    program = tdcompile.trace(module, inputs, frontend=frontend).with_(budget=Budget(macs=1.0))
    forms = "+".join(form for form in find(Decomposition) if form not in ITERATED)
    program = tdcompile.Pipeline.parse(f"propose{{decompose={forms},grain={sys.maxsize}}}").run(program)
    draw = random.Random(seed)
    choices = {
        name: draw.choice(decompositions_of(options) or options)
        for name, options in program.facts[Candidates].layers.items()
    }
    program = program.with_(facts=program.facts.having(RankPlan(choices, Cost(), Cost())))
    after = tdcompile.Pipeline.parse("factorize").run(program)
    worst = 0.0
    outputs = [outputs_of(graph, program.inputs) for graph in (after.graph, program.dense)]
    for ours, theirs in zip(*outputs, strict=True):
        seen = torch.isfinite(theirs)
        if theirs.is_floating_point() and seen.any():
            most = (ours - theirs)[seen].abs().max() / theirs[seen].abs().max().clamp_min(1e-3)
            worst = worst if float(most) <= worst else float(most)  # ``max`` would lose NaN
    return worst


def _networks(sources: list[str]) -> Iterator[tuple[str, Build]]:
    for source in sources:
        if source != "models":
            yield from ((f"{source}/{name}", build) for name, build in zoo.ZOOS[source]())
    if "models" in sources:
        yield from ((f"models/{name}", partial(_own, network())) for name, network in find(Network).items())


def _own(network: Network) -> zoo.Built:
    return network.build(), tuple(torch.randn(1, *shape) for shape in network.input_shapes)


def _row(compiled: Compiled) -> dict[str, Any]:
    report = compiled.report
    dense = [layer for layer in report.layers if layer.decomposition == "dense"]
    reasons = Counter(layer.refusal.code if layer.refusal else "?" for layer in dense)
    return {
        "front end": report.frontend,
        "layers": len(report.layers),
        "rewritten": len(report.layers) - len(dense),
        "left dense": ", ".join(f"{count} {code}" for code, count in reasons.most_common()) or None,
        "MACs dense / compiled": report.ratio.macs,
        "latency dense / compiled": report.ratio.latency,
        "parity": report.parity.max_rel,
    }


if __name__ == "__main__":
    typer.run(main)
