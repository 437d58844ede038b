"""RENE's rank search: recovery of known ranks, effect of alternating steps, and one rank for each layer or for all.

The ablation with ``--data`` chooses every plan without data and therefore deterministically. Only the training samples
for the re-estimation of batch-norm statistics differ between seeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import Annotated, Any

import torch
import typer
from common import publish
from torch import nn

import tdcompile
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.network import Network
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import RankPlan, within
from tdcompile.core.registry import make
from tdcompile.data.loading import load_data
from tdcompile.data.metrics import accuracy
from tdcompile.data.task import Task
from tdcompile.errors import BudgetError, TdcompileError
from tdcompile.frontend.load_network import load_weights
from tdcompile.ir.program import Program, kept_dense, sites
from tdcompile.ir.target import Budget, Target
from tdcompile.passes.analyze._rene_ranks import SingleRanks

CHANNELS, LAYERS = 32, 4
SEARCHES = {
    "rene, alternating": "rene{{step=8,factor=8,budget=false,alternate=true{more}}}",
    "rene, simultaneous": "rene{{step=8,factor=8,budget=false,alternate=false{more}}}",
    "vbmf": "score,propose{{decompose=tucker2,grain=1,spectra=true}},choose{{by=vbmf}}",
    "energy 0.999": "score,propose{{decompose=tucker2,grain=1,spectra=true}},choose{{by=energy{{keep=0.999}}}}",
}


def main(
    seeds: Annotated[int, typer.Option(help="networks with known ranks; with --data, accuracies of each plan")] = 20,
    noise: Annotated[float, typer.Option(help="norm of the noise on a weight of norm 1")] = 0.01,
    steps: Annotated[str, typer.Option(help="of each refinement; the last for the ablation")] = "10,30,100",
    data: Annotated[str, typer.Option(help="parquet:DIR: also compare with one rank for all layers")] = "",
    weights: Annotated[Path | None, typer.Option(help="safetensors of the dense network")] = None,
    network: str = "resnet20",
    shares: Annotated[
        str, typer.Option(help="shares of the parameters, comma-separated")
    ] = "0.01,0.05,0.1,0.25,0.5,0.75",
    evaluate: Annotated[int, typer.Option(help="test images of each measurement")] = 10_000,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the table here")] = None,
) -> None:
    """Measure how often known ranks are found; with --data, compare a rank for each layer with one for all."""
    rows = [_known(name, text, seeds, noise, more) for name, text in SEARCHES.items() for more in _more(name, steps)]
    publish(f"Known ranks: {seeds} networks of {LAYERS} layers, noise {noise:g}", rows, seed, Target(), json)
    if not data:
        return
    train, test = load_data(data, (3, 32, 32), "imagenet", seed)
    module = make(Network, network).build()
    if weights is not None:
        load_weights(module, weights)
    program = tdcompile.trace(module, (torch.randn(2, 3, 32, 32),))
    program = program.with_(task=Task(train, test, source=data), seed=seed)
    found = [
        _against(name, plan, program.with_(budget=Budget(params=share)), share, seeds, evaluate)
        for share in map(float, shares.split(","))
        for name, plan in _plans(int(steps.split(",")[-1])).items()
    ]
    file = json and json.with_stem(f"{json.stem}_{network}")
    publish(f"A rank for each layer against one for all: {network}", found, seed, Target(), file)


def _more(name: str, steps: str) -> list[str]:
    return [f",steps={count}" for count in steps.split(",")] if name.startswith("rene") else [""]


def _known(name: str, text: str, seeds: int, noise: float, more: str) -> dict[str, Any]:
    """Return how often each layer's rank is the planted one."""
    exact, aside, seconds, failed = [], [], [], 0
    for seed in range(seeds):
        program, ranks = planted(seed, noise)
        begun = time.perf_counter()
        try:
            plan = Pipeline.parse(text.format(more=more)).run(program).facts[RankPlan]
        except TdcompileError:
            failed += 1
            continue
        seconds.append(time.perf_counter() - begun)
        for choice, rank in zip(plan.choices.values(), ranks, strict=True):
            found = [CHANNELS, CHANNELS] if choice.is_dense else choice.ranks
            aside += [abs(r - rank) for r in found]
            exact.append(all(r == rank for r in found))
    return {
        "search": name + more.replace(",", ", "),
        "layers right": sum(exact),
        "layers": len(exact),
        "mean distance": fmean(aside),
        "spread": pstdev(aside),
        "failed": failed,
        "seconds": fmean(seconds),
    }


