"""``tdcompile validate`` and ``bench``: ONNX models, or a model and its network, against each other."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from tdcompile.artifact.folder import load
from tdcompile.backend.parity import check_parity, compare_models
from tdcompile.backend.session import Timing, time_models
from tdcompile.cli.console import Answer
from tdcompile.cli.example_inputs import model_inputs
from tdcompile.cli.load_job import load_module, load_network, recipe_of
from tdcompile.core.registry import foreign_packages
from tdcompile.errors import InputError
from tdcompile.frontend.tracing import trace
from tdcompile.recipes import Recipe
from tdcompile.support.formatting import milliseconds, times

TRACED = 2  # samples in example inputs: exporters and tracers take a batch of 1 for a constant


def validate(given: Mapping[str, Any]) -> Answer:
    """How far a model is from another one, from a network, or from the network of an output folder.

    Raises:
        ParityError: further than the tolerance.
        InputError: they cannot be compared.
    """
    model, against = given["model"], given["against"]
    if not model.is_file():
        raise InputError(f"there is no model {model}")
    other = Path(against)
    network = not (other.suffix == ".onnx" or other.is_dir())
    recipe = recipe_of({**given, "source": against if network else None})
    target, seed = recipe.device(), recipe.seed
    how = {"rtol": given["rtol"], "atol": given["atol"], "seed": seed}
    if other.suffix == ".onnx":
        inputs = model_inputs(model, TRACED, seed, recipe.input) if recipe.input else None
        parity = compare_models(model, other, target, inputs=inputs, **how)
    elif network and recipe.input:
        program = trace(
            *load_network(recipe),
            frontend=recipe.frontend,
            dynamic_batch=recipe.dynamic_batch,
            dynamic=recipe.dynamic,
        )
        parity = check_parity(model, program.graph, program.inputs, target, axes=program.axes, **how)
    else:
        inputs = model_inputs(model, TRACED, seed, recipe.input)
        parity = check_parity(
            model, load_module(recipe) if network else load(other, foreign_packages()), inputs, target, **how
        )
    if given["json"]:
        return Answer((json.dumps(dataclasses.asdict(parity), indent=1),))
    table = Table(title=f"{model} against {against} on {parity.provider}", title_justify="left")
    for heading in ("batch", "seed", "largest difference"):
        table.add_column(heading, justify="right")
    for batch, draw, most in parity.cases:
        table.add_row(str(batch), str(draw), f"{most:.3g}")
    return Answer((table, f"they agree: max_abs {parity.max_abs:.3g}, max_rel {parity.max_rel:.3g}"))


def bench(given: Mapping[str, Any]) -> Answer:
    """Latencies, and how many times as fast as the first each one is.

    Raises:
        InputError: a model is missing, they take other inputs, or another batch than was asked for.
    """
    recipe = recipe_of(given)
    target = dataclasses.replace(recipe.device(), batch=_batch(given["models"][0], given["batch"], recipe))
    each = [model_inputs(model, target.batch, recipe.seed, recipe.input) for model in given["models"]]
    for model, inputs in zip(given["models"], each, strict=True):
        if [(x.shape, x.dtype) for x in inputs] != [(x.shape, x.dtype) for x in each[0]]:
            raise InputError(f"{model} takes other inputs than {given['models'][0]}, so their times do not compare")
    timings = time_models(given["models"], each[0], target, seconds=given["seconds"])
    ratios = [timings[0].median / timing.median for timing in timings]
    measured = list(zip(map(str, given["models"]), timings, ratios, strict=True))
    if given["json"]:
        rows = [{"model": model, **_milliseconds(timing), "ratio": ratio} for model, timing, ratio in measured]
        document = {"target": target.device, "threads": target.threads, "batch": target.batch, "models": rows}
        return Answer((json.dumps(document, indent=1),))
    title = f"{target.provider}, {target.threads} thread(s), batch {target.batch}, {timings[0].runs} runs in turns"
    table = Table("model", title=title, title_justify="left")
    for heading in ("median", "p10", "p90", "first / this"):
        table.add_column(heading, justify="right")
    for model, timing, ratio in measured:
        figures = [milliseconds(seconds * 1e3) for seconds in (timing.median, timing.p10, timing.p90)]
        table.add_row(model, *figures, times(ratio))
    return Answer((table,))


def _batch(model: Path, asked: int | None, recipe: Recipe) -> int:
    """Samples in one timed run: those asked for where the model leaves its batch open, else those that it takes.

    Raises:
        InputError: the model fixes another, or ``--input`` gives the batch already.
    """
    two, three = (model_inputs(model, size, recipe.seed, recipe.input) for size in (2, 3))
    if not recipe.input and any(x.shape != y.shape for x, y in zip(two, three, strict=True)):
        return asked or 1
    fixed = next((len(x) for x in two if x.dim()), 1)
    if asked not in (None, fixed):
        by = f"--input {' '.join(recipe.input)}" if recipe.input else str(model)
        raise InputError(f"{by} fixes the batch at {fixed}: --batch {asked} cannot be")
    return fixed


def _milliseconds(timing: Timing) -> dict[str, float]:
    figures = {"median_ms": timing.median, "p10_ms": timing.p10, "p90_ms": timing.p90}
    return {**{name: seconds * 1e3 for name, seconds in figures.items()}, "runs": timing.runs}
