"""From flags to what is compiled: the recipe they make, and the network, inputs and data that it names."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdcompile.cli.example_inputs import draw_arguments, parse_example
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.importance import Importance
from tdcompile.core.network import Network
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.registry import make
from tdcompile.core.spec import split
from tdcompile.data.task import Task
from tdcompile.errors import InputError
from tdcompile.frontend.load_network import load_source, load_weights
from tdcompile.ir.facts import Facts
from tdcompile.ir.plan import RankPlan
from tdcompile.ir.target import Budget, Cost
from tdcompile.recipes import Recipe, load_recipe

log = logging.getLogger("tdcompile")


@dataclass(frozen=True)
class Job:
    """What a recipe names, loaded."""

    module: nn.Module
    inputs: tuple[Tensor, ...] | dict[str, Tensor]
    task: Task


def recipe_of(given: Mapping[str, Any]) -> Recipe:
    """The recipe that flags make: those that were given, over the one they name, over the defaults; checked.

    Raises:
        InputError: an option, plug-in or recipe is unknown, or a value cannot be used.
    """
    flags = {name: value for name in Recipe.model_fields if (value := given.get(name)) not in (None, [])}
    if "budget" in flags:
        flags["budget"] = Budget.parse(flags["budget"]).shares
    if "decompose" in flags:
        flags["decompose"] = tuple(split(flags["decompose"]))
    recipe = _completed(load_recipe(given.get("recipe"), {k: _frozen(v) for k, v in flags.items()}))
    if recipe.source and recipe.data is None and (idle := [name for name in ("calibrate", "eval") if name in flags]):
        raise InputError(f"--{idle[0]} {flags[idle[0]]} counts samples, and there are no data: give --data")
    _check(recipe)
    return recipe


def load_module(recipe: Recipe) -> nn.Module:
    """The network with its weights.

    Raises:
        InputError: no source, or it or the weights cannot be used.
    """
    if recipe.source is None:
        raise InputError("give a SOURCE: file.py:callable, package.module:callable, or one of 'tdcompile list models'")
    torch.manual_seed(recipe.seed)  # the user's callable may draw its weights: one seed, one network
    module, _ = load_source(recipe.source)
    if recipe.weights is not None:
        load_weights(module, Path(recipe.weights))
    elif any(parameter.is_meta for parameter in module.parameters()):
        raise InputError(f"'{recipe.source}' makes a network without weights, on the meta device: give --weights")
    return module


def load_network(recipe: Recipe) -> tuple[nn.Module, tuple[Tensor, ...] | dict[str, Tensor]]:
    """The network with its weights, and example inputs: in the order of its arguments, or by name where they have one.

    Raises:
        InputError: no source, or it, the weights or the inputs cannot be used.
    """
    module = load_module(recipe)
    return module, draw_arguments(recipe.input, module, recipe.seed)


def load_job(recipe: Recipe) -> Job:
    """The network, its inputs, and the data.

    Raises:
        InputError: one of them cannot be used, or the data do not fit the first input.
        UnavailableError: a package that reads the data is missing.
    """
    module, inputs = load_network(recipe)
    if recipe.weights is None and ":" not in str(recipe.source):
        log.warning("%s has random weights: give --weights", recipe.source)
    first = next(iter(inputs.values() if isinstance(inputs, dict) else inputs))
    return Job(module, inputs, recipe.task(recipe.data, first))


def to_toml(recipe: Recipe) -> str:
    """The recipe as a file that ``--recipe`` reads; what is not set is left out."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    return "".join(f"{name} = {_toml(value)}\n" for name, value in values.items())


def _completed(recipe: Recipe) -> Recipe:
    """With what a registered network knows of itself: its input, and the weights that ship with it and their data."""
    if recipe.source is None or ":" in recipe.source or "/" in recipe.source or recipe.source.endswith(".py"):
        return recipe
    network, known = make(Network, recipe.source), dict[str, Any]()
    if not recipe.input:
        known["input"] = tuple("x".join(map(str, (1, *shape))) for shape in network.input_shapes)
    if recipe.weights is None and network.checkpoint is not None and not network.spec().options:
        known["weights"] = str(Path(inspect.getfile(type(network))).with_name(network.checkpoint))
        if recipe.data is None:
            known["data"] = network.data
    return recipe.model_copy(update=known)


def _check(recipe: Recipe) -> None:
    """Find what is wrong with a recipe in milliseconds, before a network is loaded or a layer measured."""
    recipe.shares()
    for text in recipe.input:
        parse_example(text)
    make(RankSelector, recipe.ranks)
    make(Importance, recipe.importance)
    for text in recipe.decompose:
        if text != "auto":
            make(Decomposition, text)
    pipeline = recipe.steps()
    pipeline.check(Facts(RankPlan({}, Cost(), Cost())) if recipe.plan else None, planned=True)
    if pipeline.trainer and recipe.source and recipe.data is None:
        raise InputError(f"'{pipeline.trainer}' trains, and there is nothing to train on: give --data")


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_toml(item)}' for key, item in value.items())} }}"
    return json.dumps(value, ensure_ascii=False)  # of texts, numbers, truths and lists, JSON is TOML too
