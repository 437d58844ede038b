"""Dynamic axes: their names, test inputs of other sizes, and the limits that a trace sets."""

from __future__ import annotations

import builtins
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram

from tdcompile.errors import InputError, nearest

BATCH = "batch"
_OPEN = re.compile(r"^(?P<input>[A-Za-z_]\w*):(?P<axis>\d+)(?:=(?P<name>[A-Za-z_]\w*))?$")


@dataclass(frozen=True)
class Axis:
    """A dynamic axis of an input.

    Attributes:
        input: position of the input among the network's tensors.
        axis: position of the axis in that tensor.
        name: axes with the same name have the same length.
    """

    input: int
    axis: int
    name: str


def shares_batch(inputs: Sequence[Tensor]) -> list[bool]:
    """Return for each input whether its first axis is the batch: it is as long as the first input's."""
    size = next((len(x) for x in inputs if x.dim()), 0)
    return [x.dim() > 0 and len(x) == size for x in inputs]


def batch_of(inputs: Sequence[Tensor], size: int) -> tuple[Tensor, ...]:
    """Repeat or cut the samples to this batch size; inputs without a batch axis are unchanged."""
    return tuple(
        torch.cat([x] * -(-size // len(x)))[:size].contiguous() if batched else x
        for x, batched in zip(inputs, shares_batch(inputs), strict=True)
    )


def open_axes(texts: Sequence[str], names: Sequence[str], inputs: Sequence[Tensor]) -> tuple[Axis, ...]:
    """Read ``NAME:AXIS`` or ``NAME:AXIS=LABEL``; axes of one length share a name unless they have labels.

    Args:
        names: the names of the inputs.

    Raises:
        InputError: the form is wrong, the input or axis does not exist, it is the batch axis, or its length is 1.
    """
    found: list[Axis] = []
    for text in texts:
        match = _OPEN.match(text.strip())
        if match is None:
            raise InputError(f"the open axis '{text}' is not of the form NAME:AXIS or NAME:AXIS=LABEL, e.g. ids:1=time")
        if match["input"] not in names:
            raise InputError(f"the open axis '{text}' names no input: {nearest(match['input'], names)}")
        place, axis = list(names).index(match["input"]), int(match["axis"])
        shape = tuple(inputs[place].shape)
        if axis >= len(shape):
            raise InputError(f"the open axis '{text}' does not exist: '{names[place]}' is {shape}")
        if axis == 0 and shares_batch(inputs)[place]:
            raise InputError(f"'{text}' is the batch axis, which is open by default: leave it out")
        if shape[axis] < 2:
            raise InputError(f"the open axis '{text}' is 1 long in the example: torch takes 1 for a constant, give 2")
        alike = [other.name for other in found if inputs[other.input].shape[other.axis] == shape[axis]]
        label = match["name"] or next(iter(alike), f"{match['input']}_{axis}")
        found.append(Axis(place, axis, label))
    return tuple(found)


def as_long(inputs: Sequence[Tensor], axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Return the fixed axes, except the batch, that are as long as a dynamic one, under its name."""
    names = {inputs[axis.input].shape[axis.axis]: axis.name for axis in axes}
    known = {(axis.input, axis.axis) for axis in axes}
    batched = shares_batch(inputs)
    return tuple(
        Axis(place, axis, names[size])
        for place, x in enumerate(inputs)
        for axis, size in enumerate(x.shape)
        if size in names and (place, axis) not in known and not (axis == 0 and batched[place])
    )


def sized(inputs: Sequence[Tensor], axes: Sequence[Axis], size: int) -> tuple[Tensor, ...]:
    """Repeat or cut the entries of these axes to this size."""
    made = list(inputs)
    for axis in axes:
        x = made[axis.input]
        made[axis.input] = x.index_select(axis.axis, torch.arange(size, device=x.device) % x.shape[axis.axis])
    return tuple(made)


def resized(inputs: Sequence[Tensor], axes: Sequence[Axis], more: int) -> tuple[Tensor, ...]:
    """Lengthen every dynamic axis by ``more`` entries, which repeat the first ones."""
    made = list(inputs)
    for axis in axes:
        x = made[axis.input]
        made[axis.input] = torch.cat([x, x.narrow(axis.axis, 0, min(more, x.shape[axis.axis]))], axis.axis)
    return tuple(made)


@contextmanager
def symbolic_lengths() -> Iterator[None]:
    """Let ``len(tensor)`` return the symbol of an open axis inside the context; Python would make it a number."""
    plain = builtins.len

    def length(value: Any) -> Any:
        return value.shape[0] if isinstance(value, Tensor) and value.dim() else plain(value)

    builtins.len = length
    try:
        yield
    finally:
        builtins.len = plain


# torch sets larger upper bounds itself, so that sizes fit into integers; they are not limits of the network.
LARGEST_SIZE = 2**20


def limits(program: ExportedProgram, opened: Sequence[Mapping[int, str]]) -> dict[str, tuple[int, int | None]]:
    """Return for each dynamic axis the smallest and largest size that the guards of the trace allow.

    Args:
        program: the result of ``torch.export``.
        opened: for each tensor among the inputs, the names of its dynamic axes.
    """
    found: dict[str, tuple[int, int | None]] = {}
    for size, name in open_symbols(program, opened):
        known = program.range_constraints.get(size)
        if known is not None:
            found[name] = (int(known.lower), int(known.upper) if known.upper <= LARGEST_SIZE else None)
    return found


def open_symbols(program: ExportedProgram, opened: Sequence[Mapping[int, str]]) -> Iterator[tuple[sympy.Expr, str]]:
    """Yield torch's symbol and our name for each dynamic axis."""
    given = set(program.graph_signature.user_inputs)
    inputs = [n for n in program.graph.nodes if n.name in given and isinstance(n.meta.get("val"), Tensor)]
    for node, axes in zip(inputs, opened, strict=True):
        shape = node.meta["val"].shape
        for axis, name in axes.items():
            if axis < len(shape) and isinstance(shape[axis], torch.SymInt):
                yield shape[axis].node.expr, name
