"""Latency under ``--budget latency=…`` if other processes keep the processors busy during the compilation."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from common import network, publish

import tdcompile
from tdcompile.backend.session import time_models
from tdcompile.compiler import Compiled
from tdcompile.ir.target import Target
from tdcompile.support.processors import idle_processors

_WORK = "import numpy as np\na = np.random.rand(512, 512)\nwhile True:\n    a @ a"  # takes cache and bandwidth, too
_ALONE = 0.9  # idle processors with which one thread is judged


def main(
    networks: Annotated[str, typer.Option(help="comma-separated names of reference networks")] = (
        "resnet18,resnet50,digits_net"
    ),
    budget: Annotated[float, typer.Option(help="share of the dense latency that may be kept")] = 0.5,
    busy: Annotated[int, typer.Option(help="processes that compute beside the compilation")] = 2,
    runs: Annotated[int, typer.Option(help="compilations of each network")] = 5,
    off: Annotated[float, typer.Option(help="largest distance of a share from the budget that counts as kept")] = 0.03,
    seconds: Annotated[float, typer.Option(help="length of one measurement")] = 6.0,
    patience: Annotated[float, typer.Option(help="seconds to wait for an idle machine before a run is judged")] = 60.0,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the table here")] = None,
) -> None:
    """Compile each network beside busy processes with an empty price cache; then judge it without them."""
    rows = []
    for name in networks.split(","):
        module, sample = network(name, seed)
        judged = []
        for _ in range(runs):
            with beside(busy), fresh_cache():
                began = time.perf_counter()
                compiled = tdcompile.compile(module, sample, budget={"latency": budget}, seed=seed)
                took = time.perf_counter() - began
            judged.append({"seconds": took, **judge(compiled, sample, seconds, patience)})
            print(name, judged[-1], flush=True)
        rows.append(row(name, judged, budget, off))
        publish(f"Latency at budget {budget:g} beside {busy} busy processes", rows, seed, Target(), json)


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


def judge(compiled: Compiled, sample: Any, seconds: float, patience: float) -> dict[str, float]:
    """Measure both models; return the share, the one that the report has, and the idle processors before."""
    end = time.monotonic() + patience
    while (idle := idle_processors()) < _ALONE and time.monotonic() < end:
        time.sleep(1.0)
    models = [compiled.folder / "dense.onnx", compiled.onnx]
    timing = time_models(models, [sample], Target(), seconds=seconds)[1]
    reported = compiled.report.ratio.latency
    return {"share": 1 / timing.speedup.value, "reported": 1 / reported if reported else 1.0, "idle": idle}


def row(name: str, judged: list[dict[str, float]], budget: float, off: float) -> dict[str, Any]:
    """Return a row of the table."""
    shares = sorted(one["share"] for one in judged)
    kept = sum(abs(share - budget) <= off for share in shares)
    return {
        "network": name,
        "share, lowest and highest": [shares[0], shares[-1]],
        f"within {budget - off:.2f} and {budget + off:.2f}": f"{kept} of {len(shares)}",
        "largest error of the report": max(abs(one["reported"] / one["share"] - 1) for one in judged),
        "longest compilation, s": max(one["seconds"] for one in judged),
        "fewest idle processors when judged": min(one["idle"] for one in judged),
    }


if __name__ == "__main__":
    typer.run(main)
