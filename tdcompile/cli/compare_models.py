"""The work of ``validate`` and ``bench``: compare ONNX models with each other, or a model with its network."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import fx

from tdcompile.artifact.folder import load
from tdcompile.backend.parity import check_parity, compare_models
from tdcompile.backend.rounding import Parting, first_parting
from tdcompile.backend.session import Timing, time_models
from tdcompile.cli.console import Answer
from tdcompile.cli.example_inputs import model_inputs
from tdcompile.cli.load_job import load_module, load_network, recipe_of
from tdcompile.core.registry import foreign_packages
from tdcompile.errors import InputError, ParityError
from tdcompile.frontend.tracing import trace
from tdcompile.recipes import Recipe
from tdcompile.support.formatting import milliseconds, times

UNKNOWN = "the network's graph does not run in fp64, so that fp32 cannot be compared with it"
TRACED = 2  # samples in example inputs: exporters and tracers treat a batch of 1 as a constant


def validate_model(
    model: Path,
    against: str,
    flags: Mapping[str, Any],
    tolerances: Mapping[str, float | None],
    *,
    localise: bool,
    as_json: bool,
) -> Answer:
    """Compare a model with another one, with a network, or with the network of an output folder.

    Args:
        model: the ONNX file.
        against: a model, an output folder, or the source of a network.
        flags: the options of the command.
        tolerances: ``rtol`` and ``atol``.
        localise: also say at which node of the network's graph fp32 and fp64 part.
        as_json: answer in JSON.

    Raises:
        ParityError: their outputs differ by more than the tolerance.
        InputError: they cannot be compared, or the other one has no graph to look into.
    """
    if not model.is_file():
        raise InputError(f"there is no model {model}")
    other = Path(against)
    network = not (other.suffix == ".onnx" or other.is_dir())
    recipe = recipe_of({**flags, "source": against if network else None})
    target, seed = recipe.device(), recipe.seed
    if recipe.example is not None and not network:
        raise InputError("--example holds the arguments of a network: give its SOURCE as --against, or leave it out")
    how: dict[str, Any] = {**tolerances, "seed": seed}
    if localise and (other.suffix == ".onnx" or (network and not (recipe.input or recipe.example))):
        raise InputError(
            "--localise looks into the graph of a PyTorch network: give an output folder as --against, or a SOURCE "
            "with --input or --example"
        )
    parting: Parting | None = None
    if other.suffix == ".onnx":
        inputs = model_inputs(model, TRACED, seed, recipe.input) if recipe.input else None
        parity = compare_models(model, other, target, inputs=inputs, **how)
    elif network and (recipe.input or recipe.example):
        program = trace(
            *load_network(recipe),
            frontend=recipe.frontend,
            dynamic_batch=recipe.dynamic_batch,
            dynamic=recipe.dynamic,
            batch_axis=recipe.batch_axis,
        )
        parting = first_parting(program.graph, program.inputs) if localise else None
        with _told(parting):
            parity = check_parity(
                model, program.graph, program.inputs, target, axes=program.axes, batch_axes=program.batch_axes, **how
            )
    else:
        inputs = model_inputs(model, TRACED, seed, recipe.input)
        held = load_module(recipe) if network else load(other, foreign_packages())
        parting = first_parting(held, inputs) if localise and isinstance(held, fx.GraphModule) else None
        with _told(parting):
            parity = check_parity(model, held, inputs, target, **how)
    if as_json:
        found = dataclasses.asdict(parity) | ({"parting": parting and dataclasses.asdict(parting)} if localise else {})
        return Answer((json.dumps(found, indent=1),))
    table = Table(title=f"{model} against {against} on {parity.provider}", title_justify="left")
    for heading in ("batch", "seed", "largest difference"):
        table.add_column(heading, justify="right")
    for batch, draw, most in parity.cases:
        table.add_row(str(batch), "example" if draw is None else str(draw), f"{most:.3g}")
    notes = [note.text for note in parity.notes]
    notes += [str(parting or UNKNOWN)] if localise else []
    return Answer((table, *notes, f"they agree: max_abs {parity.max_abs:.3g}, max_rel {parity.max_rel:.3g}"))


@contextmanager
def _told(parting: Parting | None) -> Iterator[None]:
    """Add to a parity error where fp32 and fp64 part, if that is known."""
    try:
        yield
    except ParityError as error:
        raise (ParityError(f"{error}; {parting}") if parting is not None else error) from None


def bench_models(models: Sequence[Path], recipe: Recipe, batch: int | None, seconds: float, *, as_json: bool) -> Answer:
    """Measure latencies, and the speed of each model relative to the first.

    Raises:
        InputError: a model is missing, or takes other inputs than the first, or another batch than was asked for.
    """
    target = dataclasses.replace(recipe.device(), batch=_batch(models[0], batch, recipe))
    each = [model_inputs(model, target.batch, recipe.seed, recipe.input) for model in models]
    for model, inputs in zip(models, each, strict=True):
        if [(x.shape, x.dtype) for x in inputs] != [(x.shape, x.dtype) for x in each[0]]:
            raise InputError(f"{model} takes other inputs than {models[0]}, so their times cannot be compared")
    timings = time_models(models, each[0], target, seconds=seconds)
    measured = list(zip(map(str, models), timings, strict=True))
    if as_json:
        rows = [{"model": name, **_milliseconds(timing), **_ratio(timing)} for name, timing in measured]
        document = {"target": target.device, "threads": target.threads, "batch": target.batch, "models": rows}
        return Answer((json.dumps(document, indent=1),))
    title = f"{target.provider}, {target.threads} thread(s), batch {target.batch}, {timings[0].runs} runs in turns"
    table = Table("model", title=title, title_justify="left")
    for heading in ("median", "p10", "p90", "first / this"):
        table.add_column(heading, justify="right")
    for name, timing in measured:
        figures = [milliseconds(seconds * 1e3) for seconds in (timing.median, timing.p10, timing.p90)]
        ratio = timing.speedup
        between = f" ({ratio.low:.2f}–{ratio.high:.2f})" if ratio.low < ratio.high else ""
        table.add_row(name, *figures, f"{times(ratio.value)}{between}")
    return Answer((table,))


def _batch(model: Path, asked: int | None, recipe: Recipe) -> int:
    """Return the samples in one timed run: those asked for if the model leaves its batch open, else the fixed number.

    Raises:
        InputError: the model or ``--input`` fixes another number.
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


def _ratio(timing: Timing) -> dict[str, Any]:
    return {"ratio": timing.speedup.value, "ratio_interval": [timing.speedup.low, timing.speedup.high]}
