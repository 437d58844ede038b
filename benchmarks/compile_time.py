"""Seconds and memory of whole compilations: the networks and goals of ``CASES``."""

from __future__ import annotations

import json as jsonlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from busy import beside
from common import commit, network, publish, trained
from real_networks import cifar_at_224, crepe_full, distillmos_body, efficientnet_lite0, spectra, tones
from results import Table
from torch import Tensor, nn

import tdcompile
from tdcompile.cli.main import SPINS
from tdcompile.cli.main import main as command
from tdcompile.data.task import Task, Tensors
from tdcompile.ir.target import Target
from tdcompile.support.processors import idle_processors

TITLE = "Whole compilations"
STEPS = 4  # longest steps that a row names
FORMATS = {"wall s": ".0f", "processor s": ".0f", "goal s": ".0f", "peak GB": ".2f", "idle processors": ".1f"}


@dataclass(frozen=True)
class Paths:
    """Data and weights that are not part of the project.

    Attributes:
        data: CIFAR-10, ``parquet:DIR``; None without.
        weights: a folder with ``NETWORK_cifar10.safetensors``; None without.
        seed: seeds data and weights.
    """

    data: str | None
    weights: Path | None
    seed: int


Job = tuple[nn.Module, Tensor, Task | None]


@dataclass(frozen=True)
class Case:
    """A compilation without tuning.

    Attributes:
        told: what is compiled.
        budget: field and share.
        goal: seconds of wall time on two idle processors, with a warm price cache.
        job: builds network, example and data; None runs the command of the quick start.
        needs_data: whether ``job`` reads CIFAR-10.
        goal_gb: highest memory, if there is a goal.
    """

    told: str
    budget: tuple[str, float]
    goal: float
    job: Callable[[Paths], Job] | None
    needs_data: bool = False
    goal_gb: float | None = None


def cifar(name: str) -> Callable[[Paths], Job]:
    """Return the job of a ResNet for CIFAR-10, with random weights where the folder has none."""

    def job(paths: Paths) -> Job:
        assert paths.data is not None  # ``main`` leaves the case out without it
        file = None if paths.weights is None else paths.weights / f"{name}_cifar10.safetensors"
        module, train, test = trained(name, file if file and file.exists() else None, paths.data, paths.seed)
        return module, torch.randn(1, 3, 32, 32), Task(train, test, source=paths.data)

    return job


def random_resnet50(paths: Paths) -> Job:
    """Return ResNet-50 at 224² with random weights, without data."""
    module, sample = network("resnet50", paths.seed)
    return module, sample, None


def crepe(paths: Paths) -> Job:
    """Return CREPE full and 512 frames of tones."""
    frames, _ = tones(512, paths.seed)
    return crepe_full(), frames[:1], Task(Tensors(frames))


def distillmos(paths: Paths) -> Job:
    """Return the body of DistillMOS and 64 spectra."""
    sounds = spectra(64, paths.seed)
    return distillmos_body(), sounds[:1], Task(Tensors(sounds))


def efficientnet(paths: Paths) -> Job:
    """Return EfficientNet-Lite0 and 256 enlarged images of CIFAR-10."""
    assert paths.data is not None  # ``main`` leaves the case out without it
    train, _ = cifar_at_224(paths.data, 256, paths.seed)
    return efficientnet_lite0(), torch.randn(1, 3, 224, 224), Task(train)


CASES = {
    "quickstart": Case("quick start: digits_net to int8, one epoch of tuning", ("latency", 0.18), 40, None),
    "resnet20": Case("ResNet-20, CIFAR-10", ("macs", 0.5), 35, cifar("resnet20"), needs_data=True),
    "resnet32": Case("ResNet-32, CIFAR-10", ("macs", 0.5), 60, cifar("resnet32"), needs_data=True),
    "resnet50-latency": Case("ResNet-50 at 224², no data", ("latency", 0.5), 30, random_resnet50),
    "resnet50-macs": Case("ResNet-50 at 224², no data", ("macs", 0.6), 60, random_resnet50),
    "crepe": Case("CREPE full, 512 samples", ("latency", 0.5), 150, crepe),
    "distillmos": Case("DistillMOS body, 64 samples", ("latency", 0.5), 180, distillmos, goal_gb=2.5),
    "efficientnet": Case("EfficientNet-Lite0, 256 samples", ("latency", 0.8), 90, efficientnet, needs_data=True),
}


