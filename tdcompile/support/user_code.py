"""Load the user's own code, ``path/to/file.py:name`` or ``package.module:name``; no other code is ever executed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from tdcompile.errors import InputError, TdcompileError, nearest

# Prefix of the module name of a user's file, so that it does not hide a module with the name of its stem.
FROM_FILE = "tdcompile_user_"
_FORMS = "path/to/file.py:callable or package.module:callable"


def load_callable(text: str) -> Callable[..., Any]:
    """Import the file or module before the last colon and return the callable named after it.

    Raises:
        InputError: the file, module or name does not exist, its import fails, or it is not callable.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise InputError(f"'{text}' is not of the form {_FORMS}")
    module = import_file(Path(place)) if names_file(place) else _import_module(place)
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"'{place}' has no '{name}': {nearest(name, known)}")
    found = getattr(module, name)
    if not callable(found):
        raise InputError(f"'{text}' is a {type(found).__name__}; it must be a callable")
    return found  # type: ignore[no-any-return]  # the user's code has no types that could be known here


def call_user_function(text: str) -> object:
    """Load a callable and return its result without arguments.

    Raises:
        InputError: it cannot be loaded, or it raised an exception, which the message names.
    """
    function = load_callable(text)
    try:
        return function()
    except TdcompileError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"'{text}', called without arguments, failed: {_describe_error(error)}") from error


def names_file(place: str) -> bool:
    """Return whether the text before the colon names a file rather than a module."""
    return place.endswith(".py") or "/" in place or "\\" in place


def names_module(place: str) -> bool:
    """Return whether a module of this name exists; only its parent packages are imported."""
    _add_to_path(Path.cwd())
    try:
        return importlib.util.find_spec(place) is not None
    except (ImportError, ValueError):
        return False


def import_file(path: Path) -> ModuleType:
    """Import a user's file.

    Raises:
        InputError: the file does not exist, or its import fails.
    """
    if not path.is_file():
        raise InputError(f"there is no file '{path}'")
    spec = importlib.util.spec_from_file_location(f"{FROM_FILE}{path.stem}", path.resolve())
    if spec is None or spec.loader is None:
        raise InputError(f"'{path}' is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    _add_to_path(path.resolve().parent)
    sys.modules[spec.name] = module  # dataclasses and pickling look a class's module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise InputError(f"importing '{path}' failed: {_describe_error(error)}") from error
    return module


def _import_module(name: str) -> ModuleType:
    _add_to_path(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise InputError(f"there is no module '{name}' (searched the Python path and this folder)") from error
        raise InputError(f"importing '{name}' failed: {_describe_error(error)}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"importing '{name}' failed: {_describe_error(error)}") from error


def _add_to_path(folder: Path) -> None:
    """Put a folder on the import path for good, as ``python file.py`` does: functions may import siblings later."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _describe_error(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
