"""Latency under ``--budget latency=…`` if other processes keep the processors busy during the compilation."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from common import commit, machine, network, publish, surroundings
from results import ResultsError, Table
from torch import Tensor, nn

import tdcompile
from tdcompile.backend.session import time_models
from tdcompile.compiler import Compiled
from tdcompile.errors import TdcompileError
from tdcompile.ir.target import Target
from tdcompile.support.processors import idle_processors

# It takes cache and bandwidth too, and ends with its parent, however that ends.
_WORK = """import os
import numpy as np
a, parent = np.random.rand(512, 512), os.getppid()
while os.getppid() == parent:
    a @ a
"""
_ALONE = 0.9  # idle processors with which one thread is judged
FORMATS = {"share": ".3f", "share of the report": ".3f", "seconds": ".0f", "idle processors when judged": ".1f"}
# The dense network stays where a compilation is refused.
REFUSED: Mapping[str, float | None] = {"share": 1.0, "reported": None, "idle": None}


def main(
    networks: Annotated[str, typer.Option(help="comma-separated names of reference networks")] = (
        "digits_net,resnet18,resnet50"
    ),
    budget: Annotated[float, typer.Option(help="share of the dense latency that may be kept")] = 0.5,
    busy: Annotated[int, typer.Option(help="processes that compute beside the compilation")] = 2,
    runs: Annotated[int, typer.Option(help="compilations of each network")] = 5,
    off: Annotated[float, typer.Option(help="largest distance of a share from the budget that counts as kept")] = 0.03,
    seconds: Annotated[float, typer.Option(help="length of one measurement")] = 6.0,
    patience: Annotated[float, typer.Option(help="seconds to wait for an idle machine before a run is judged")] = 60.0,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the table here; its runs are not repeated")] = None,
) -> None:
    """Compile each network beside busy processes with an empty price cache; then judge it without them.

    The table is written after each run. The same command continues it: runs in the file are kept, except for those that
    no idle machine judged. They have no share.
    """
    title = f"Latency at budget {budget:g} beside {busy} busy processes"
    try:
        rows = kept_rows(json, title, seed)
    except ResultsError as error:
        sys.exit(f"error: {error}")
    for name in networks.split(","):
        done = {one["run"] for one in rows if one["network"] == name}
        todo = [number for number in range(1, runs + 1) if number not in done]
        if not todo:
            continue
        module, sample = network(name, seed)
        for number in todo:
            began = time.perf_counter()
            compiled = beside_others(module, sample, budget, busy, seed)
            took = time.perf_counter() - began
            judged = judge(compiled, sample, seconds, patience) if compiled else REFUSED
            rows.append(row(name, number, {"seconds": took, **judged}, budget, off))
            publish(title, rows, seed, Target(), json, FORMATS)


def kept_rows(file: Path | None, title: str, seed: int) -> list[dict[str, Any]]:
    """Return the runs of an earlier table that an idle machine judged.

    Raises:
        ResultsError: the file is no table, or one of another budget, load, seed or machine.
    """
    if file is None or not file.exists():
        return []
    table = Table.read(file)
    here = (title, seed, machine(surroundings(Target())))
    if (table.title, table.seed, table.machine) != here:
        found = f"{table.title!r}, seed {table.seed}, {table.machine}"
        raise ResultsError(f"{file} has other runs ({found}): name another file")
    return [one for one in table.records() if one["share"] is not None]


def beside_others(module: nn.Module, sample: Tensor, budget: float, busy: int, seed: int) -> Compiled | None:
    """Compile beside busy processes with an empty price cache; return None if the compilation is refused."""
    with beside(busy), fresh_cache():
        try:
            return tdcompile.compile(module, sample, budget={"latency": budget}, seed=seed)
        except TdcompileError as error:
            print(f"refused: {error}", flush=True)
            return None


@contextmanager
def beside(processes: int) -> Iterator[None]:
    """Keep processes busy, one thread each, within the context."""
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    workers = [subprocess.Popen([sys.executable, "-c", _WORK], env=one_thread) for _ in range(processes)]
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


@contextmanager
def fresh_cache() -> Iterator[None]:
    """Measure all prices anew within the context."""
    former = os.environ.get("TDCOMPILE_CACHE")
    with tempfile.TemporaryDirectory(prefix="tdcompile-") as folder:
        os.environ["TDCOMPILE_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("TDCOMPILE_CACHE")
            if former is not None:
                os.environ["TDCOMPILE_CACHE"] = former


def judge(compiled: Compiled, sample: Tensor, seconds: float, patience: float) -> dict[str, float | None]:
    """Measure both models; return the share, the one that the report has, and the idle processors before.

    There is no share if the machine is not idle after ``patience`` seconds.
    """
    end = time.monotonic() + patience
    while (idle := idle_processors()) < _ALONE and time.monotonic() < end:
        time.sleep(1.0)
    reported = compiled.report.ratio.latency
    found: dict[str, float | None] = {"share": None, "reported": 1 / reported if reported else 1.0, "idle": idle}
    if idle < _ALONE:
        return found
    models = [compiled.folder / "dense.onnx", compiled.onnx]
    timing = time_models(models, [sample], Target(), seconds=seconds)[1]
    return {**found, "share": 1 / timing.speedup.value}


def row(name: str, number: int, judged: Mapping[str, float | None], budget: float, off: float) -> dict[str, Any]:
    """Return a row of the table."""
    share = judged["share"]
    return {
        "network": name,
        "run": number,
        "share": share,
        f"within {budget - off:.2f} and {budget + off:.2f}": None if share is None else abs(share - budget) <= off,
        "share of the report": judged["reported"],
        "seconds": judged["seconds"],
        "idle processors when judged": judged["idle"],
        "commit": commit(),
    }


if __name__ == "__main__":
    typer.run(main)
