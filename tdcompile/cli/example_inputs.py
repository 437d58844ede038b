"""Example inputs from ``--input``, in the form of ``parse_example``, or from the inputs that an ONNX model declares."""

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

from tdcompile.errors import InputError, first_line, nearest
from tdcompile.frontend.wrappers import unwrapped

_FORM = re.compile(
    r"^(?:(?P<name>[A-Za-z_]\w*(?:\.\w+)*)=)?(?P<shape>\d+(?:x\d+)*)"
    r"(?::(?P<dtype>\w+)(?:\[(?P<low>-?\d+),\s*(?P<high>-?\d+)\))?)?$"
)
_TYPES = {
    str(kind).removeprefix("torch."): kind
    for kind in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


@dataclass(frozen=True)
class Example:
    """One input.

    Attributes:
        name: the argument of ``forward`` and the keys inside it, if it is named.
        range: the values that an integer may have, from the first up to and without the second.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    name: str | None = None
    range: tuple[int, int] | None = None

    def draw(self, generator: torch.Generator) -> Tensor:
        """Draw normal values, or integers: of the range, its ends among them, else zeros and ones.

        Zeros and ones are valid as index, token and mask.

        Raises:
            InputError: the input does not fit in memory.
        """
        try:
            return self._drawn(generator)
        except (RuntimeError, TypeError, OverflowError, MemoryError) as error:  # torch's words for too large a size
            shape = "x".join(map(str, self.shape))
            raise InputError(f"the input {shape} cannot be made, its size is too large: {first_line(error)}") from error

    def _drawn(self, generator: torch.Generator) -> Tensor:
        if self.dtype.is_floating_point:
            return torch.randn(self.shape, generator=generator).to(self.dtype)
        if self.range is not None:
            drawn = torch.randint(*self.range, self.shape, generator=generator)
            flat = drawn.view(-1)
            flat[0], flat[-1] = self.range[0], self.range[1] - 1
            return drawn.to(self.dtype)
        return torch.randint(0, 2, self.shape, generator=generator).to(self.dtype)

    def check_values(self, values: Tensor, where: str) -> None:
        """Check values of this input against its range.

        Raises:
            InputError: a value is out of the range.
        """
        if self.range is None or not values.numel() or values.is_floating_point():
            return
        low, high = self.range
        for value in (int(values.min()), int(values.max())):
            if not low <= value < high:
                what = f"the input '{self.name}'" if self.name else "an input"
                raise InputError(f"{where}: {what} has the value {value}, out of its range [{low},{high})")


def parse_example(text: str) -> Example:
    """Read ``[NAME[.KEY]=]1x3x224x224[:dtype]``, or ``ids=1x64:int64[0,30522)`` with a range of integers.

    Raises:
        InputError: the text is malformed, or has an axis of length 0, an unknown type or a range that the type lacks.
    """
    match = _FORM.match(text.strip())
    if match is None:
        raise InputError(
            f"the input '{text}' must have the form [NAME=]1x3x224x224[:dtype], "
            "e.g. ids=1x64:int64, or ids=1x64:int64[0,30522) with a range of values"
        )
    shape = tuple(int(size) for size in match["shape"].split("x"))
    if 0 in shape:
        raise InputError(f"the input '{text}' has an axis of length 0; each is at least 1")
    if match["dtype"] and match["dtype"] not in _TYPES:
        raise InputError(f"the input '{text}' has an unknown type: {nearest(match['dtype'], _TYPES)}")
    dtype = _TYPES[match["dtype"] or "float32"]
    return Example(shape, dtype, match["name"], _range(text, match, dtype) if match["low"] else None)


def _range(text: str, match: re.Match[str], dtype: torch.dtype) -> tuple[int, int]:
    """Return the range of an input.

    Raises:
        InputError: it is empty, or the type does not hold its values.
    """
    low, high = int(match["low"]), int(match["high"])
    if dtype.is_floating_point or dtype is torch.bool:
        raise InputError(f"the input '{text}' has a range, and is no integer: leave the range out")
    if low >= high:
        raise InputError(f"the range of the input '{text}' is empty: write [LOW,HIGH) with LOW below HIGH")
    limits = torch.iinfo(dtype)
    if low < limits.min or high - 1 > limits.max or high > torch.iinfo(torch.int64).max:
        raise InputError(f"the range of the input '{text}' exceeds its type, which holds {limits.min} to {limits.max}")
    return low, high


def check_data_ranges(texts: Sequence[str], names: Sequence[str], inputs: Sequence[Tensor]) -> None:
    """Check samples of the data against the ranges of ``--input``.

    Args:
        texts: the inputs, as in ``--input``.
        names: the names of the network's input tensors, in order.
        inputs: a batch of samples.

    Raises:
        InputError: a value is out of the range of its input.
    """
    for place, example in enumerate(map(parse_example, texts)):
        name = (example.name or "").replace(".", "_")
        position = list(names).index(name) if name in names else place
        if position < len(inputs):
            example.check_values(inputs[position], "the data")


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
        raise InputError("the network's input is not known: give --input, e.g. --input 1x3x224x224, or --example FILE")
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
