"""The text form of a plug-in with its options, ``name{key=value,key=value}``, and of lists of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from tdcompile.errors import InputError

_SPEC = re.compile(r"^(?P<name>[A-Za-z][\w.-]*)(?:\{(?P<options>.*)\})?$", re.DOTALL)


@dataclass(frozen=True)
class Spec:
    """The name of a plug-in and its options, all as text."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.options:
            return self.name
        return f"{self.name}{{{','.join(f'{key}={value}' for key, value in self.options.items())}}}"


def parse_spec(text: str) -> Spec:
    """Read one ``name{key=value,...}``.

    Raises:
        InputError: the text is malformed, or an option is given twice.
    """
    match = _SPEC.match(text.strip())
    if match is None:
        raise InputError(f"'{text}' must have the form name or name{{option=value,...}}")
    return Spec(match["name"], parse_options(match["options"] or ""))


def parse_specs(text: str) -> list[Spec]:
    """Read a comma-separated list of specs; commas inside braces separate options.

    Raises:
        InputError: a member is malformed or empty, or the braces do not match.
    """
    return [parse_spec(part) for part in split(text)]


def parse_options(text: str) -> dict[str, str]:
    """Read ``key=value,key=value``.

    Raises:
        InputError: a member has no ``=``, or a key is given twice.
    """
    options: dict[str, str] = {}
    for part in split(text) if text.strip() else []:
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise InputError(f"'{part}' must have the form option=value")
        if key.strip() in options:
            raise InputError(f"option '{key.strip()}' is given twice in '{text}'")
        options[key.strip()] = value.strip()
    return options


def split(text: str) -> list[str]:
    """Split at the commas outside braces.

    Raises:
        InputError: a part is empty, or the braces do not match.
    """
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth < 0:
            break
        if character == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    parts.append(text[start:].strip())
    if depth != 0:
        raise InputError(f"the braces in '{text}' do not match")
    if not all(parts):
        raise InputError(f"'{text}' has an empty member between its commas")
    return parts
