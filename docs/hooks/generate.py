"""mkdocs hooks: expand patterns in the navigation, and fill in the parts of pages generated from the code.

A page marks a part with a comment on a separate line: ``<!-- generated: KIND ARGUMENT -->``.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from command_pages import command_reference
from drawings import draw_decompositions, draw_pipeline
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from plugin_pages import code_table, option_table, plugin_reference, recipe_table

from tdcompile.ir.diagnostics import DiagnosticCode, ReasonCode

ROOT = Path(__file__).resolve().parent.parent.parent
DIRECTIVE = re.compile(r"^<!-- generated: (\S+)(?: (\S+))? -->$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace every ``*`` pattern of the navigation with the pages that match it."""
    config.nav = expand(config.nav, Path(config.docs_dir))
    return config


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace every directive of a page.

    Raises:
        PluginError: a directive asks for a part that does not exist.
    """

    def part(match: re.Match[str]) -> str:
        kind, argument = match[1], match[2] or ""
        if kind not in PARTS:
            raise PluginError(f"{page.file.src_uri}: no part '{kind}'; known: {', '.join(sorted(PARTS))}")
        return PARTS[kind](argument)

    return DIRECTIVE.sub(part, markdown)


def expand(nav: Any, docs: Path) -> Any:
    """Return the navigation with patterns replaced by pages, ``index.md`` first and the others by name."""
    if isinstance(nav, Mapping):
        return {title: expand(entry, docs) for title, entry in nav.items()}
    if not isinstance(nav, list):
        return nav
    entries = []
    for entry in nav:
        if isinstance(entry, str) and "*" in entry:
            pages = sorted(docs.glob(entry), key=lambda page: (page.name != "index.md", page.name))
            entries += [page.relative_to(docs).as_posix() for page in pages]
        else:
            entries.append(expand(entry, docs))
    return entries


def project_file(name: str) -> str:
    """Return a Markdown file of the repository's root, with ``docs/`` links made relative to ``docs/project/``."""
    return re.sub(r"\]\(docs/", "](../", (ROOT / name).read_text(encoding="utf-8"))


def public_names(module: str) -> str:
    """Return an mkdocstrings directive for each public name of a module, functions before classes."""
    public = importlib.import_module(module)
    names = sorted(public.__all__, key=lambda name: (isinstance(getattr(public, name), type), name.lower()))
    return "\n\n".join(f"::: {module}.{name}" for name in names)


PARTS: Mapping[str, Callable[[str], str]] = {
    "api": public_names,
    "commands": lambda _: command_reference(),
    "decompositions": lambda _: draw_decompositions(),
    "diagnostics": lambda _: code_table(DiagnosticCode),
    "file": project_file,
    "options": lambda _: option_table(),
    "pipeline": lambda _: draw_pipeline(),
    "plug-ins": plugin_reference,
    "reasons": lambda _: code_table(ReasonCode),
    "recipes": lambda _: recipe_table(),
}
