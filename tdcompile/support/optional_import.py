"""Packages that only some installs have: import one, or say which extra brings it."""

from __future__ import annotations

import importlib
from typing import Any

from tdcompile.errors import UnavailableError


def import_optional(module: str, group: str = "data") -> Any:
    """The module, imported now; ``group`` is the project's extra that installs it.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UnavailableError(f"'{package}' cannot be imported ({error}): pip install 'tdcompile[{group}]'") from error