def planted(seed: int, noise: float) -> tuple[Program, list[int]]:
    """Return convolutions whose weights have known Tucker-2 ranks, 2 to 12, and noise."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.randint(2, 13, (LAYERS,), generator=generator).tolist()
    layers: list[nn.Module] = []
    for rank in ranks:
        out, inner = (torch.randn(CHANNELS, rank, generator=generator) for _ in range(2))
        core = torch.randn(rank, rank, 3, 3, generator=generator)
        weight = torch.einsum("to,oikl,ci->tckl", out, core, inner)
        weight = weight / weight.norm() + noise * torch.randn(weight.shape, generator=generator) / weight.numel() ** 0.5
        conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        conv.weight = nn.Parameter(weight)
        layers += [conv, nn.ReLU()]
    program = tdcompile.trace(nn.Sequential(*layers).eval(), (torch.randn(2, CHANNELS, 6, 6),))
    return program.with_(budget=Budget(macs=1.0), seed=seed), ranks


def one_rank(program: Program) -> RankPlan:
    """Return the plan of the largest common rank that meets the budget, in the forms of ``rene``.

    A layer takes its full rank if that is smaller.

    Raises:
        BudgetError: rank 1 exceeds the budget.
    """
    found = sites(program)
    kept = kept_dense(program, found)
    known = [make(Decomposition, name) for name in ("tucker2", "svd")]
    forms = {
        name: form
        for name, site in found.items()
        if name not in kept
        if (form := next((form for form in known if form.refuse(site.layer) is None), None)) is not None
    }
    prices = SingleRanks(program, forms)
    most = {name: prices.most(name) for name in forms}
    every = ({name: min(rank, top) for name, top in most.items()} for rank in range(max(most.values()), 0, -1))
    ranks = next((one for one in every if within(prices.spent(one), prices.limits)), None)
    if ranks is None:
        raise BudgetError(f"there is no plan within {program.budget} of one rank for all layers")
    return prices.plan(ranks, kept, "one rank")


def by_text(text: str, program: Program) -> RankPlan:
    """Return the plan that a pipeline chooses."""
    return Pipeline.parse(text).run(program).facts[RankPlan]


def _plans(steps: int) -> dict[str, Callable[[Program], RankPlan]]:
    texts = {
        "one share of every layer's ranks": "score,propose{decompose=tucker2+svd,grain=1},choose{by=uniform}",
        "rene": f"rene{{steps={steps}}}",
        "rene, simultaneous": f"rene{{steps={steps},alternate=false}}",
    }
    return {"one rank for all layers": one_rank, **{name: partial(by_text, text) for name, text in texts.items()}}


def _against(
    name: str, plan: Callable[[Program], RankPlan], program: Program, share: float, seeds: int, evaluate: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"params kept": share, "ranks": name}
    begun = time.perf_counter()
    try:
        chosen = plan(program)
    except BudgetError as error:
        return {**row, "accuracy %": None, "why": str(error)}
    seconds = time.perf_counter() - begun
    made, repair = program.with_(facts=program.facts.having(chosen)), Pipeline.parse("recalibrate")
    made, found = Pipeline.parse("factorize").run(made), []
    for seed in range(program.seed, program.seed + seeds):
        right = accuracy(repair.run(made.with_(seed=seed)).graph, program.task.test, evaluate)
        assert right is not None  # the data has labels
        found.append(100 * right)
    return {
        **row,
        "params measured": chosen.predicted.params / chosen.dense.params,
        "MACs": chosen.predicted.macs / chosen.dense.macs,
        "sum of squared errors": sum(choice.error**2 for choice in chosen.choices.values()),
        "accuracy %": fmean(found),
        "spread": pstdev(found),
        "seconds": seconds,
    }


if __name__ == "__main__":
    typer.run(main)
