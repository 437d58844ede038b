"""Dense and compiled networks in fp32 and int8: latency, size and quality of all four models, measured in one run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import real_networks as real
import torch
import torch.nn.functional as F
import typer
from common import network, percent, publish, trained
from results import Table
from torch import Tensor, nn

import tdcompile
from tdcompile.backend.lowering import export_lowered
from tdcompile.backend.quantize import write_quantized
from tdcompile.backend.quantized_form import form_of
from tdcompile.backend.session import infer, open_session, time_models
from tdcompile.compiler import resolved_call
from tdcompile.data.task import Task, Tensors
from tdcompile.ir.target import Target

RANDOM = ("resnet18", "resnet50", "vgg16", "vit_tiny", "mobilenet_v2")
CIFAR = ("resnet20", "resnet56", "resnet18_cifar", "vgg16_cifar")
REAL = ("crepe_tiny", "crepe_full", "fcpe", "efficientnet_lite0", "mobilenet_v2_trunk", "distillmos_body")
ALONE = 0.95  # speed over int8 dense where no more is asked for than that: two measurements differ by the rest
Metric = Callable[[Path], float]


@dataclass(frozen=True)
class Case:
    """One network with its data.

    Attributes:
        times: speed-up over the dense network in int8 to ask for; ``ALONE`` asks for no more than int8 gives.
        macs: share of the multiply-accumulates that the budget allows; None limits latency only.
        metric: quality of a model's file; None takes accuracy on the test samples, or top-1 agreement.
        measure: name of the metric.
    """

    name: str
    module: nn.Module
    inputs: Tensor
    task: Task
    times: float
    macs: float | None = None
    metric: Metric | None = None
    measure: str = "accuracy %"
    options: dict[str, Any] = field(default_factory=dict)


def main(
    json: Annotated[Path, typer.Option(help="the table; rows in it are kept and continued")],
    only: Annotated[str, typer.Option(help="comma-separated names; default all whose data are given")] = "",
    data: Annotated[str | None, typer.Option(help="parquet:DIR with CIFAR-10")] = None,
    weights: Annotated[Path | None, typer.Option(help="folder of NETWORK_cifar10.safetensors")] = None,
    times: Annotated[float | None, typer.Option(help="speed-up over int8 to ask for; default by network")] = None,
    tune: Annotated[str, typer.Option(help="none, or options of the training passes")] = "none",
    seed: int = 0,
) -> None:
    """Compile each network to int8 and measure the four models."""
    names = only.split(",") if only else [*RANDOM, *(CIFAR if data and weights else ()), *REAL]
    rows = list(Table.read(json).records()) if json.is_file() else []
    for name in names:
        for case in cases(name, data, weights, seed):
            print(f"{name} ...", flush=True)
            found = compared(list(measured(case, times or case.times, tune, seed)))
            rows = [row for row in rows if (row["network"], row["tune"]) != (case.name, tune)] + found
            publish("int8 and fp32", rows, seed, Target(), json)


def cases(name: str, data: str | None, weights: Path | None, seed: int) -> Iterator[Case]:
    """Yield the network of a name, or nothing if its data or weights are not given."""
    if name in RANDOM:
        module, sample = network(name, seed)
        images = torch.randn(16, *sample.shape[1:], generator=torch.Generator().manual_seed(seed))
        wanted = {"mobilenet_v2": ALONE, "vit_tiny": 1.35}.get(name, 1.6)
        yield Case(name, module, sample, Task(Tensors(images), calibrate=16), wanted, 0.5, measure="none")
    elif name in CIFAR:
        if data is None or weights is None or not (weights / f"{name}_cifar10.safetensors").is_file():
            print(f"{name}: --data and --weights with {name}_cifar10.safetensors are needed", flush=True)
            return
        module, train, test = trained(name, weights / f"{name}_cifar10.safetensors", data, seed)
        wanted = ALONE if name in ("resnet20", "resnet56") else 1.5
        yield Case(name, module, torch.randn(1, 3, 32, 32), Task(train, test, source=data), wanted)
    elif name in ("crepe_tiny", "crepe_full"):
        frames, _ = real.tones(512, seed)
        task = Task(Tensors(frames), calibrate=512)
        module = real.crepe_tiny() if name == "crepe_tiny" else real.crepe_full()
        wanted = ALONE if name == "crepe_tiny" else 1.5
        yield Case(name, module, frames[:1], task, wanted, metric=pitch, measure="raw pitch accuracy %")
    elif name == "fcpe":
        mel, _ = real.spoken_tones(64, seed)
        task, told = Task(Tensors(mel), calibrate=64), "raw pitch accuracy %"
        yield Case(name, real.fcpe(), mel[:1], task, 1.5, metric=frame_pitch, measure=told)
    elif name == "mobilenet_v2_trunk" and data is not None:
        train, test = real.cifar_at_96(data, seed)
        task, inputs = Task(train.subset(range(512)), test.subset(range(500)), calibrate=256), torch.randn(1, 3, 96, 96)
        metric, told = neighbours(data, seed), "accuracy of 20 neighbours %"
        yield Case(name, real.mobilenet_v2_trunk(), inputs, task, ALONE, metric=metric, measure=told)
    elif name == "efficientnet_lite0" and data is not None:
        train, test = real.cifar_at_224(data, 256, seed)
        task = Task(train, test.subset(range(500)), calibrate=256)
        inputs, told = torch.randn(1, 3, 224, 224), "top-1 of 20 images %"
        yield Case(name, real.efficientnet_lite0(), inputs, task, ALONE, metric=imagenet, measure=told)
    elif name == "distillmos_body":
        task = Task(Tensors(real.spectra(64, seed)), calibrate=64)
        module = real.distillmos_body()
        told = "correlation with dense fp32 %"
        yield Case(name, module, real.spectra(1, seed), task, 1.3, metric=correlated(module, seed), measure=told)


def measured(case: Case, times: float, tune: str, seed: int) -> Iterator[dict[str, Any]]:
    """Compile a network to int8 and yield a row for each of the four models."""
    alone = int8_share(case)
    budget = {"latency": min(alone / times, 1.0)} | ({"macs": case.macs} if case.macs else {})
    drop = 100.0 if case.measure != "none" else None  # the quality is a figure here, not a gate
    made = tdcompile.compile(
        case.module, case.inputs, data=case.task, precision="int8", budget=budget, tune=tune, seed=seed, max_drop=drop
    )
    report, int8 = made.report, next(v for v in made.report.variants if v.title == "dense int8")
    for one in report.variants:
        quality: float | None = None
        if case.metric is not None:
            quality = round(100 * case.metric(made.folder / one.file), 2)
        elif case.measure != "none":
            quality = percent(one.score)
        yield {
            "network": case.name,
            "tune": tune,
            "model": one.title,
            "ms": one.latency_ms,
            "over fp32 dense": one.speedup,
            "over int8 dense": one.speedup / int8.speedup,
            "MB": one.onnx_bytes / 1e6,
            "measure": case.measure,
            "quality": quality,
            "relative error %": None if one.relative_error is None else 100 * one.relative_error,
            "MACs dense / compiled": report.ratio.macs if one.network == "compiled" else 1.0,
            "verdict": report.verdict if one is report.variants[-1] else "",
        }


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of one network with the quality that int8 loses, and what is lost against int8 alone."""
    quality = {row["model"]: row["quality"] for row in rows}

    def lost(model: str, by: str) -> float | None:
        return None if quality[model] is None else round(quality[model] - quality[by], 2)

    return [
        {
            **row,
            "lost to int8": lost(row["model"].replace("int8", "fp32"), row["model"])
            if "int8" in row["model"]
            else None,
            "below int8 dense": lost("dense int8", row["model"]) if row["model"] == "compiled int8" else None,
        }
        for row in rows
    ]


