"""The command reference, read from the click commands that typer builds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import typer

from tdcompile.cli.main import app


def root() -> Any:
    """Return the click command ``tdcompile``."""
    return typer.main.get_command(app)


def command_reference() -> str:
    """Return one section for each command: usage, purpose, arguments and options."""
    group = root()
    return "\n\n".join(_section(name, command) for name, command in group.commands.items())


def _section(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join([f"tdcompile {name}", *(_metavar(a) for a in arguments), "[OPTIONS]"])
    parts = [f"## `{name}`", (command.help or "").strip(), f"```console\n{usage}\n```"]
    if arguments:
        parts.append(_table(("argument", "meaning"), ((f"`{_metavar(a)}`", _meaning(a)) for a in arguments)))
    for panel, members in _by_panel(options).items():
        rows = ((_names(o), f"`{_value(o)}`" if _value(o) else "", _meaning(o)) for o in members)
        parts += [f"**{panel}**", _table(("option", "value", "meaning"), rows)]
    return "\n\n".join(parts)


def _by_panel(options: Iterable[Any]) -> dict[str, list[Any]]:
    panels: dict[str, list[Any]] = {}
    for option in options:
        panels.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(option)
    return panels


def _names(option: Any) -> str:
    return ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _value(option: Any) -> str:
    """Return the value that follows the option on the command line; empty for a switch."""
    if option.is_flag:
        return ""
    return str(option.metavar or option.name.upper())


def _meaning(parameter: Any) -> str:
    text = (parameter.help or "").strip()
    if parameter.required:
        text += " Required."
    default = parameter.default
    # An option that is off, empty or set by the recipe has no default to show.
    if isinstance(default, int | float | str) and default not in (False, ""):
        text += f" Default: `{default}`."
    return text


def _table(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
