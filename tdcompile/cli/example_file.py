"""Example inputs from a file of tensors, of ``torch.save`` or ``numpy.savez``, and checks against ``--input``."""

from __future__ import annotations

import inspect
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tdcompile.cli.example_inputs import parse_example
from tdcompile.data.nesting import tensors_in
from tdcompile.errors import InputError
from tdcompile.frontend.wrappers import unwrapped

_BY_POSITION = re.compile(r"arr_\d+")  # how numpy.savez names arrays that have no name


def read_example(path: Path) -> tuple[Any, ...] | dict[str, Any]:
    """Return the arguments in a file, in order or by name; no code in the file is executed.

    A ``.pt`` file holds a tensor, a tuple or list of the arguments, or a dict of them by name, and may nest. A ``.npz``
    file holds arrays by the names of the arguments, or in their order if ``numpy.savez`` got them without names.

    Raises:
        InputError: the file cannot be read, needs code, or holds no tensor.
    """
    if not path.is_file():
        raise InputError(f"there is no example file '{path}'")
    held = _read_arrays(path) if path.suffix == ".npz" else _read_tensors(path)
    if next(tensors_in(held), None) is None:
        raise InputError(f"the example '{path}' holds no tensor: save the arguments of forward, in order or by name")
    if isinstance(held, Mapping):
        if odd := [key for key in held if not isinstance(key, str)]:
            raise InputError(f"the example '{path}' has the key {odd[0]!r}: keys are names of arguments")
        return dict(held)
    return tuple(held) if isinstance(held, list | tuple) else (held,)


def check_agreement(
    texts: Sequence[str], held: tuple[Any, ...] | dict[str, Any], module: nn.Module, path: Path
) -> None:
    """Check each ``--input`` against the input of the file with its name or position.

    Raises:
        InputError: an input is not in the file, or has another shape or type, or values out of its range.
    """
    for place, text in enumerate(texts):
        example = parse_example(text)
        value = _found(example.name, place, held, module)
        if not isinstance(value, Tensor):
            known = ", ".join(held) if isinstance(held, dict) else f"{len(held)} inputs by position"
            raise InputError(f"the input '{text}' is not in the example '{path}', which holds {known}")
        if (tuple(value.shape), value.dtype) != (example.shape, example.dtype):
            told = "x".join(map(str, value.shape)) + f":{str(value.dtype).removeprefix('torch.')}"
            raise InputError(f"the input '{text}' is {told} in the example '{path}': leave one of them out")
        example.check_values(value, f"the example '{path}'")


def _found(name: str | None, place: int, held: tuple[Any, ...] | dict[str, Any], module: nn.Module) -> Any:
    if isinstance(held, tuple):
        arguments = list(inspect.signature(unwrapped(module).forward).parameters)
        named: Mapping[str, Any] = dict(zip(arguments, held, strict=False))
        if name is None:
            return held[place] if place < len(held) else None
    else:
        named = held
        if name is None:
            return list(held.values())[place] if place < len(held) else None
    value: Any = named
    for step in name.split("."):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list | tuple) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def _read_tensors(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needs = re.search(r"GLOBAL ([\w.]+)", str(error))
        code = f"needs code to load ({needs[1]}), which is refused" if needs else "cannot be read without running code"
        raise InputError(
            f"the example '{path}' {code}: save a tensor, or a tuple, list or dict of tensors, with torch.save"
        ) from error
    except OSError as error:
        raise InputError(f"the example '{path}' cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch's reader raises anything on files of another kind
        raise InputError(f"the example '{path}' cannot be read: give a file of torch.save, or a .npz file") from error


def _read_arrays(path: Path) -> dict[str, Tensor] | tuple[Tensor, ...]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: _tensor(arrays[name], name, path) for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"the example '{path}' cannot be read as arrays of numpy.savez") from error
    if found and all(_BY_POSITION.fullmatch(name) for name in found):
        return tuple(found[f"arr_{place}"] for place in range(len(found)))
    return found


def _tensor(array: np.ndarray[Any, Any], name: str, path: Path) -> Tensor:
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise InputError(f"'{name}' in the example '{path}' is {array.dtype}, which is no type of a tensor") from error
