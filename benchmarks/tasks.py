"""Networks of any task under one budget: the metric of the dense and the compiled model, untuned, tuned, by a goal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import real_networks as real
import torch
import torch.nn.functional as F
import typer
from common import network, publish
from results import Table
from torch import Tensor, nn

import tdcompile
from tdcompile.data.loading import load_data
from tdcompile.data.task import Batch, Samples, Task, Tensors
from tdcompile.frontend.load_network import load_weights
from tdcompile.ir.target import Target

PARTS = ("untuned", "auto", "tuned", "goal")


@dataclass(frozen=True)
class Case:
    """A trained network with its data.

    Attributes:
        build: returns the network, example inputs and the task.
        what: what it is for.
        budget: the budget of all compilations but the one by a goal.
        tune: options of the tuning, of at most ten minutes on two cores.
        max_drop: the drop that the goal allows.
        options: other options of every compilation.
    """

    build: Callable[[], tuple[nn.Module, Any, Task]]
    what: str
    tune: str
    max_drop: str
    budget: Mapping[str, float] = field(default_factory=lambda: {"latency": 0.5})
    options: Mapping[str, Any] = field(default_factory=dict)


def main(
    json: Annotated[Path, typer.Option(help="the table; rows in it are kept and continued")],
    only: Annotated[str, typer.Option(help="comma-separated names; default all whose data are given")] = "",
    parts: Annotated[str, typer.Option(help=f"comma-separated, of {', '.join(PARTS)}")] = ",".join(PARTS),
    data: Annotated[str | None, typer.Option(help="parquet:DIR with CIFAR-10")] = None,
    weights: Annotated[Path | None, typer.Option(help="folder of unet.safetensors and espcn.safetensors")] = None,
    seed: int = 0,
) -> None:
    """Compile each network untuned, untuned in the better precision, tuned, and by a goal in the better precision.

    Every score is that of the ONNX file in onnxruntime. Untuned and tuned compilations are in fp32.
    """
    known = cases(data, weights, seed)
    rows = list(Table.read(json).records()) if json.is_file() else []
    for name in only.split(",") if only else known:
        for part in parts.split(","):
            print(f"{name}, {part} ...", flush=True)
            row = measured(name, known[name], part, seed)
            rows = [old for old in rows if (old["network"], old["part"]) != (name, part)] + [row]
            publish("Networks of any task", rows, seed, Target(), json)


def measured(name: str, case: Case, part: str, seed: int) -> dict[str, Any]:
    """Return the row of one compilation."""
    module, inputs, task = case.build()
    begun = time.perf_counter()
    options = {"precision": "auto" if part in ("auto", "goal") else "fp32", **case.options}
    if part == "goal":
        options |= {"goal": "fastest", "max_drop": case.max_drop}
    else:
        options |= {"budget": dict(case.budget), "max_drop": "100%"}
        options |= {"tune": case.tune} if part == "tuned" else {}
    report = tdcompile.compile(module, inputs, data=task, seed=seed, **options).report
    about = report.metric.about if report.metric else None
    assert about is not None
    assert report.dense.score is not None
    assert report.compiled.score is not None
    return {
        "network": name,
        "for": case.what,
        "part": part,
        "asked": f"goal fastest, drop {case.max_drop}" if part == "goal" else _asked(case.budget),
        "metric": about.name,
        "dense": report.dense.score * about.scale,
        "compiled": report.compiled.score * about.scale,
        "drop": about.drop(report.dense.score, report.compiled.score),
        "precision": report.precision,
        "times as fast": report.ratio.latency,
        "MACs": report.ratio.macs,
        "parameters": report.ratio.params,
        "minutes": (time.perf_counter() - begun) / 60,
        "verdict": report.verdict,
    }


def _asked(budget: Mapping[str, float]) -> str:
    return ",".join(f"{name}={share:g}" for name, share in budget.items())


def cases(data: str | None, weights: Path | None, seed: int) -> dict[str, Case]:
    """Return the networks whose data and weights are given."""
    found = {
        "crepe_full": Case(
            lambda: pitch(seed), "pitch of a voice", "epochs=2,trial=0,lr=0.003", "1", options={"metric": in_tune}
        ),
        "distillmos": Case(
            lambda: speech_quality(seed), "quality of speech", "epochs=4,trial=0,lr=0.003", "2%",
            options={"metric": "PearsonCorrCoef{higher=true,name=correlation}"},
        ),
        "minilm": Case(
            lambda: embedding(seed), "embedding of sentences",
            "epochs=16,trial=0,lr=0.0005,batch=32,optimizer=adam", "2%",
            options={"metric": "CosineSimilarity{reduction=mean,name=cosine}"},
        ),
        "smollm2": Case(
            lambda: language(seed), "language", "epochs=1,trial=0,lr=0.01,batch=8", "25%", budget={"params": 0.84},
            options={"decompose": "svd", "precision": "fp32"},
        ),
    }  # fmt: skip
    if weights is not None and (weights / "unet.safetensors").is_file():
        found["unet"] = Case(lambda: segmentation(weights, seed), "segmentation", "epochs=4", "1")
    if weights is not None and data is not None and (weights / "espcn.safetensors").is_file():
        found["espcn"] = Case(lambda: super_resolution(weights, data, seed), "super-resolution", "epochs=0.5", "2%")
    return found


def in_tune(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return for each frame whether its pitch is within 50 cents: the raw pitch accuracy."""
    return torch.tensor([real.raw_pitch_accuracy(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(outputs))])


