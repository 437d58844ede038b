"""Peers at equal latency: channel pruning then int8, int8 alone, and tdcompile in int8, measured in one run.

Torch-Pruning is no dependency: `pip install --no-deps --target DIR torch-pruning` installs it beside the project; put
DIR into PYTHONPATH. Without it its row is left out. Peers are quantised by `onnxruntime.quantization.quantize_static`.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import torch
import typer
from common import percent, publish, trained
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from results import Table
from torch import nn

import tdcompile
from tdcompile.backend.evaluation import evaluate
from tdcompile.backend.export import export_onnx
from tdcompile.backend.quantized_form import has_vnni
from tdcompile.backend.session import Timing, time_models
from tdcompile.compiler import Compiled
from tdcompile.core.pipeline import Pipeline
from tdcompile.data.task import Samples, Task
from tdcompile.errors import BudgetError
from tdcompile.ir.program import Program
from tdcompile.ir.target import Target
from tdcompile.support.quiet import captured_output

DENSE, INT8, PRUNED, OURS = "dense fp32", "onnxruntime int8", "Torch-Pruning, then int8", "tdcompile int8"
RATIOS = tuple(place / 16 for place in range(1, 13))  # shares of the channels that are pruned
ALIKE = 0.02  # relative difference of latencies that counts as none: two runs of one model differ by about as much
_RANGES = 256  # training samples that give the ranges, as in tdcompile
_PADDED = ("resnet20", "resnet56")  # their shortcuts pad channels with zeros, which only inner channels leave right


@dataclass(frozen=True)
class Bench:
    """One network, with what its models are measured by.

    Attributes:
        program: the traced dense network, its data and target.
        padded: only the inner channels of residual blocks can be pruned.
        folder: for the models.
    """

    module: nn.Module
    program: Program
    train: Samples
    padded: bool
    folder: Path


def main(
    json: Annotated[Path, typer.Option(help="the table; rows in it are kept and continued")],
    data: Annotated[str, typer.Option(help="parquet:DIR with CIFAR-10")],
    weights: Annotated[Path, typer.Option(help="folder of NETWORK_cifar10.safetensors")],
    networks: str = "resnet20,resnet56,resnet18_cifar",
    times: Annotated[float, typer.Option(help="speed over int8 dense to ask for")] = 1.15,
    tune: Annotated[str, typer.Option(help="none, or options of finetune, for the pruned network too")] = "none",
    evaluate: Annotated[int, typer.Option(help="test images")] = 10_000,
    seed: int = 0,
) -> None:
    """Ask tdcompile for a latency, prune until the pruned network in int8 is as fast, and compare accuracy."""
    rows = list(Table.read(json).records()) if json.is_file() else []
    for name in networks.split(","):
        module, train, test = trained(name, weights / f"{name}_cifar10.safetensors", data, seed)
        assert train is not None
        program = tdcompile.trace(module, (torch.randn(1, 3, 32, 32),))
        program = program.with_(task=Task(train, test, source=data), seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(module, program, train, name in _PADDED, Path(folder))
            found = list(measured(bench, times, tune, evaluate))
        own = [{"network": name, "tune": tune, **row} for row in found]
        rows = [row for row in rows if (row["network"], row["tune"]) != (name, tune)] + own
        publish("Peers at equal latency", rows, seed, Target(), json)


def measured(bench: Bench, times: float, tune: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each model: latencies in one run, accuracy of the files in onnxruntime."""
    dense = exported(bench.module, bench, "dense")
    alone = static_int8(dense, bench)
    share = 1 / timed(bench, [dense, alone])[1].speedup.value
    made = compiled(bench, share, times, tune)
    paths = {DENSE: dense, INT8: alone, OURS: made.onnx}
    pruned = pruned_to(bench, made.onnx, tune)
    if pruned is not None:
        paths[PRUNED] = pruned
    timings = dict(zip(paths, timed(bench, list(paths.values())), strict=True))
    others = evaluate(dense, list(paths.values())[1:], bench.program.task.test, bench.program, count)
    scores = {
        DENSE: others[0].dense_score,
        **dict(zip(list(paths)[1:], (o.compiled_score for o in others), strict=True)),
    }
    best = winner({name: one.median for name, one in timings.items()}, scores)
    for name, path in paths.items():
        yield {
            "model": name,
            "ms": 1000 * timings[name].median,
            "over fp32 dense": timings[name].speedup.value,
            "MB": path.stat().st_size / 1e6,
            "accuracy %": percent(scores[name]),
            "best at tdcompile's latency": name == best,
        }


