"""Example inputs from ``--input [NAME[.KEY]=]1x3x224x224[:dtype]``, or from the inputs that an ONNX model declares."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from tdcompile.errors import InputError, nearest
from tdcompile.frontend.wrappers import unwrapped

_FORM = re.compile(r"^(?:(?P<name>[A-Za-z_]\w*(?:\.\w+)*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?$")
_TYPES = {
    str(kind).removeprefix("torch."): kind
    for kind in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


@dataclass(frozen=True)
class Example:
    """One input: its shape, its type, and, if it is named, the argument of ``forward`` and the keys inside it."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    name: str | None = None

    def draw(self, generator: torch.Generator) -> Tensor:
        """Draw normal values, or zeros and ones for integers: these are valid as index, token and mask."""
        if self.dtype.is_floating_point:
            return torch.randn(self.shape, generator=generator).to(self.dtype)
        return torch.randint(0, 2, self.shape, generator=generator).to(self.dtype)


def parse_example(text: str) -> Example:
    """Read ``[NAME[.KEY]=]1x3x224x224[:dtype]``.

    Raises:
        InputError: the text is malformed, or has an axis of length 0 or an unknown type.
    """
    match = _FORM.match(text.strip())
    if match is None:
        raise InputError(f"the input '{text}' must have the form [NAME=]1x3x224x224[:dtype], e.g. ids=1x64:int64")
    shape = tuple(int(size) for size in match["shape"].split("x"))
    if 0 in shape:
        raise InputError(f"the input '{text}' has an axis of length 0; each is at least 1")
    if match["dtype"] and match["dtype"] not in _TYPES:
        raise InputError(f"the input '{text}' has an unknown type: {nearest(match['dtype'], _TYPES)}")
    return Example(shape, _TYPES[match["dtype"] or "float32"], match["name"])


def draw_inputs(texts: Sequence[str], arguments: Sequence[str], seed: int) -> tuple[Tensor, ...]:
    """Draw random inputs in the order of a model's arguments.

    Args:
        texts: the inputs, as in ``--input``.
        arguments: the names of all arguments.
        seed: seeds the draws.

    Raises:
        InputError: there are no inputs, one is malformed, or the names are not those of the first arguments.
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(example.draw(generator) for example in _ordered(_parsed(texts), arguments))


def draw_arguments(texts: Sequence[str], module: nn.Module, seed: int) -> tuple[Tensor, ...] | dict[str, Any]:
    """Draw random inputs for a network, in the order of its arguments, or by name if they are named.

    A name such as ``batch.image`` is the entry 'image' of the dict 'batch', and ``x.0`` the first item of the list 'x'.

    Raises:
        InputError: there are no inputs, one is malformed, only some are named, ``forward`` has no such argument, or the
            items of a list are not counted from 0.
    """
    examples = _parsed(texts)
    named = [example for example in examples if example.name is not None]
    if named and len(named) < len(examples):
        raise InputError(f"some inputs are named and some are not: {', '.join(texts)}; name all of them or none")
    generator = torch.Generator().manual_seed(seed)
    drawn = [example.draw(generator) for example in examples]
    if not named:
        return tuple(drawn)
    names = [str(example.name) for example in examples]
    parameters = inspect.signature(unwrapped(module).forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in names:
        argument = name.partition(".")[0]
        if argument not in parameters and not takes_any:
            entry = next((f"; an entry of a dict or list is NAME.KEY, e.g. {p}.{argument}" for p in parameters), "")
            raise InputError(f"the network takes no input '{argument}': {nearest(argument, parameters)}{entry}")
        if names.count(name) > 1:
            raise InputError(f"the input '{name}' is given twice")
        outer = next((other for other in names if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise InputError(f"the input '{outer}' is given as a tensor, and '{name}' as an entry of it: give one")
    tree: dict[str, Any] = {}
    for name, value in zip(names, drawn, strict=True):
        *path, key = name.split(".")
        holder = tree
        for step in path:
            holder = holder.setdefault(step, {})
        holder[key] = value
    return {name: _with_lists(value, name) for name, value in tree.items()}


def _with_lists(value: Any, name: str) -> Any:
    """Return nested inputs with a list in place of each dict whose keys are numbers."""
    if not isinstance(value, dict):
        return value
    inner = {key: _with_lists(held, f"{name}.{key}") for key, held in value.items()}
    if not any(key.isdecimal() for key in inner):
        return inner
    wanted = [str(place) for place in range(len(inner))]
    if sorted(inner) != sorted(wanted):
        raise InputError(f"the items of '{name}' are {', '.join(inner)}; expected {', '.join(wanted)}")
    return [inner[key] for key in wanted]


def model_inputs(model: Path, batch: int, seed: int, texts: Sequence[str] = ()) -> tuple[Tensor, ...]:
    """Draw random inputs for an ONNX file, as given or as the file declares them.

    Args:
        model: the file.
        batch: length of the first axis if it is dynamic.
        seed: seeds the draws.
        texts: the inputs, as in ``--input``.

    Raises:
        InputError: the file is missing or is not a model, has dynamic axes besides the batch, or takes other inputs.
    """
    if not model.is_file():
        raise InputError(f"there is no model {model}")
    try:
        graph = onnx.load(model, load_external_data=False).graph
    except Exception as error:  # the errors of protobuf and onnx have no common base
        raise InputError(f"{model} is not an ONNX model") from error
    weights, generator = {weight.name for weight in graph.initializer}, torch.Generator().manual_seed(seed)
    values = [value for value in graph.input if value.name not in weights]
    if texts:
        return draw_inputs(texts, [value.name for value in values], seed)
    return tuple(_example_of(value, model, batch).draw(generator) for value in values)


def _parsed(texts: Sequence[str]) -> list[Example]:
    if not texts:
        raise InputError("the network's input is not known: give --input, e.g. --input 1x3x224x224")
    return [parse_example(text) for text in texts]


def _ordered(examples: Sequence[Example], arguments: Sequence[str]) -> list[Example]:
    names = [example.name for example in examples if example.name is not None]
    if not names:
        return list(examples)
    for name in names:
        if name not in arguments:
            raise InputError(f"the network takes no input '{name}': {nearest(name, arguments)}")
    first = arguments[: len(examples)]
    if sorted(names) != sorted(first):
        raise InputError(f"inputs {', '.join(names)} are given; expected each of {', '.join(first)}, once")
    return sorted(examples, key=lambda example: first.index(str(example.name)))


def _example_of(value: onnx.ValueInfoProto, model: Path, batch: int) -> Example:
    tensor = value.type.tensor_type
    sizes = [axis.dim_value for axis in tensor.shape.dim]  # 0 where the axis is open
    if 0 in sizes[1:]:
        raise InputError(f"{model.name} leaves more of '{value.name}' open than the batch: give --input")
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    if kind not in _TYPES:
        raise InputError(f"{model.name} takes '{value.name}' as {kind}: {', '.join(_TYPES)} can be drawn at random")
    return Example(tuple(size or batch for size in sizes), _TYPES[kind], value.name)
