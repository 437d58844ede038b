"""Rank correlation of a predicted loss: Kendall's tau between prediction and measurement over random plans.

In int8 each plan is exported, quantised and run in onnxruntime: the file is judged, not its PyTorch graph.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
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

from tdcompile.backend.deployment import sample_activations, write_deployed
from tdcompile.backend.evaluation import evaluate as compare
from tdcompile.backend.lowering import export_lowered
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import Candidate, Candidates, Importances, RankPlan, decompositions_of
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.registry import make
from tdcompile.data.metrics import accuracy
from tdcompile.data.task import Samples
from tdcompile.errors import BudgetError
from tdcompile.ir.measurements import input_covariance
from tdcompile.ir.program import Program, sites
from tdcompile.ir.target import Budget, Precision, Target
from tdcompile.planning.allocation import LOSSES
from tdcompile.planning.quantization_error import quantization_error

Errors = Callable[[str, Candidate], float]  # of a layer's output, by the layer's name and its choice
_MOMENTS = ("before", "tuned", "outputs")  # what is measured: accuracy twice, and the error of the outputs with a minus


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
    precision: Annotated[str, typer.Option(help="fp32 or int8; int8 trains nothing")] = "fp32",
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
    if precision == "int8" and tune != "none":
        raise typer.BadParameter("--tune trains in fp32: leave it out in int8")
    program = program.with_(target=Target(precision=_precision(precision)))
    program = Pipeline.parse("calibrate,propose").run(program)
    scored = {}
    for score in scores.split(";"):
        begun = time.perf_counter()
        scored[score] = Pipeline.parse(f"score{{by={score}}}").run(program).facts[Importances].scores
        print(f"score {score}: {time.perf_counter() - begun:.1f} s", flush=True)
    rounded = ", int8" if precision == "int8" else ""
    scratch = tempfile.TemporaryDirectory()
    dense = Path(scratch.name) / "dense.onnx"
    known = _known(kept, settings := f"{network}, seed {seed}, {after}, {tune}, {evaluate} images{rounded}")
    found: list[dict[str, Any]] = []
    for number in reversed(range(plans)) if backwards else range(plans):
        for share in map(float, shares.split(",")):
            plan = _random_plan(program, share, program.generator(f"plan/{share}/{number}"))
            key = f"{settings}, {share:g}, {number}, {_digest(plan)}"
            known |= _known(kept, settings) if key not in known else {}
            if key not in known:
                made = program.with_(facts=program.facts.having(plan))
                made = Pipeline.parse(f"factorize,{after}").run(made)
                known[key] = (
                    _int8(made, dense, test, evaluate) if rounded else {"before": accuracy(made.graph, test, evaluate)}
                )
                if tune != "none":
                    made = Pipeline.parse(f"finetune{{{tune}}}").run(made)
                    known[key]["tuned"] = accuracy(made.graph, test, evaluate)
                _keep(kept, key, known[key])
            found.append({"share": share, "plan": plan, **known[key]})
            print(f"{share:g} {number}: {known[key]}", flush=True)
    rows = [
        {"score": score, "loss": loss, **({"error": title} if rounded else {}), **_taus(found, values, loss, errors)}
        for score, values in scored.items()
        for loss in losses.split(",")
        for title, errors in (_parts(program) if rounded else {"": _error}).items()
    ]
    what = "measurement of int8 models" if rounded else "accuracy"
    publish(f"Kendall's tau of predicted loss and {what}: {network}, {len(found)} plans", rows, seed, Target(), json)


def _precision(text: str) -> Precision:
    if text not in ("fp32", "int8"):
        raise typer.BadParameter(f"--precision is fp32 or int8, not {text}")
    return "int8" if text == "int8" else "fp32"


def _int8(program: Program, dense: Path, test: Samples | None, count: int) -> dict[str, float | None]:
    """Return accuracy of a plan's int8 model, and the relative error of its outputs, less than nothing: more is better.

    Args:
        program: with the factors of the plan.
        dense: the dense model in fp32, the reference; it is exported if it is not there. Both run in onnxruntime.
        test: the samples.
        count: number of them.
    """
    if not dense.is_file():
        export_lowered(program, program.dense, dense, simplify=False)
    floats, path = dense.with_name("fp32.onnx"), dense.with_name("int8.onnx")
    export_lowered(program, program.graph, floats, simplify=False)
    write_deployed(program, floats, path, "int8", sample_activations(program, floats))
    (found,) = compare(dense, [path], test, program, count)
    return {"before": found.compiled_score, "outputs": -found.outputs[0].relative_error}


def _error(_: str, choice: Candidate) -> float:
    return choice.error


def _parts(program: Program) -> Mapping[str, Errors]:
    """Return the errors that an int8 candidate is made of: of the approximation, of int8, and both together."""
    layers = sites(program)

    def int8(name: str, choice: Candidate) -> float:
        site = layers[name]
        parts = len(choice.decomposition.blueprint(site.layer, choice.ranks))
        return quantization_error(site.weight, input_covariance(program.facts, name, site.weight), parts)

    def low_rank(name: str, choice: Candidate) -> float:
        return math.sqrt(max(choice.error**2 - int8(name, choice) ** 2, 0.0))

    return {"low rank and int8": _error, "low rank": low_rank, "int8": int8}


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
    weights = torch.randn(len(table.layers), generator=generator).mul(1.5).exp().tolist()
    importances = dict(zip(table.layers, weights, strict=True))

    def plan(allowed: Collection[str]) -> RankPlan:
        layers = {n: tuple(o for o in own if o.is_dense or o.form in allowed) for n, own in table.layers.items()}
        return make(RankSelector, "knapsack").select(replace(table, layers=layers), importances, Budget(macs=share))

    try:
        made = plan(some)
    except BudgetError:  # int8 has fewer ranks: half of the forms may not reach the share
        made = plan(forms)
    return replace(made, precision=table.precision)


def _taus(found: list[dict[str, Any]], scores: Mapping[str, float], loss: str, errors: Errors) -> dict[str, Any]:
    """Return tau over all plans, and at each share, where plans differ only in the choice of layers and forms."""
    price = LOSSES[loss]

    def predicted(plan: RankPlan) -> float:
        return -sum(scores.get(name, 1.0) * price(errors(name, choice)) for name, choice in plan.choices.items())

    taus: dict[str, Any] = {}
    for moment in _MOMENTS:
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
