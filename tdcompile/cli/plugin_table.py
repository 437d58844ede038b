"""The work of ``list``: tables of everything that is registered, with its options."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from rich.table import Table
from rich.text import Text

from tdcompile.artifact.report import Report
from tdcompile.cli.console import Answer
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
from tdcompile.recipes import recipes
from tdcompile.support.options import text_of

Listed = dict[str, dict[str, Any]]


def report_schema() -> Answer:
    """Return the JSON schema of ``report.json``."""
    return Answer((Report.schema_json(),))


def list_plugins(kind: str | None, *, as_json: bool) -> Answer:
    """List what is registered, of one kind or of all kinds.

    Raises:
        InputError: there is no such kind.
    """
    if kind is not None and kind not in _KINDS:
        raise InputError(f"there is nothing to list called '{kind}': {nearest(kind, _KINDS)}")
    found = {name: listed() for name, listed in _KINDS.items() if kind in (None, name)}
    if as_json:
        return Answer((json.dumps(found, indent=1),))
    return Answer(tuple(_listing(name, entries) for name, entries in found.items()))


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


# The kinds that can be listed, and the function that lists each.
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
