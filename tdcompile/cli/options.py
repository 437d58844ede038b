"""The command's options, each declared once as an ``Annotated`` alias; a command's parameters name those it takes.

Options of a compilation take their help from ``RecipeOptions``, which also checks their values. None means that the
flag is not given: the value of the recipe then holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tdcompile.recipe_options import RecipeOptions
from tdcompile.support.options import text_of

_NETWORK, _DATA, _TARGET = "Network", "Data", "Target"
_CHOICE, _RUN = "What to keep and how", "Running"


def _recipe_option(name: str, *names: str, panel: str, metavar: str | None = None, note: str = "") -> Any:
    """Declare the flag of a recipe's option.

    Args:
        name: the option.
        names: the flags; by default one named like the option.
        panel: heading in the help.
        metavar: the value in the help.
        note: what concerns the flag alone.
    """
    field = RecipeOptions.model_fields[name]
    default = _default(field.default)
    help = "; ".join(filter(None, (field.description, note, f"default {default}" if default else "")))
    return typer.Option(*names, help=f"{help}.", rich_help_panel=panel, metavar=metavar)


def _default(value: Any) -> str:
    """A recipe's default as one writes it after the flag; nothing if the option is then left out."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={share}" for name, share in value.items())
    return "" if value is None or isinstance(value, bool) else text_of(value)


