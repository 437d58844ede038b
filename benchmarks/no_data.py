"""Accuracy of a network compiled without data, on synthetic samples and on real ones; and of int8 with their ranges."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import percent, publish, trained

import tdcompile
from tdcompile.backend.deployment import sample_activations, write_deployed
from tdcompile.backend.evaluation import evaluate
from tdcompile.backend.lowering import lower
from tdcompile.backend.verified_export import export_verified
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.hooks import RunRecord, StepTimer
from tdcompile.core.pipeline import Pipeline, fine_tuner
from tdcompile.core.plan import Candidate, RankPlan
from tdcompile.core.registry import make
from tdcompile.data.task import Samples, Task, Tensors
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.program import Program, sites
from tdcompile.ir.target import Budget, Target
from tdcompile.planning.synthetic_data import BringSamples, makers

PLAN = "calibrate,score{by=none},propose,choose,factorize"  # scores by labels would tell the data apart


def main(
    data: Annotated[str, typer.Option(help="parquet:DIR with the images")],
    weights: Annotated[Path, typer.Option(help="safetensors of the dense network")],
    network: str = "resnet20",
    macs: Annotated[float, typer.Option(help="share of the MACs to keep")] = 0.5,
    ranks: Annotated[
        float | None,
        typer.Option(help="instead of a budget, every convolution as `channel` at this share of its break-even rank"),
    ] = None,
    real: Annotated[str, typer.Option(help="numbers of real training images, one row each")] = "64,256",
    tune: Annotated[str, typer.Option(help="none, or options of finetune")] = "epochs=50,batch=32,lr=0.005",
    images: Annotated[int, typer.Option(help="test images")] = 10_000,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the table here")] = None,
) -> None:
    """Compile with each kind of training samples at one budget; judge all on the same real test images."""
    module, train, test = trained(network, weights, data, seed)
    assert train is not None
    assert test is not None
    order = train.shuffled(torch.Generator().manual_seed(seed))
    tasks = {"weights alone": Task(), "synthetic": Task(synthetic="synthesize", source="synthetic")}
    tasks |= {f"real, {count} images": Task(_unlabelled(order, int(count))) for count in real.split(",")}
    program = tdcompile.trace(module, (torch.randn(2, 3, 32, 32),)).with_(budget=Budget(macs=macs), seed=seed)
    judges, rows = test.subset(range(min(images, len(test)))), list[dict[str, Any]]()
    dense = {"dense %": _correct(program, judges)}
    for title, task in tasks.items():
        rows.append({"training samples": title} | dense | _row(program.with_(task=task), judges, tune, ranks))
        asked = f"macs={macs:g}" if ranks is None else f"{ranks:g} of the break-even ranks"
        name = f"{network} on CIFAR-10 at {asked}, by the samples it is compiled with"
        publish(name, rows, seed, Target(), json)  # after each row: the whole table takes a quarter of an hour


def _row(program: Program, judges: Samples, tune: str, ranks: float | None) -> dict[str, Any]:
    record = RunRecord()
    hooks = [BringSamples(), StepTimer(record)]
    program = Pipeline(makers(program.task)).run(program, hooks)
    factors = Pipeline.parse(PLAN).run(program, hooks) if ranks is None else at_break_even(program, ranks)
    row: dict[str, Any] = {
        "factors %": _correct(factors, judges),
        "refitted %": None,
        "tuned %": None,
        "dense int8 %": None,
        "seconds to make samples": record.seconds.get("synthesize"),
    }
    if program.task.train is None:
        return row
    refitted = Pipeline.parse("recalibrate,refit").run(factors, hooks)
    tuned = None if tune == "none" else Pipeline([fine_tuner(tune)]).run(refitted, hooks)
    return row | {
        "refitted %": _correct(refitted, judges),
        "tuned %": None if tuned is None else _correct(tuned, judges),
        "dense int8 %": _int8(program, judges),
    }


def at_break_even(program: Program, share: float) -> Program:
    """Return the program with every convolution as ``channel`` at a share of its break-even rank TN / (T + N).

    T are its outputs and N the inputs of one of them; at that rank both factors have as many weights as the layer.
    """
    form, choices = make(Decomposition, "channel"), dict[str, Candidate]()
    for name, site in sites(program).items():
        if site.layer.kind == "conv" and form.refuse(site.layer) is None:
            rows, columns = site.weight.shape[0], site.weight[0].numel()
            choices[name] = Candidate(form, (max(1, round(share * rows * columns / (rows + columns))),))
    program = Pipeline.parse("calibrate").run(program)
    return Pipeline.parse("factorize").run(program.with_(facts=program.facts.having(RankPlan(choices))))


def _unlabelled(samples: Samples, count: int) -> Tensors:
    return Tensors(samples.batch(range(count)).inputs)


def _correct(program: Program, judges: Samples) -> float | None:
    """Return the accuracy of the graph in percent."""
    right = 0
    for batch in judges.batches(250):
        assert batch.targets is not None  # the test images have classes
        right += int((outputs_of(program.graph, batch.inputs)[0].argmax(1) == batch.targets).sum())
    return percent(right / len(judges))


def _int8(program: Program, judges: Samples) -> float | None:
    """Return the accuracy of the dense network in int8, in onnxruntime, with ranges from the training samples."""
    with tempfile.TemporaryDirectory(prefix="tdcompile-") as folder:
        dense, path = Path(folder) / "dense.onnx", Path(folder) / "int8.onnx"
        export_verified(program, lower(program, program.dense), dense)
        write_deployed(program, dense, path, "int8", sample_activations(program, dense))
        (found,) = evaluate(dense, [path], judges, program.with_(task=Task(test=judges)))  # only these have classes
    return percent(found.compiled_score)


if __name__ == "__main__":
    typer.run(main)
