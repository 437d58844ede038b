"""Rank correlation of a predicted loss: Kendall's tau between prediction and accuracy over random plans."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from json import dumps, loads
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import publish, traced
from scipy.stats import kendalltau

from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import Candidates, Importances, RankPlan, decompositions_of
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.registry import make
from tdcompile.data.metrics import accuracy
from tdcompile.ir.program import Program
from tdcompile.ir.target import Budget, Target
from tdcompile.planning.allocation import LOSSES


def main(
    data: Annotated[str, typer.Option(help="parquet:DIR with the images")],
    weights: Annotated[Path, typer.Option(help="safetensors of the dense network")],
    network: str = "resnet20",
    shares: Annotated[str, typer.Option(help="shares of the MACs, comma-separated")] = "0.667,0.5,0.3125",
    plans: Annotated[int, typer.Option(help="random plans at each share")] = 20,
    scores: Annotated[str, typer.Option(help="scores, separated by ';'")] = "none;fisher;relative-error",
    losses: Annotated[str, typer.Option(help="losses of a relative error, comma-separated")] = "noise,squared,linear",
    after: Annotated[str, typer.Option(help="passes after factorize")] = "recalibrate",
    tune: Annotated[str, typer.Option(help="none, or options of finetune for a second measurement")] = "none",
    evaluate: Annotated[int, typer.Option(help="test images of each measurement")] = 10_000,
    seed: int = 0,
    kept: Annotated[
        Path | None,
        typer.Option(
            help="a file of what was measured so far, from which an interrupted run goes on; two may share it"
        ),
    ] = None,
    backwards: Annotated[bool, typer.Option(help="begin with the last plan, to meet another run half-way")] = False,
    json: Annotated[Path | None, typer.Option(help="also write the table here")] = None,
) -> None:
    """Judge predictions by accuracy; accuracy chooses no plan.

    A random plan is the knapsack's plan for random importances (log-normal, deviation 1.5) and half of the forms.
    """
    program, _, test = traced(network, weights, data, 0.5, seed)
    program = Pipeline.parse("calibrate,propose").run(program)
    scored = {}
    for score in scores.split(";"):
        begun = time.perf_counter()
        scored[score] = Pipeline.parse(f"score{{by={score}}}").run(program).facts[Importances].scores
        print(f"score {score}: {time.perf_counter() - begun:.1f} s", flush=True)
    known = _known(kept, settings := f"{network}, seed {seed}, {after}, {tune}, {evaluate} images")
    found: list[dict[str, Any]] = []
    for number in reversed(range(plans)) if backwards else range(plans):
        for share in map(float, shares.split(",")):
            plan = _random_plan(program, share, program.generator(f"plan/{share}/{number}"))
            key = f"{settings}, {share:g}, {number}, {_digest(plan)}"
            known |= _known(kept, settings) if key not in known else {}
            if key not in known:
                made = program.with_(facts=program.facts.having(plan))
                made = Pipeline.parse(f"factorize,{after}").run(made)
                known[key] = {"before": accuracy(made.graph, test, evaluate)}
                if tune != "none":
                    made = Pipeline.parse(f"finetune{{{tune}}}").run(made)
                    known[key]["tuned"] = accuracy(made.graph, test, evaluate)
                _keep(kept, key, known[key])
            found.append({"share": share, "plan": plan, **known[key]})
            print(f"{share:g} {number}: {known[key]}", flush=True)
    rows = [
        {"score": score, "loss": loss, **_taus(found, values, loss)}
        for score, values in scored.items()
        for loss in losses.split(",")
    ]
    publish(f"Kendall's tau of predicted loss and accuracy: {network}, {len(found)} plans", rows, seed, Target(), json)


def _known(kept: Path | None, settings: str) -> dict[str, dict[str, float | None]]:
    """Return the measurements of an earlier run with equal settings; an incomplete line is skipped."""
    if kept is None or not kept.exists():
        return {}
    lines = []
    for text in kept.read_text().splitlines():
        with suppress(ValueError):
            lines.append(loads(text))
    return {line["key"]: line["measured"] for line in lines if line["key"].startswith(settings)}


def _keep(kept: Path | None, key: str, measured: dict[str, float | None]) -> None:
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with kept.open("a") as file:  # starts a new line, because an interrupted run may have left an incomplete one
            file.write("\n" + dumps({"key": key, "measured": measured}) + "\n")


def _digest(plan: RankPlan) -> str:
    chosen = [(name, choice.form, choice.ranks) for name, choice in plan.choices.items()]
    return sha256(repr(chosen).encode()).hexdigest()[:16]


def _random_plan(program: Program, share: float, generator: torch.Generator) -> RankPlan:
    table = program.facts[Candidates]
    forms = sorted({option.form for options in table.layers.values() for option in decompositions_of(options)})
    some = {forms[i] for i in torch.randperm(len(forms), generator=generator)[: max(1, len(forms) // 2)]} | {"svd"}
    layers = {name: tuple(o for o in options if o.is_dense or o.form in some) for name, options in table.layers.items()}
    weights = torch.randn(len(layers), generator=generator).mul(1.5).exp().tolist()
    importances = dict(zip(layers, weights, strict=True))
    return make(RankSelector, "knapsack").select(replace(table, layers=layers), importances, Budget(macs=share))


def _taus(found: list[dict[str, Any]], scores: dict[str, float], loss: str) -> dict[str, Any]:
    """Return tau over all plans, and at each share, where plans differ only in the choice of layers and forms."""
    price = LOSSES[loss]

    def predicted(plan: RankPlan) -> float:
        return -sum(scores.get(name, 1.0) * price(choice.error) for name, choice in plan.choices.items())

    taus: dict[str, Any] = {}
    for moment in ("before", "tuned"):
        rows = [row for row in found if moment in row]
        if not rows:
            continue
        for share in [None, *dict.fromkeys(row["share"] for row in rows)]:
            some = [row for row in rows if share in (None, row["share"])]
            tau = kendalltau([predicted(row["plan"]) for row in some], [row[moment] for row in some]).statistic
            taus[f"{moment} {'all' if share is None else f'at {share:g}'}"] = float(tau)
    return taus


if __name__ == "__main__":
    typer.run(main)
