"""Tables of the shipped plug-ins, recipes and codes, read from the registry, docstrings and enums."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import sys
from collections.abc import Mapping
from typing import Any

import griffe

from tdcompile.core.cost_model import CostModel
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.importance import Importance
from tdcompile.core.network import Network
from tdcompile.core.passes import Pass
from tdcompile.core.plugin import Plugin
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.registry import find
from tdcompile.ir.diagnostics import DiagnosticCode, ReasonCode
from tdcompile.recipe_options import RecipeOptions
from tdcompile.recipes import recipes
from tdcompile.support.options import describe, text_of, types_of

# Class docstrings omit types, because the fields have them; griffe would warn about that.
logging.getLogger("griffe").setLevel(logging.ERROR)

KINDS: Mapping[str, type[Plugin]] = {
    "passes": Pass,
    "decompositions": Decomposition,
    "selectors": RankSelector,
    "scores": Importance,
    "costs": CostModel,
    "networks": Network,
}


def plugin_reference(kind: str) -> str:
    """Return one section for each plug-in of a kind: summary, description, options."""
    return "\n\n".join(_section(name, plugin) for name, plugin in find(KINDS[kind]).items() if _ships(plugin))


def recipe_table() -> str:
    """Return the shipped recipes, each with its description and the options it sets."""
    lines = ["| recipe | description | options it sets |", "|---|---|---|"]
    for name, recipe in recipes().items():
        options = ", ".join(f"`{key}`" for key in recipe if key != "description") or "none"
        lines.append(f"| `{name}` | {recipe.get('description', '')} | {options} |")
    return "\n".join(lines)


def option_table() -> str:
    """Return the options of a recipe, which are the arguments of ``tdcompile.compile``: default and meaning."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for name, option in RecipeOptions.model_fields.items():
        default = f"`{option.default}`" if option.default not in (None, ()) else ""
        lines.append(f"| `{name}` | {default} | {_cell(option.description or '')} |")
    return "\n".join(lines)


def _ships(plugin: type[Plugin]) -> bool:
    """Return whether the plug-in belongs to the project and not to another installed package."""
    return plugin.__module__.startswith("tdcompile.")


def _section(name: str, plugin: type[Plugin]) -> str:
    sections = griffe.Docstring(inspect.getdoc(plugin) or "", lineno=1).parse("google")
    text = [section.value for section in sections if section.kind is griffe.DocstringSectionKind.text]
    meanings = {
        attribute.name: attribute.description
        for section in sections
        if section.kind is griffe.DocstringSectionKind.attributes
        for attribute in section.value
    }
    parts = [f"### `{name}`", *text, *_background(plugin)]
    kinds = types_of(plugin)
    if fields := dataclasses.fields(plugin):
        rows = [
            f"| `{f.name}` | `{_default(f)}` | {_cell(describe(kinds[f.name]))} | {_cell(meanings.get(f.name, ''))} |"
            for f in fields
        ]
        parts.append("\n".join(["| option | default | values | meaning |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _background(plugin: type[Plugin]) -> list[str]:
    """Return the module docstring after its first sentence if the module holds only this plug-in."""
    module = sys.modules[plugin.__module__]
    members = [m for m in vars(module).values() if isinstance(m, type) and m.__module__ == module.__name__]
    if [m for m in members if issubclass(m, Plugin)] != [plugin]:
        return []
    _, _, rest = (inspect.getdoc(module) or "").partition("\n\n")
    return [rest] if rest else []


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return text_of(field.default) or '""'
    return "required" if field.default_factory is dataclasses.MISSING else text_of(field.default_factory())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def code_table(codes: type[DiagnosticCode] | type[ReasonCode]) -> str:
    """Return a table of codes and their meanings."""
    rows = [f"| `{code}` | {code.meaning} |" for code in codes]
    return "\n".join(["| code | meaning |", "|---|---|", *rows])
