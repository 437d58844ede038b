"""``tdcompile analyze`` and ``list``: they look and change nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from tdcompile.artifact.report import Report
from tdcompile.cli.console import Answer, tell
from tdcompile.cli.layer_table import ENERGIES, LayerAnatomy, anatomy
from tdcompile.cli.load_job import load_network, recipe_of
from tdcompile.core.cost_model import CostModel
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.importance import Importance
from tdcompile.core.network import Network
from tdcompile.core.passes import Pass
from tdcompile.core.plugin import Plugin
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.registry import find
from tdcompile.data.loading import kinds
from tdcompile.errors import InputError, nearest
from tdcompile.frontend.tracing import trace
from tdcompile.recipes import recipes
from tdcompile.support.formatting import count
from tdcompile.support.options import text_of

Listed = dict[str, dict[str, Any]]


def analyze(given: Mapping[str, Any]) -> Answer:
    """A table of the layers."""
    recipe = recipe_of(given)
    program = trace(*load_network(recipe), frontend=recipe.frontend, dynamic_batch=recipe.dynamic_batch)
    layers = anatomy(program)
    if given["json"]:
        return Answer((json.dumps([dataclasses.asdict(layer) for layer in layers], indent=1),))
    if not given["quiet"]:
        for note in program.history:
            tell(f"note: {getattr(note, 'text', note)}")
    return Answer((_layers(layers),))


def list_plugins(given: Mapping[str, Any]) -> Answer:
    """What is registered, of one kind or of all.

    Raises:
        InputError: there is no such kind.
    """
    if given["schema"]:
        return Answer((Report.schema_json(),))
    kind = given["kind"]
    if kind is not None and kind not in _KINDS:
        raise InputError(f"there is nothing to list called '{kind}': {nearest(kind, _KINDS)}")
    found = {name: listed() for name, listed in _KINDS.items() if kind in (None, name)}
    if given["json"]:
        return Answer((json.dumps(found, indent=1),))
    return Answer(tuple(_listing(name, entries) for name, entries in found.items()))


def _layers(layers: list[LayerAnatomy]) -> Table:
    shares = "/".join(f"{energy:.0%}" for energy in ENERGIES)
    table = Table(title="layers", title_justify="left")
    for heading in ("layer", "kind", "weight", "stride"):
        table.add_column(heading, overflow="fold")
    for heading in ("params", "MACs", "break-even", f"out {shares}", f"in {shares}"):
        table.add_column(heading, justify="right")
    table.add_column("decompositions that apply", overflow="fold")
    for layer in layers:
        ranks = ["/".join(map(str, layer.energy_ranks[mode])) for mode in ("out", "in")]
        shapes = ["×".join(map(str, shape)) for shape in (layer.weight, layer.stride)]
        figures = [count(layer.params), count(layer.macs), str(layer.break_even), *ranks]
        forms = ", ".join(layer.forms) or f"none: {_commonest(layer)}"
        table.add_row(*map(Text, (layer.name, layer.kind, *shapes, *figures, forms)))
    return table


def _commonest(layer: LayerAnatomy) -> str:
    reasons = list(layer.refusals.values())
    return max(reasons, key=reasons.count, default="no decomposition is registered")


def _listing(kind: str, entries: Listed) -> Table:
    table = Table(title=kind, title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("what it is", ratio=2)
    table.add_column("options and their defaults", ratio=1)
    for name, entry in entries.items():
        options = ", ".join(f"{option}={text_of(value)}" for option, value in entry["options"].items())
        table.add_row(*map(Text, (name, entry["summary"], options)))
    return table


def _registered(kind: type[Plugin]) -> Callable[[], Listed]:
    return lambda: {
        name: {"summary": plugin.summary(), "options": {field.name: _default(field) for field in _fields(plugin)}}
        for name, plugin in find(kind).items()
    }


def _fields(plugin: type[Plugin]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(plugin)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else "needed"


def _recipes() -> Listed:
    return {
        name: {
            "summary": recipe.get("description", ""),
            "options": {k: v for k, v in recipe.items() if k != "description"},
        }
        for name, recipe in recipes().items()
    }


# What each kind that can be listed holds.
_KINDS: dict[str, Callable[[], Listed]] = {
    "passes": _registered(Pass),
    "decompositions": _registered(Decomposition),
    "selectors": _registered(RankSelector),
    "scores": _registered(Importance),
    "costs": _registered(CostModel),
    "models": _registered(Network),
    "data": lambda: {form: {"summary": about, "options": {}} for form, about in kinds().items()},
    "recipes": _recipes,
}