def _option(help: str, *names: str, panel: str = _RUN, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


# Options of a compilation.
Source = Annotated[
    str | None, typer.Argument(help=f"{RecipeOptions.model_fields['source'].description}.", metavar="SOURCE")
]
Weights = Annotated[str | None, _recipe_option("weights", panel=_NETWORK, metavar="FILE")]
Input = Annotated[list[str] | None, _recipe_option("input", panel=_NETWORK, metavar="SPEC", note="repeatable")]
ExampleFile = Annotated[str | None, _recipe_option("example", panel=_NETWORK, metavar="FILE")]
DynamicBatch = Annotated[
    bool | None,
    _recipe_option("dynamic_batch", "--dynamic-batch/--no-dynamic-batch", panel=_NETWORK, note="default dynamic-batch"),
]
BatchAxis = Annotated[
    list[str] | None, _recipe_option("batch_axis", panel=_NETWORK, metavar="NAME=AXIS", note="repeatable")
]
Dynamic = Annotated[list[str] | None, _recipe_option("dynamic", panel=_NETWORK, metavar="NAME:AXIS", note="repeatable")]
Opset = Annotated[int | None, _recipe_option("opset", panel=_TARGET, metavar="N")]
Ir = Annotated[int | None, _recipe_option("ir", panel=_TARGET, metavar="N")]
OutputNames = Annotated[str | None, _recipe_option("output_names", panel=_TARGET, metavar="NAME,...")]
Metadata = Annotated[
    list[str] | None, _recipe_option("metadata", panel=_TARGET, metavar="KEY=VALUE", note="repeatable")
]
Labels = Annotated[str | None, _recipe_option("labels", panel=_TARGET, metavar="FILE")]
Frontend = Annotated[str | None, _recipe_option("frontend", panel=_NETWORK, metavar="NAME")]
Data = Annotated[str | None, _recipe_option("data", panel=_DATA, metavar="SPEC")]
TaskName = Annotated[str | None, _recipe_option("task", panel=_DATA, metavar="NAME")]
Loss = Annotated[str | None, _recipe_option("loss", panel=_DATA, metavar="FILE.py:NAME")]
Metric = Annotated[str | None, _recipe_option("metric", panel=_DATA, metavar="NAME")]
ScoredOutput = Annotated[str | None, _recipe_option("output", panel=_DATA, metavar="NAME")]
Targets = Annotated[str | None, _recipe_option("targets", panel=_DATA, metavar="KEY")]
Tokenizer = Annotated[str | None, _recipe_option("tokenizer", panel=_DATA, metavar="FILE")]
Normalize = Annotated[str | None, _recipe_option("normalize", panel=_DATA)]
Calibrate = Annotated[int | None, _recipe_option("calibrate", panel=_DATA, metavar="N")]
Eval = Annotated[int | None, _recipe_option("eval", panel=_DATA, metavar="N")]
Target = Annotated[str | None, _recipe_option("target", panel=_TARGET)]
Precision = Annotated[str | None, _recipe_option("precision", panel=_TARGET)]
Threads = Annotated[int | None, _recipe_option("threads", panel=_TARGET, metavar="N")]
Grain = Annotated[int | None, _recipe_option("grain", panel=_TARGET, metavar="N")]
Budget = Annotated[list[str] | None, _recipe_option("budget", panel=_CHOICE, metavar="NAME=SHARE", note="repeatable")]
Goal = Annotated[str | None, _recipe_option("goal", panel=_CHOICE, metavar="NAME")]
Decompose = Annotated[str | None, _recipe_option("decompose", panel=_CHOICE, metavar="NAME,...")]
Ranks = Annotated[str | None, _recipe_option("ranks", panel=_CHOICE, metavar="SELECTOR")]
Importance = Annotated[str | None, _recipe_option("importance", panel=_CHOICE, metavar="SCORE")]
Plan = Annotated[str | None, _recipe_option("plan", panel=_CHOICE, metavar="plan.json")]
Tune = Annotated[str | None, _recipe_option("tune", panel=_CHOICE, metavar="OPTIONS", note="in demo epochs=1")]
KeepDense = Annotated[list[str] | None, _recipe_option("keep_dense", panel=_CHOICE, metavar="GLOB", note="repeatable")]
KeepFp32 = Annotated[list[str] | None, _recipe_option("keep_fp32", panel=_CHOICE, metavar="GLOB", note="repeatable")]
MaxDrop = Annotated[str | None, _recipe_option("max_drop", panel=_CHOICE, metavar="DROP")]
MinSpeedup = Annotated[float | None, _recipe_option("min_speedup", panel=_CHOICE, metavar="X")]
Pipeline = Annotated[str | None, _recipe_option("pipeline", panel=_CHOICE, metavar="PASS,...")]
Jobs = Annotated[int | None, _recipe_option("jobs", panel=_RUN, metavar="N")]
Seed = Annotated[int | None, _recipe_option("seed", panel=_RUN, metavar="N")]

# Options of the commands.
RecipeName = Annotated[
    str | None,
    _option("Set all of these options from a shipped recipe or a TOML file; flags override it."),
]
Out = Annotated[Path | None, _option("Folder or file to write the result to.", "--out", "-o")]
Resume = Annotated[bool, _option("Continue an interrupted run of the same command.", "--resume")]
DryRun = Annotated[bool, _option("Print the recipe and the pipeline, and stop.", "--dry-run")]
Json = Annotated[bool, _option("Write JSON, and nothing else, to stdout.", "--json")]
Verbose = Annotated[bool, _option("Log everything, and seconds by layer and form; tracebacks.", "--verbose", "-v")]
Quiet = Annotated[bool, _option("Show no progress and no warnings.", "--quiet", "-q")]

Points = Annotated[int, _option("Number of budgets to compile at.", panel=_CHOICE, metavar="N", min=2, max=100)]
Methods = Annotated[
    str | None,
    _option("Decompositions to study; default cp4,tucker2,tt.", panel=_CHOICE, metavar="NAME,..."),
]
Compressions = Annotated[
    str | None,
    _option(
        "Shares of a layer's weights to remove; default 0.5,0.75,0.9.",
        panel=_CHOICE,
        metavar="SHARE,...",
    ),
]
Layers = Annotated[
    list[str] | None,
    _option(
        "Layers to compress, one at a time; repeatable; default all but the first and the last.",
        panel=_CHOICE,
        metavar="GLOB",
    ),
]
Seeds = Annotated[
    int,
    _option("Number of seeds, each with its own calibration sample and tuning.", panel=_CHOICE, metavar="N", min=1),
]
Ray = Annotated[bool, _option("Spread the cells over the Ray cluster of RAY_ADDRESS, or a local one.", "--ray")]

Model = Annotated[Path, typer.Argument(help="An ONNX file.", metavar="A.onnx")]
Models = Annotated[list[Path], typer.Argument(help="ONNX files that take the same inputs.", metavar="A.onnx...")]
Against = Annotated[
    str,
    _option(
        "An ONNX file, a SOURCE, or a folder that 'compile' wrote.",
        panel=_NETWORK,
        metavar="B.onnx|SOURCE",
    ),
]
Rtol = Annotated[float | None, _option("Allowed difference, relative to the largest output.", min=0.0)]
Atol = Annotated[float | None, _option("Allowed absolute difference.", min=0.0)]
Localise = Annotated[
    bool, _option("Also name the layer of the network where fp32 and fp64 part.", "--localise", "--localize")
]
Batch = Annotated[int | None, _option("Samples in one timed run; default 1.", panel=_TARGET, metavar="N", min=1)]
Seconds = Annotated[float, _option("Time to measure, for all models together.", min=0.0)]
Kind = Annotated[str | None, typer.Argument(help="What to list; by default everything.", metavar="KIND")]
Schema = Annotated[bool, _option("Print the JSON schema of report.json.", "--schema")]
