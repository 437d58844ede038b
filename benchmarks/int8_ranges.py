"""The accuracy of a dense network in int8 over draws of calibration samples, with and without bias correction.

One draw tells little: which samples give the ranges moves the accuracy of ResNet-56 by 0.1 points or more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from common import publish, trained
from numpy.typing import NDArray

import tdcompile
from tdcompile.backend.bias_correction import input_means
from tdcompile.backend.deployment import MEAN_SAMPLES, Activations, write_deployed
from tdcompile.backend.evaluation import evaluate
from tdcompile.backend.lowering import lower
from tdcompile.backend.quantize import activation_ranges
from tdcompile.backend.verified_export import export_verified
from tdcompile.data.task import Samples, Task
from tdcompile.ir.target import Target

_BATCH = 32


def main(
    data: Annotated[str, typer.Option(help="parquet:DIR with CIFAR-10")],
    weights: Annotated[Path, typer.Option(help="folder of NETWORK_cifar10.safetensors")],
    networks: str = "resnet20,resnet56",
    counts: Annotated[str, typer.Option(help="training samples that give the ranges, comma-separated")] = "64,256,1024",
    draws: Annotated[int, typer.Option(help="disjoint draws of the samples for each count")] = 6,
    evaluate: Annotated[int, typer.Option(help="test images")] = 10_000,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the table here")] = None,
) -> None:
    """Quantise the dense network with the ranges of each draw, and run all models in onnxruntime on the same images."""
    rows: list[dict[str, Any]] = []
    for name in networks.split(","):
        for count in map(int, counts.split(",")):
            rows += measured(name, weights, data, count, draws, evaluate, seed)
            publish("Int8 alone over draws of calibration samples", rows, seed, Target(), json)


def measured(
    name: str, weights: Path, data: str, count: int, draws: int, images: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one network and number of samples: biases as they are, and corrected."""
    module, train, test = trained(name, weights / f"{name}_cifar10.safetensors", data, seed)
    assert train is not None
    assert test is not None
    program = tdcompile.trace(module, (torch.randn(2, 3, 32, 32),)).with_(task=Task(train, test, source=data))
    order = train.shuffled(torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory(prefix="tdcompile-") as folder:
        dense, models = Path(folder) / "dense.onnx", dict[tuple[bool, int], Path]()
        export_verified(program, lower(program, program.dense), dense)
        for draw in range(draws):
            first = draw * count
            ranges = activation_ranges(dense, _batches(order, first, count))
            means = input_means(dense, _batches(order, first, min(count, MEAN_SAMPLES)))
            for corrected in (False, True):
                path = models[corrected, draw] = Path(folder) / f"{draw}-{corrected}.onnx"
                write_deployed(program, dense, path, "int8", Activations(ranges, means if corrected else {}))
        judges = test.subset(range(min(images, len(test))))
        found = dict(zip(models, evaluate(dense, list(models.values()), judges, program), strict=True))
    for corrected in (False, True):
        each = [judged for (biases, _), judged in found.items() if biases is corrected]
        lost = [100 * (judged.dense_score - judged.compiled_score) for judged in each]  # type: ignore[operator]
        yield {
            "network": name,
            "samples": count,
            "draws": draws,
            "biases": "corrected" if corrected else "as they are",
            "fp32 %": 100 * (each[0].dense_score or 0.0),
            "points lost, mean": round(fmean(lost), 3),
            "least": round(min(lost), 2),
            "most": round(max(lost), 2),
            "relative error %": 100 * fmean(judged.outputs[0].relative_error for judged in each),
        }


def _batches(samples: Samples, first: int, count: int) -> Iterator[list[NDArray[Any]]]:
    for start in range(first, first + count, _BATCH):
        stop = min(start + _BATCH, first + count)
        yield [x.numpy() for x in samples.batch(range(start, stop)).inputs]


if __name__ == "__main__":
    typer.run(main)