def main(
    only: Annotated[str, typer.Option(help="comma-separated names of cases")] = ",".join(CASES),
    data: Annotated[str | None, typer.Option(help="parquet:DIR with CIFAR-10; cases that need it are left out")] = None,
    weights: Annotated[Path | None, typer.Option(help="folder with NETWORK_cifar10.safetensors")] = None,
    cache: Annotated[Path | None, typer.Option(help="price caches, one folder a case; kept from run to run")] = None,
    busy: Annotated[int, typer.Option(help="processes that compute beside the compilation")] = 0,
    seed: int = 0,
    one: Annotated[str | None, typer.Option(hidden=True, help="compile this case and print its figures")] = None,
    json: Annotated[Path | None, typer.Option(help="also write the table here; other rows in the file stay")] = None,
) -> None:
    """Compile each case in a process of its own, and write its row as soon as it is done.

    Without ``--cache`` all prices are measured. With it, the second run of a case has a warm cache.
    """
    paths = Paths(data, weights, seed)
    if one is not None:
        print(jsonlib.dumps(_compile(CASES[one], paths)))
        return
    if unknown := [name for name in only.split(",") if name not in CASES]:
        sys.exit(f"error: there is no case '{unknown[0]}'; the cases are {', '.join(CASES)}")
    rows: list[dict[str, Any]] = list(Table.read(json).records()) if json is not None and json.exists() else []
    for name in only.split(","):
        if CASES[name].needs_data and data is None:
            print(f"{name}: left out, it needs --data", flush=True)
            continue
        with tempfile.TemporaryDirectory(prefix="tdcompile-") as folder, beside(busy):
            row = _row(name, paths, Path(folder) if cache is None else cache / name, busy)
        rows = [other for other in rows if _key(other) != _key(row)] + [row]
        rows.sort(key=lambda row: [case.told for case in CASES.values()].index(str(row["compilation"])))
        publish(TITLE, rows, seed, Target(), json, FORMATS)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("compilation", "budget", "price cache", "busy processes"))


def _row(name: str, paths: Paths, cache: Path, busy: int) -> dict[str, Any]:
    """Compile a case in a process of its own; the kernel counts its seconds and memory, imports included."""
    case, warm = CASES[name], cache.is_dir() and any(cache.iterdir())
    state = "not read" if case.budget[0] != "latency" else "warm" if warm else "empty"
    cache.mkdir(parents=True, exist_ok=True)
    arguments = ["--one", name, "--seed", str(paths.seed)]
    arguments += ["--data", paths.data] if paths.data else []
    arguments += ["--weights", str(paths.weights)] if paths.weights else []
    idle, start = idle_processors(), time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env={"GOMP_SPINCOUNT": SPINS, **os.environ, "TDCOMPILE_CACHE": str(cache)},
            stdout=output,
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        lines = output.read().splitlines()
    if process.returncode:
        sys.exit(f"error: the case '{name}' failed")
    figures = jsonlib.loads(lines[-1])
    (field, share), steps = case.budget, sorted(figures["seconds"].items(), key=lambda item: -item[1])
    return {
        "compilation": case.told,
        "budget": f"{field}={share:g}",
        "price cache": state,
        "busy processes": busy,
        "wall s": wall,
        "processor s": usage.ru_utime + usage.ru_stime,
        "goal s": case.goal,
        "peak GB": usage.ru_maxrss * 1024 / 1e9,
        "goal GB": case.goal_gb,
        "reached": figures["reached"],
        "longest steps, wall s": ", ".join(f"{step} {seconds:.0f}" for step, seconds in steps[:STEPS]),
        "idle processors": idle,
        "commit": commit(),
    }


def _compile(case: Case, paths: Paths) -> dict[str, Any]:
    """Return the seconds of each step, and the share of the dense network that was reached."""
    (field, share), job = case.budget, case.job
    if job is None:
        with tempfile.TemporaryDirectory(prefix="tdcompile-") as folder:
            if command(["demo", "-o", f"{folder}/demo", "--quiet", "--json"]):
                sys.exit(1)
            told = jsonlib.loads((Path(folder) / "demo/report.json").read_text(encoding="utf-8"))
        seconds, ratio = told["seconds"], told["ratio"][field]
    else:
        module, sample, task = job(paths)
        given: Mapping[str, Any] = {} if task is None else {"data": task}
        report = tdcompile.compile(module, sample, budget={field: share}, seed=paths.seed, **given).report
        seconds, ratio = report.seconds, getattr(report.ratio, field)
    return {"seconds": _steps(seconds), "reached": 1 / ratio if ratio else None}


def _steps(seconds: Mapping[str, float]) -> dict[str, float]:
    return {step: each for step, each in seconds.items() if step != "total"}


if __name__ == "__main__":
    typer.run(main)
