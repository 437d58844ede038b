"""Import packages that are optional, or name the extra that installs them."""

from __future__ import annotations

import importlib
from typing import Any

from tdcompile.errors import UnavailableError


def import_optional(module: str, group: str = "data") -> Any:
    """Import and return a module.

    Args:
        module: its dotted name.
        group: the project's extra that installs it.

    Raises:
        UnavailableError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UnavailableError(f"'{package}' cannot be imported ({error}): pip install 'tdcompile[{group}]'") from error