in_tune.higher_is_better, in_tune.unit, in_tune.name = True, "%", "raw pitch accuracy"  # type: ignore[attr-defined]


def pitch(seed: int) -> tuple[nn.Module, Tensor, Task]:
    """Return CREPE full with tones of known pitch."""
    (frames, known), (others, judged) = real.tones(1024, seed), real.tones(1000, seed + 1)
    return real.crepe_full(), frames[:1], Task(Tensors(frames, known), Tensors(others, judged), calibrate=512)


def speech_quality(seed: int) -> tuple[nn.Module, Tensor, Task]:
    """Return DistillMOS with the dense network's own scores of degraded sound."""
    module = real.distillmos_body()
    train, test = (real.spectra(count, seed + place) for place, count in enumerate((128, 64)))
    with torch.no_grad():
        scores = [torch.cat([module(part) for part in x.split(8)]) for x in (train, test)]
    return module, train[:1], Task(Tensors(train, scores[0]), Tensors(test, scores[1]), calibrate=64)


def embedding(seed: int) -> tuple[nn.Module, dict[str, Tensor], Task]:
    """Return all-MiniLM-L6-v2 with the dense network's own embeddings of sentences."""
    module, (ids, mask) = real.minilm(), real.sentences()
    with torch.no_grad():
        wanted = torch.cat([module(*part) for part in zip(ids.split(64), mask.split(64), strict=True)])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    train, test = order[: -len(ids) // 4], order[-len(ids) // 4 :]
    parts = [Tensors((ids[rows], mask[rows]), wanted[rows]) for rows in (train, test)]
    return module, {"ids": ids[:1], "mask": mask[:1]}, Task(parts[0], parts[1], calibrate=512)


def language(seed: int) -> tuple[nn.Module, Tensor, Task]:
    """Return SmolLM2-135M-Instruct with windows of Python's own documentation."""
    train, test = real.windows(20_000, 256, 128), real.windows(0, 24, 128)
    return real.smollm2(), torch.zeros(1, 128, dtype=torch.int64), Task(train, test, calibrate=256)


def segmentation(weights: Path, seed: int) -> tuple[nn.Module, Tensor, Task]:
    """Return the U-Net with scenes of digits."""
    module, sample = network("unet", seed)
    load_weights(module, weights / "unet.safetensors")
    train, test = load_data("scenes", tuple(sample.shape[1:]))
    return module, sample, Task(train, test, source="scenes")


class Halved(Samples):
    """Images as targets, and the same images at half the size as inputs."""

    def __init__(self, source: Samples) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: Any) -> Batch:
        """Return small images ``(N, C, H / 2, W / 2)`` and the images ``(N, C, H, W)``."""
        x = self.source.batch(indices).inputs[0]
        return Batch((F.avg_pool2d(x, 2),), x)


def halved(data: str) -> tuple[Samples, Samples]:
    """Return CIFAR-10 at half the size, with the images themselves as targets."""
    train, test = load_data(data, (3, 32, 32))
    assert test is not None  # CIFAR-10 has test images
    return Halved(train), Halved(test.subset(range(1000)))


def halved_cifar10() -> tuple[Samples, Samples]:
    """Return ``halved`` of the data that the variable CIFAR10 names, for ``python -m tdcompile.models.train``."""
    import os

    return halved(os.environ["CIFAR10"])


def super_resolution(weights: Path, data: str, seed: int) -> tuple[nn.Module, Tensor, Task]:
    """Return ESPCN with images of CIFAR-10 at half their size."""
    module, sample = network("espcn", seed)
    load_weights(module, weights / "espcn.safetensors")
    train, test = halved(data)
    return module, sample, Task(train, test, source=data)


if __name__ == "__main__":
    typer.run(main)
