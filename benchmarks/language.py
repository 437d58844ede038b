"""Compile a language model of 135 million parameters; its perplexity, and the seconds of each step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import publish
from real_networks import perplexity, smollm2, windows

import tdcompile
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.hooks import KeepBefore
from tdcompile.core.passes import Pass
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import Candidate, Candidates, Importances, RankPlan, decompositions_of, dense_of
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.registry import make
from tdcompile.ir.program import Program, sites
from tdcompile.ir.target import Target

FIRST = 20_000  # the token at which calibration begins; the perplexity is that of the first windows


class Watch(KeepBefore):
    """Keep the program before the plan is applied, and the processor seconds of each pass."""

    def __init__(self) -> None:
        super().__init__("factorize")
        self.seconds: dict[str, float] = {}
        self._begun = 0.0

    def started(self, step: Pass, position: int, of: int) -> None:
        """Read the clock."""
        self._begun = time.process_time()

    def finished(self, step: Pass, program: Program, seconds: float) -> None:
        """Keep the seconds."""
        self.seconds[step.name] = time.process_time() - self._begun


def main(
    shares: Annotated[str, typer.Option(help="comma-separated shares of the parameters in linear layers")] = "0.75,0.6",
    compiled: Annotated[float, typer.Option(help="share of all parameters at which the whole compilation runs")] = 0.8,
    count: Annotated[int, typer.Option(help="windows that calibrate")] = 256,
    length: Annotated[int, typer.Option(help="tokens of a window")] = 128,
    judges: Annotated[int, typer.Option(help="windows that judge")] = 24,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the table of perplexities here")] = None,
    steps: Annotated[Path | None, typer.Option(help="also write the table of seconds here")] = None,
) -> None:
    """Compile SmolLM2-135M-Instruct at a budget of parameters, and compare ways to choose ranks without repairs.

    The tied embedding stays dense, so that a share of all parameters is a smaller share of the linear layers.
    """
    torch.set_num_threads(1)
    network, test, train = smollm2(), windows(0, judges, length), windows(FIRST, count, length)
    watch, begun, wall = Watch(), time.process_time(), time.perf_counter()
    made = tdcompile.compile(
        network,
        torch.zeros(1, length, dtype=torch.long),
        data=tdcompile.Task(train=train, calibrate=count),
        watch=watch,
        budget={"params": compiled},
        decompose=("svd",),
        seed=seed,
    )
    whole, wall = time.process_time() - begun, time.perf_counter() - wall
    program = watch.program
    assert program is not None
    rows: list[dict[str, Any]] = [_row("dense", program, {}, perplexity(program.dense, test))]
    rows.append(_row("compiled", program, made.plan.choices, perplexity(made.module, test)))
    candidates, scores = program.facts[Candidates], program.facts[Importances].scores
    layers = sum(dense_of(options).cost.params for options in candidates.layers.values() if len(options) > 1)
    for share in map(float, shares.split(",")):
        budget = tdcompile.Budget(params=1 - (1 - share) * layers / candidates.dense.params)
        selector = make(RankSelector, "lagrangian")
        plans = {
            "one ratio for all layers": _one_ratio(program, share),
            "ranks by equal weights": selector.select(candidates, {}, budget).choices,
            "ranks by the score auto": selector.select(candidates, scores, budget).choices,
        }
        for name, choices in plans.items():
            rows.append(_row(f"whitened SVD, {name}", program, choices, _perplexity(program, choices, test)))
            print(rows[-1], flush=True)
    formats = {"perplexity": ".1f", "share of all parameters": ".3f", "share of linear layers": ".3f"}
    publish("Perplexity of SmolLM2-135M-Instruct, no training", rows, seed, Target(), json, formats)
    spent = [{"step": name, "CPU seconds": seconds} for name, seconds in watch.seconds.items()]
    rest = whole - sum(watch.seconds.values())
    spent += [{"step": "trace, final export, verification, measurement", "CPU seconds": rest}]
    spent += [{"step": "all", "CPU seconds": whole}]
    peak = made.report.peak_memory_mb
    title = f"Seconds to compile SmolLM2-135M-Instruct to a verified model ({wall:.0f} s elapsed, {peak:.0f} MB)"
    publish(title, spent, seed, Target(), steps, {"CPU seconds": ".1f"})


def _one_ratio(program: Program, share: float) -> dict[str, Candidate]:
    """Return whitened SVDs that each keep this share of the parameters of their layer (SVD-LLM, arXiv 2403.07378)."""
    form, found = make(Decomposition, "svd"), sites(program)
    choices = {}
    for name, options in program.facts[Candidates].layers.items():
        dense = choices[name] = dense_of(options)
        if decompositions_of(options):
            rank = int(share * found[name].weight.numel() / sum(found[name].weight.shape))
            cost = replace(dense.cost, params=rank * sum(found[name].weight.shape))
            choices[name] = Candidate(form, (rank,), 0.0, cost)
    return choices


def _perplexity(program: Program, choices: Mapping[str, Candidate], test: tdcompile.Samples) -> float:
    plan = replace(program.facts[RankPlan], choices=choices)
    planned = program.with_(facts=program.facts.having(plan))
    return perplexity(Pipeline.parse("factorize").run(planned).graph, test)


def _row(name: str, program: Program, choices: Mapping[str, Candidate], found: float) -> dict[str, Any]:
    candidates = program.facts[Candidates]
    free = {name for name, options in candidates.layers.items() if len(options) > 1}
    dense = {name: dense_of(candidates.layers[name]).cost.params for name in free}
    kept = sum(choices[name].cost.params if name in choices else dense[name] for name in free)
    whole = candidates.dense.params
    return {
        "network": name,
        "share of all parameters": (whole - sum(dense.values()) + kept) / whole,
        "share of linear layers": kept / sum(dense.values()),
        "perplexity": found,
    }


if __name__ == "__main__":
    typer.run(main)
