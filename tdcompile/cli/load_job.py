"""From flags to a recipe, and from a recipe to its network, inputs and data."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdcompile.cli.example_file import check_agreement, read_example
from tdcompile.cli.example_inputs import check_data_ranges, draw_arguments, parse_example
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.importance import Importance
from tdcompile.core.network import Network
from tdcompile.core.plan import RankPlan
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.registry import make
from tdcompile.data.task import Task
from tdcompile.errors import InputError
from tdcompile.frontend.load_network import load_source, load_weights
from tdcompile.frontend.signature import Call
from tdcompile.frontend.wrappers import unwrapped
from tdcompile.ir.diagnostics import Diagnostic
from tdcompile.ir.facts import Facts
from tdcompile.ir.target import Budget, Cost
from tdcompile.recipes import Recipe, load_recipe
from tdcompile.support.spec import split

_CHECKED = 256  # samples of the data that are compared with the ranges of inputs
log = logging.getLogger("tdcompile")


@dataclass(frozen=True)
class Job:
    """The network, inputs and data of a recipe.

    Attributes:
        notes: where the weights were found in their file.
    """

    module: nn.Module
    inputs: tuple[Any, ...] | dict[str, Any]
    task: Task
    notes: tuple[Diagnostic, ...] = ()


def recipe_of(given: Mapping[str, Any]) -> Recipe:
    """Make a recipe of the flags given, the recipe they name and the defaults, in this order, and check it.

    Raises:
        InputError: an option, plug-in or recipe is unknown, or a value does not fit.
    """
    flags = {name: value for name in Recipe.model_fields if (value := given.get(name)) not in (None, [])}
    if "budget" in flags:
        flags["budget"] = Budget.parse(flags["budget"]).shares
    if "decompose" in flags:
        flags["decompose"] = tuple(split(flags["decompose"]))
    recipe = _completed(load_recipe(given.get("recipe"), {k: _frozen(v) for k, v in flags.items()}))
    if recipe.source and recipe.data is None and (idle := [name for name in ("calibrate", "eval") if name in flags]):
        raise InputError(f"--{idle[0]} {flags[idle[0]]} counts samples, but there is no data: give --data")
    _check(recipe)
    return recipe


def source_of(recipe: Recipe) -> str:
    """Return the recipe's source.

    Raises:
        InputError: it has none.
    """
    if recipe.source is None:
        raise InputError("give a SOURCE: file.py:callable, package.module:callable, or one of 'tdcompile list models'")
    return recipe.source


def load_module(recipe: Recipe) -> nn.Module:
    """Load the network with its weights, and log where they were found.

    Raises:
        InputError: the source is missing, or the source or the weights cannot be used.
    """
    module, notes = _module_and_notes(recipe)
    for note in notes:
        log.warning("%s", note.text)
    return module


def _module_and_notes(recipe: Recipe) -> tuple[nn.Module, tuple[Diagnostic, ...]]:
    torch.manual_seed(recipe.seed)  # the user's callable may draw random weights: a seed gives one network
    module, _ = load_source(source_of(recipe))
    if recipe.weights is not None:
        return module, load_weights(module, recipe.weights)
    if any(parameter.is_meta for parameter in module.parameters()):
        raise InputError(f"'{recipe.source}' makes a network on the meta device, without weights: give --weights")
    return module, ()


def load_network(recipe: Recipe) -> tuple[nn.Module, tuple[Any, ...] | dict[str, Any]]:
    """Load the network and its example inputs, in the order of its arguments or by name.

    Raises:
        InputError: the source is missing, or the source, the weights or the inputs cannot be used.
    """
    module = load_module(recipe)
    return module, example_inputs(recipe, module)


def example_inputs(recipe: Recipe, module: nn.Module) -> tuple[Any, ...] | dict[str, Any]:
    """Return the inputs in the example file, checked against ``input``; without a file draw them.

    Raises:
        InputError: the file cannot be used, or the inputs do not fit the network or each other.
    """
    if recipe.example is None:
        return draw_arguments(recipe.input, module, recipe.seed)
    path = Path(recipe.example)
    held = read_example(path)
    check_agreement(recipe.input, held, module, path)
    return held


def load_job(recipe: Recipe) -> Job:
    """Load the network, its inputs and the data.

    Raises:
        InputError: one of them cannot be used, or the data does not fit the first input.
        UnavailableError: a package that reads the data is missing.
    """
    module, notes = _module_and_notes(recipe)
    inputs = example_inputs(recipe, module)
    if recipe.weights is None and ":" not in str(recipe.source):
        log.warning("%s has random weights: give --weights", recipe.source)
    call = Call.of(unwrapped(module), inputs)
    task = recipe.make_task(recipe.data, call.tensors, call.names)
    samples = task.train or task.test
    if samples is not None and len(samples) and any("[" in text for text in recipe.input):
        check_data_ranges(recipe.input, call.names, next(samples.batches(_CHECKED)).inputs)
    return Job(module, inputs, task, notes)


def to_toml(recipe: Recipe) -> str:
    """Write the recipe in the form that ``--recipe`` reads, without the options that are None."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    return "".join(f"{name} = {_toml(value)}\n" for name, value in values.items())


def _completed(recipe: Recipe) -> Recipe:
    """Add the input of a registered network, and the weights and data that ship with it."""
    if recipe.source is None or ":" in recipe.source or "/" in recipe.source or recipe.source.endswith(".py"):
        return recipe
    network, known = make(Network, recipe.source), dict[str, Any]()
    if not recipe.input and recipe.example is None:
        known["input"] = tuple("x".join(map(str, (1, *shape))) for shape in network.input_shapes)
    if recipe.weights is None and network.checkpoint is not None and not network.spec().options:
        known["weights"] = str(Path(inspect.getfile(type(network))).with_name(network.checkpoint))
        if recipe.data is None:
            known["data"] = network.data
    return recipe.model_copy(update=known)


def _check(recipe: Recipe) -> None:
    """Check a recipe before a network is loaded or a layer measured; takes milliseconds."""
    recipe.shares()
    for text in recipe.input:
        parse_example(text)
    make(RankSelector, recipe.ranks)
    make(Importance, recipe.importance)
    for text in recipe.decompose:
        if text != "auto":
            make(Decomposition, text)
    recipe.onnx(), recipe.class_names()
    pipeline = recipe.steps()
    pipeline.check(Facts(RankPlan({}, Cost(), Cost())) if recipe.plan is not None else None, planned=True)
    if pipeline.trainer and recipe.source and recipe.data is None:
        raise InputError(f"'{pipeline.trainer}' trains, but there are no training samples: give --data")


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{_toml_key(key)} = {_toml(item)}' for key, item in value.items())} }}"
    return json.dumps(value, ensure_ascii=False)  # JSON and TOML write texts, numbers, booleans and lists alike


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)
