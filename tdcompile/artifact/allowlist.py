"""Allowlist for the text of a network: listed functions that only compute, and classes of trusted packages."""

from __future__ import annotations

import builtins
import functools
import importlib
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket

from tdcompile.core.registry import import_all
from tdcompile.errors import InputError
from tdcompile.ir.saved_classes import class_of, tag_of
from tdcompile.support.user_code import FROM_FILE, import_file, names_file

CLASSES = ("torch.nn", "tdcompile")
_BUILTINS = ("abs", "bool", "float", "getattr", "int", "len", "list", "max", "min", "round", "slice", "sum", "tuple")
_CALLERS = ("attrgetter", "call", "itemgetter", "methodcaller")  # in ``operator``; can read or call any object


def name_of(thing: Any, where: str) -> str:
    """Return the name of a function or class, by which ``function`` or ``module_class`` finds it again.

    Args:
        thing: a function, an operator or a class.
        where: the subject of the error message.

    Raises:
        InputError: no name leads to it, because it is a lambda, a method, or defined inside a function.
    """
    if isinstance(thing, OpOverload | OpOverloadPacket):
        return f"torch.ops.{thing}"
    if thing in _names():
        return _names()[thing]
    if isinstance(thing, type) and (tag := tag_of(thing)) is not None:
        return tag
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", repr(thing))
    try:
        if _inside(importlib.import_module(str(module)), name) is thing:
            return f"{module}:{name}"
    except (ImportError, AttributeError):
        pass  # every failed look-up raises the error below
    raise InputError(f"{where} is {module}.{name}, which cannot be found by its name: define it at the top of a module")


def function(name: str, trusted: Sequence[str]) -> Callable[..., Any]:
    """Return the function of a name.

    Raises:
        InputError: the function is neither in the list nor in a trusted package.
    """
    if name.startswith(("torch.ops.aten.", "torch.ops.prims.")) and "from_file" not in name:
        found: Any = _inside(torch.ops, name.removeprefix("torch.ops."))
    else:
        found = _functions().get(name) or _imported(name, trusted)
    if not callable(found):
        raise TypeError(f"{name} is no function")
    result: Callable[..., Any] = found
    return result


def module_class(name: str, trusted: Sequence[str]) -> type[nn.Module]:
    """Return the module class of a name.

    Raises:
        InputError: the class is not in torch.nn, tdcompile or a trusted package.
        TypeError: the name belongs to an object of another kind.
    """
    import_all()  # plug-ins register their tags when they are imported
    found = class_of(name) or _imported(name, (*CLASSES, *trusted))
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise TypeError(f"{name} is not a class of modules")
    return found


def readable(name: str) -> bool:
    """Return whether a graph may read or call this attribute: only public attributes of tensors are allowed.

    Through private attributes such as ``__class__`` and ``__globals__``, any object can be reached from any other.
    """
    return not name.startswith("_") and hasattr(Tensor, name)


def _imported(name: str, allowed: Sequence[str]) -> Any:
    """Return the object of a qualified ``module:name`` if the module is allowed."""
    module, _, inner = name.partition(":")
    stem = module.removeprefix(FROM_FILE)
    if stem != module and (
        files := [Path(place) for place in allowed if names_file(place) and Path(place).stem == stem]
    ):
        return _inside(import_file(files[0]), inner)
    if not any(module == package or module.startswith(f"{package}.") for package in allowed):
        owner = module.partition(".")[0] if stem == module else f"path/to/{stem}.py"
        raise InputError(
            f"the network needs {name.replace(':', '.').removeprefix(FROM_FILE)}, which is not part of torch.nn or "
            f"tdcompile; if you trust whoever made the file, load it with trusted=({owner!r},)"
        )
    return _inside(importlib.import_module(module), inner)


def _inside(root: object, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), root)


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    """Return the allowed functions by name; none reads a file or calls its arguments."""
    variables = torch._C._VariableFunctions
    spaces: list[tuple[str, object, Iterable[str]]] = [
        ("torch.nn.functional", F, filter(_computes, _public(F))),
        ("torch", variables, [n for n in dir(variables) if not n.startswith("__") and n != "from_file"]),
        ("torch", torch, [*torch.functional.__all__, "_assert"]),
        *((m.__name__, m, _public(m)) for m in (torch.linalg, torch.fft, torch.special, math)),
        ("operator", operator, [n for n in _public(operator) if n not in _CALLERS]),
        ("builtins", builtins, _BUILTINS),
    ]
    found = {f"{space}.{name}": getattr(owner, name) for space, owner, names in spaces for name in names}
    return {name: thing for name, thing in found.items() if callable(thing)}


@functools.cache
def _names() -> dict[Callable[..., Any], str]:
    return {thing: name for name, thing in reversed(_functions().items())}


def _computes(name: str) -> bool:
    """Return whether a name in torch.nn.functional is a public function and not an internal of torch."""
    return getattr(getattr(F, name), "__module__", None) in ("torch.nn.functional", "torch._C._nn", "torch")


def _public(module: ModuleType) -> list[str]:
    return [n for n in dir(module) if not n.startswith("_") and not isinstance(getattr(module, n), type)]