def int8_share(case: Case) -> float:
    """Return the latency of the dense network in int8 as a share of that in fp32, both after exact rewrites."""
    program = tdcompile.trace(case.module, (torch.cat([case.inputs] * 2),))
    program = resolved_call(None, {"precision": "int8"}).steps().split_exact()[0].run(program)
    with tempfile.TemporaryDirectory() as folder:
        dense, int8 = Path(folder) / "dense.onnx", Path(folder) / "int8.onnx"
        export_lowered(program, program.dense, dense)
        write_quantized(dense, int8, None, form_of(Target()))
        timings = time_models([dense, int8], [case.inputs], Target(), seconds=2.0)
    return 1 / timings[1].speedup.value


def answers(model: Path, inputs: Tensor, batch: int) -> Tensor:
    """Return the first output of a model in onnxruntime, for batches of inputs."""
    session = open_session(model, Target())
    return torch.cat([torch.from_numpy(infer(session, [part])[0]) for part in inputs.split(batch)])


def pitch(model: Path) -> float:
    """Return the raw pitch accuracy on 2,000 tones."""
    frames, pitches = real.tones(2000, 1)
    return real.raw_pitch_accuracy(answers(model, frames, 100), pitches)


def frame_pitch(model: Path) -> float:
    """Return the raw pitch accuracy on the 100 frames of each of 100 tones."""
    mel, pitches = real.spoken_tones(100, 1)
    bins = answers(model, mel, 10).flatten(0, 1)
    return real.raw_pitch_accuracy(bins, pitches.repeat_interleave(len(bins) // len(pitches)), real.FCPE_CENTS)


def neighbours(data: str, seed: int) -> Metric:
    """Return a metric: right answers on 500 images of CIFAR-10 by their 20 nearest of 2,000 training images.

    Distances are cosines of the model's own features.
    """
    images, labels = [], []
    for count, part, scaled in zip((2000, 500), real.cifar(data, seed), real.cifar_at_96(data, seed), strict=True):
        images.append(scaled.batch(range(count)).inputs[0])
        labels.append(part.batch(range(count)).targets)

    def score(model: Path) -> float:
        train, test = (F.normalize(answers(model, x, 20), dim=1) for x in images)
        near = (test @ train.T).topk(20).indices
        return float((labels[0][near].mode(1).values == labels[1]).float().mean())

    return score


def imagenet(model: Path) -> float:
    """Return the share of right answers on 20 labelled ImageNet images."""
    images, classes = real.labelled_imagenet()
    return float((answers(model, images, 20).argmax(1) == classes).float().mean())


def correlated(module: nn.Module, seed: int) -> Metric:
    """Return a metric: Pearson's correlation with the dense scores on 64 new spectra."""
    inputs = real.spectra(64, seed + 1)
    with torch.no_grad():
        dense = torch.cat([module(part) for part in inputs.split(8)]).flatten()

    def score(model: Path) -> float:
        return float(torch.corrcoef(torch.stack([dense, answers(model, inputs, 8).flatten()]))[0, 1])

    return score


if __name__ == "__main__":
    typer.run(main)