def compiled(bench: Bench, share: float, times: float, tune: str) -> Compiled:
    """Compile to int8 at a speed over int8 alone; where no plan reaches it, at the latency of int8 alone, or as it is.

    At the latency of the dense fp32 network every layer stays dense, which is int8 alone with what tdcompile adds.

    Args:
        bench: the network.
        share: latency of int8 alone over that of the dense fp32 model.
        times: the speed to ask for.
        tune: none, or options of finetune.
    """
    for wanted in (share / times, share, 1.0):
        try:
            return tdcompile.compile(
                bench.module,
                bench.program.inputs,
                data=bench.program.task,
                precision="int8",
                budget={"latency": min(wanted, 1.0)},
                tune=tune,
                seed=bench.program.seed,
                max_drop=100.0,  # the quality is a figure here, not a gate
            )
        except BudgetError as error:
            print(f"latency={wanted:.3f}: {error}", flush=True)
            told = error
    raise told


def timed(bench: Bench, paths: Sequence[Path]) -> list[Timing]:
    """Time models in turn, on one thread, by its processor time."""
    return time_models(paths, bench.program.inputs, Target())


def winner(seconds: Mapping[str, float], scores: Mapping[str, float | None]) -> str:
    """Return the most accurate of the models that are as fast as tdcompile's, or faster; the fastest of equal ones."""
    limit = seconds[OURS] * (1 + ALIKE)
    return max(
        (name for name in seconds if seconds[name] <= limit), key=lambda name: (scores[name] or 0, -seconds[name])
    )


def exported(module: nn.Module, bench: Bench, name: str) -> Path:
    """Export a network in fp32 and return the file."""
    path = bench.folder / f"{name}.onnx"
    export_onnx(module.eval(), bench.program.inputs, path)
    return path


def static_int8(model: Path, bench: Bench) -> Path:
    """Quantise a model as onnxruntime's documentation does for CNNs: QDQ, per channel, MinMax; reduced without VNNI."""
    prepared, path = model.with_suffix(".prepared.onnx"), model.with_suffix(".int8.onnx")
    with captured_output():
        quant_pre_process(str(model), str(prepared))
        quantize_static(
            str(prepared),
            str(path),
            _Reader(onnx.load(prepared).graph.input[0].name, bench.train),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=not has_vnni(),
        )
    return path


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Give batches to onnxruntime's calibrator."""

    def __init__(self, name: str, samples: Samples) -> None:
        self._name, self._batches = name, samples.batches(32, limit=_RANGES)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """Return the next batch by the input's name, or None at the end."""
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch.inputs[0].numpy()}


def pruned_to(bench: Bench, fast: Path, tune: str) -> Path | None:
    """Return the least pruned network in int8 that is as fast as a model, tuned; None without Torch-Pruning."""
    try:
        library = importlib.import_module("torch_pruning")
    except ImportError:
        print("Torch-Pruning is not installed: no row for it", flush=True)
        return None
    candidates, shares = {}, {}
    for ratio in RATIOS:
        module = pruned(library, bench, ratio)
        candidates[ratio] = module, static_int8(exported(module, bench, f"pruned{ratio:g}"), bench)
        # in pairs: among many models a small one finds nothing of its own in the caches
        shares[ratio] = 1 / timed(bench, [fast, candidates[ratio][1]])[1].speedup.value
        if shares[ratio] <= 1 + ALIKE:
            break
    ratio = least_pruned(shares, 1.0)
    module, path = candidates[ratio]
    print(f"pruned {ratio:g} of the channels", flush=True)
    if tune == "none":
        return path
    program = bench.program.with_(graph=tdcompile.trace(module, bench.program.inputs).graph)
    tuned = Pipeline.parse(f"finetune{{{tune}}}").run(program).graph
    return static_int8(exported(tuned, bench, "tuned"), bench)


def least_pruned(seconds: Mapping[float, float], limit: float) -> float:
    """Return the smallest ratio whose latency is at most the limit, or the fastest if none is."""
    enough = [ratio for ratio, time in seconds.items() if time <= limit * (1 + ALIKE)]
    return min(enough) if enough else min(seconds, key=lambda ratio: seconds[ratio])


def pruned(library: Any, bench: Bench, ratio: float) -> nn.Module:
    """Return a copy of the network without the channels of least magnitude, in steps of 8 as int8 kernels take them.

    Every layer loses an equal share, the library's default. ``global_pruning`` takes half of the channels in the first
    stage of ResNet-18 at a ratio of 1/16, and leaves 14 % accuracy instead of 68 % (1,000 images, fp32).
    """
    module, inputs = copy.deepcopy(bench.module).eval(), bench.program.inputs
    kept = [
        part
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
        or (bench.padded and isinstance(part, nn.Conv2d) and not (name.endswith(".conv1") and "layer" in name))
    ]
    library.pruner.MetaPruner(
        module,
        inputs,
        importance=library.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        round_to=8,
        ignored_layers=kept,
    ).step()
    return module


if __name__ == "__main__":
    typer.run(main)
