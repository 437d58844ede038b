"""The command's options, each declared once; a command names those it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

_NETWORK, _DATA, _TARGET = "Network", "Data", "Target"
_CHOICE, _RUN = "What to keep and how", "Running"


def _option(kind: Any, help: str, *names: str, panel: str, default: Any = None, **more: Any) -> tuple[Any, Any]:
    return Annotated[kind, typer.Option(*names, help=help, rich_help_panel=panel, **more)], default


def _argument(kind: Any, help: str, metavar: str, default: Any = None) -> tuple[Any, Any]:
    return Annotated[kind, typer.Argument(help=help, metavar=metavar)], default


# The type of each, and its default. None is "not given": a recipe's value holds then, or the recipe's default.
OPTIONS: Mapping[str, tuple[Any, Any]] = {
    "source": _argument(str | None, "file.py:callable, package.module:callable, or a registered model.", "SOURCE"),
    "model": _argument(Path, "An ONNX file.", "A.onnx", inspect.Parameter.empty),
    "models": _argument(list[Path], "ONNX files that take the same inputs.", "A.onnx...", inspect.Parameter.empty),
    "kind": _argument(str | None, "What to list; everything if not given.", "KIND"),
    "out": _option(Path | None, "Where the result goes.", "--out", "-o", panel=_RUN),
    "against": _option(
        str,
        "An ONNX file, a SOURCE, or a folder that 'compile' wrote.",
        panel=_NETWORK,
        default=inspect.Parameter.empty,
        metavar="B.onnx|SOURCE",
    ),
    "weights": _option(str | None, "safetensors, or a state dict; never run as code.", panel=_NETWORK, metavar="FILE"),
    "input": _option(
        list[str] | None, "e.g. 1x3x224x224 or ids=1x64:int64; repeatable.", panel=_NETWORK, metavar="SPEC"
    ),
    "dynamic_batch": _option(
        bool | None,
        "Leave the batch dimension open; default dynamic-batch.",
        "--dynamic-batch/--no-dynamic-batch",
        panel=_NETWORK,
    ),
    "dynamic": _option(
        list[str] | None,
        "Leave another axis open, e.g. ids:1 or ids:1=time; repeatable.",
        panel=_NETWORK,
        metavar="NAME:AXIS",
    ),
    "frontend": _option(
        str | None, "What traces the network: auto, fx or export; default auto.", panel=_NETWORK, metavar="NAME"
    ),
    "data": _option(
        str | None,
        "digits, parquet:DIR, imagefolder:DIR, npz:FILE, hub:NAME or file.py:callable.",
        panel=_DATA,
        metavar="SPEC",
    ),
    "normalize": _option(str | None, "none, imagenet, or m,m,m/s,s,s; default none.", panel=_DATA),
    "calibrate": _option(
        int | None, "Training samples that calibration reads; default 1024.", panel=_DATA, metavar="N", min=1
    ),
    "eval": _option(int | None, "Test samples of the final figure; default all.", panel=_DATA, metavar="N", min=1),
    "target": _option(str | None, "cpu or cuda; default cpu.", panel=_TARGET),
    "threads": _option(int | None, "Threads of onnxruntime; default 1.", panel=_TARGET, metavar="N", min=1),
    "grain": _option(int | None, "Ranks are multiples of it.", panel=_TARGET, metavar="N", min=1),
    "batch": _option(int | None, "Samples in one timed run; default 1.", panel=_TARGET, metavar="N", min=1),
    "budget": _option(
        list[str] | None,
        "What may be kept of the dense network: latency=0.5, macs=0.5, params=0.3; repeatable; default latency=0.5.",
        panel=_CHOICE,
        metavar="NAME=SHARE",
    ),
    "decompose": _option(str | None, "Decompositions to consider; default auto.", panel=_CHOICE, metavar="NAME,..."),
    "ranks": _option(str | None, "The rank selector; default knapsack.", panel=_CHOICE, metavar="SELECTOR"),
    "importance": _option(str | None, "The score of layers; default auto.", panel=_CHOICE, metavar="SCORE"),
    "plan": _option(str | None, "Apply this plan, edited by hand or not.", panel=_CHOICE, metavar="plan.json"),
    "tune": _option(
        str | None,
        "none, or e.g. epochs=5,lr=0.02; default none, or what the recipe says; in demo one epoch.",
        panel=_CHOICE,
        metavar="OPTIONS",
    ),
    "keep_dense": _option(
        list[str] | None, "Layers to leave alone; repeatable.", "--keep-dense", panel=_CHOICE, metavar="GLOB"
    ),
    "methods": _option(
        str | None, "Decompositions to study; default cp4,tucker2,tt.", panel=_CHOICE, metavar="NAME,..."
    ),
    "compressions": _option(
        str | None, "Shares of a layer's weights to remove; default 0.5,0.75,0.9.", panel=_CHOICE, metavar="SHARE,..."
    ),
    "layers": _option(
        list[str] | None,
        "Layers to compress, one at a time; repeatable; default all but the first and the last.",
        panel=_CHOICE,
        metavar="GLOB",
    ),
    "seeds": _option(
        int, "How many, each with its own calibration sample and tuning.", panel=_CHOICE, default=1, metavar="N", min=1
    ),
    "max_drop": _option(
        float | None, "Exit with 4 if accuracy falls by more points.", "--max-drop", panel=_CHOICE, metavar="POINTS"
    ),
    "min_speedup": _option(
        float | None, "Exit with 4 if not so many times as fast.", "--min-speedup", panel=_CHOICE, metavar="X"
    ),
    "pipeline": _option(
        str | None,
        "Passes of your own choice, in place of those that the flags describe; budget, gates and keep-dense hold.",
        panel=_CHOICE,
        metavar="PASS,...",
    ),
    "recipe": _option(
        str | None, "All of the above from a shipped recipe or a TOML file; flags override it.", panel=_RUN
    ),
    "rtol": _option(float | None, "Allowed difference, relative to the largest output.", panel=_RUN, min=0.0),
    "atol": _option(float | None, "Allowed difference, absolute.", panel=_RUN, min=0.0),
    "seconds": _option(float, "How long to measure, all models together.", panel=_RUN, default=5.0, min=0.0),
    "seed": _option(int | None, "Of every random draw; default 0.", panel=_RUN, metavar="N"),
    "jobs": _option(
        int | None, "Layers, or cells of a study, side by side; default 1.", panel=_RUN, metavar="N", min=1
    ),
    "ray": _option(
        bool,
        "Spread the cells over the Ray cluster of RAY_ADDRESS, or a local one.",
        "--ray",
        panel=_RUN,
        default=False,
    ),
    "dry_run": _option(bool, "Print the recipe and the pipeline, do nothing.", "--dry-run", panel=_RUN, default=False),
    "resume": _option(
        bool, "Go on with an interrupted run of the same command.", "--resume", panel=_RUN, default=False
    ),
    "schema": _option(bool, "The JSON schema of report.json.", "--schema", panel=_RUN, default=False),
    "json": _option(bool, "JSON on stdout, nothing else.", "--json", panel=_RUN, default=False),
    "verbose": _option(bool, "Log everything; tracebacks.", "--verbose", "-v", panel=_RUN, default=False),
    "quiet": _option(bool, "No progress, no warnings.", "--quiet", "-q", panel=_RUN, default=False),
}


def signed(function: Callable[[Mapping[str, Any]], Any], names: Iterable[str], about: str) -> Callable[..., Any]:
    """The function of one mapping as one of these options, in the form that typer reads."""

    def call(**given: Any) -> Any:
        return function(given)

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
        for name, (kind, default) in ((name, OPTIONS[name]) for name in names)
    ]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what inspect.signature looks for
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__doc__ = about
    return call
