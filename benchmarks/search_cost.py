"""Cost of the search: seconds of each selector against layers and candidates, and on real networks."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import network, publish

import tdcompile
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import Candidate, Candidates, Spectrum
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.registry import find, make
from tdcompile.errors import BudgetError
from tdcompile.ir.target import Budget, Cost, Target
from tdcompile.planning.allocation import LOSSES


def main(
    layers: Annotated[str, typer.Option(help="numbers of layers, comma-separated")] = "20,200,2000",
    candidates: Annotated[str, typer.Option(help="candidates of a layer, comma-separated")] = "30,300",
    limit: Annotated[float, typer.Option(help="a selector that took longer is left out of larger tables, s")] = 60.0,
    networks: Annotated[str, typer.Option(help="reference networks, comma-separated; '' is none")] = (
        "resnet20,resnet56,resnet110,resnet18"
    ),
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the first table here")] = None,
) -> None:
    """Time the selectors on synthetic tables: CP and Tucker-2, randomly falling spectra, a budget of half the MACs."""
    slow: set[str] = set()
    rows = []
    for count in map(int, layers.split(",")):
        for each in map(int, candidates.split(",")):
            table = synthetic(count, each, seed)
            row: dict[str, Any] = {"layers": count, "candidates each": each}
            best = math.inf
            for name in sorted(find(RankSelector)):
                row[name] = None
                if name in slow:
                    continue
                begun = time.perf_counter()
                try:
                    plan = make(RankSelector, name).select(table, {}, Budget(macs=0.5))
                except BudgetError:  # rank estimates may not go low enough
                    continue
                row[name] = time.perf_counter() - begun
                loss = sum(LOSSES["noise"](choice.error) for choice in plan.choices.values())
                if name in ("knapsack", "lagrangian", "greedy"):
                    best = min(best, loss)
                    row[f"loss of {name}"] = loss
                if row[name] > limit:
                    slow.add(name)
            for name in ("knapsack", "lagrangian", "greedy"):
                if f"loss of {name}" in row:
                    row[f"loss of {name}"] /= best  # relative to the least loss of all selectors
            rows.append(row)
    publish("Seconds of a choice on synthetic tables; losses over the least", rows, seed, Target(), json)
    found: list[dict[str, Any]] = []
    for name in filter(None, networks.split(",")):
        found.append(_real(name, seed, rene=all((row["rene"] or 0) <= limit for row in found)))
    if found:
        file = json and json.with_stem(f"{json.stem}_networks")
        publish("Seconds of a search without data, half of the MACs", found, seed, Target(), file)


def synthetic(layers: int, candidates: int, seed: int) -> Candidates:
    """Return a table whose layers differ in size and in the decay of their spectra."""
    generator = torch.Generator().manual_seed(seed)
    rows, spectra = {}, {}
    for number in range(layers):
        size = float(1e5 * torch.rand((), generator=generator).mul(3).exp())
        decay = float(torch.rand((), generator=generator).mul(0.2).add(0.01))
        full = max(candidates // 2, 2)
        energies = torch.exp(-decay * 60 / full * torch.arange(full)).double()
        left = [*(energies.flip(0).cumsum(0).flip(0) / energies.sum()).tolist(), 0.0]
        options = [Candidate.dense(Cost(size, size, size, size * 1e-9))]
        for form, price, modes in (("tucker2", 1.1, ("out", "in")), ("cp", 0.9, ("",))):
            made = make(Decomposition, form)
            for r in range(1, full + 1):
                macs, error = price * size * r / full, math.sqrt(left[r])
                options.append(Candidate(made, (r,) * len(modes), error, Cost(macs, macs, macs, macs * 1e-9), modes))
        spectrum = Spectrum(tuple(energies.sqrt().tolist()), full, 9 * full)
        rows[f"layer{number}"], spectra[f"layer{number}"] = tuple(options), {"out": spectrum, "in": spectrum}
    return Candidates(rows, Cost(), spectra)


def _real(name: str, seed: int, rene: bool) -> dict[str, Any]:
    module, sample = network(name, seed)
    program = tdcompile.trace(module.eval(), (torch.cat([sample, sample]),)).with_(budget=Budget(macs=0.5), seed=seed)
    row: dict[str, Any] = {"network": name}
    begun = time.perf_counter()
    program = Pipeline.parse("score,propose").run(program)
    row["propose"] = time.perf_counter() - begun
    table = program.facts[Candidates]
    row |= {"layers": len(table.layers), "candidates": sum(map(len, table.layers.values()))}
    for choose in ("knapsack", "lagrangian", "greedy"):
        begun = time.perf_counter()
        Pipeline.parse(f"choose{{by={choose}}}").run(program)
        row[choose] = time.perf_counter() - begun
    begun = time.perf_counter()
    if rene:
        Pipeline.parse("rene").run(program)
    return {**row, "rene": time.perf_counter() - begun if rene else None}


if __name__ == "__main__":
    typer.run(main)
