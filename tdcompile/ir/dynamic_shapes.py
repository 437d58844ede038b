"""Axes that stay open: their names, their sizes, and the limits that a trace sets them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram

from tdcompile.errors import InputError, nearest

BATCH = "batch"


_OPEN = re.compile(r"^(?P<input>[A-Za-z_]\w*):(?P<axis>\d+)(?:=(?P<name>[A-Za-z_]\w*))?$")


@dataclass(frozen=True)
class Axis:
    """An axis of an input that is left open.

    Attributes:
        input: place of the input among a network's tensors.
        axis: of that tensor.
        name: axes of one name are of one length.
    """

    input: int
    axis: int
    name: str


def shares_batch(inputs: Sequence[Tensor]) -> list[bool]:
    """For each input whether its first axis is the batch: whether it is as long as that of the first input."""
    size = next((len(x) for x in inputs if x.dim()), 0)
    return [x.dim() > 0 and len(x) == size for x in inputs]


def batch_of(inputs: Sequence[Tensor], size: int) -> tuple[Tensor, ...]:
    """The inputs with so many samples, repeated or cut; those without a batch axis as they are."""
    return tuple(
        torch.cat([x] * -(-size // len(x)))[:size].contiguous() if batched else x
        for x, batched in zip(inputs, shares_batch(inputs), strict=True)
    )


def open_axes(texts: Sequence[str], names: Sequence[str], inputs: Sequence[Tensor]) -> tuple[Axis, ...]:
    """Read ``NAME:AXIS`` or ``NAME:AXIS=LABEL``; axes without a label that are of one length are one.

    Args:
        names: of the inputs.

    Raises:
        InputError: another form, an input or axis that is not there, the batch axis, or an axis of length 1.
    """
    found: list[Axis] = []
    for text in texts:
        match = _OPEN.match(text.strip())
        if match is None:
            raise InputError(f"the open axis '{text}' is not of the form NAME:AXIS or NAME:AXIS=LABEL, e.g. ids:1=time")
        if match["input"] not in names:
            raise InputError(f"the open axis '{text}' is of no input: {nearest(match['input'], names)}")
        place, axis = list(names).index(match["input"]), int(match["axis"])
        shape = tuple(inputs[place].shape)
        if axis >= len(shape):
            raise InputError(f"the open axis '{text}' is not there: '{names[place]}' is {shape}")
        if axis == 0 and shares_batch(inputs)[place]:
            raise InputError(f"'{text}' is the batch axis, which is open by default: leave it out")
        if shape[axis] < 2:
            raise InputError(f"the open axis '{text}' is 1 long in the example: torch takes 1 for a constant, give 2")
        alike = [other.name for other in found if inputs[other.input].shape[other.axis] == shape[axis]]
        label = match["name"] or next(iter(alike), f"{match['input']}_{axis}")
        found.append(Axis(place, axis, label))
    return tuple(found)


def as_long(inputs: Sequence[Tensor], axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """The closed axes, the batch aside, that are as long as an open one, by whose name they go."""
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
    """The inputs with these axes so long, their entries repeated or cut."""
    made = list(inputs)
    for axis in axes:
        x = made[axis.input]
        made[axis.input] = x.index_select(axis.axis, torch.arange(size, device=x.device) % x.shape[axis.axis])
    return tuple(made)


def resized(inputs: Sequence[Tensor], axes: Sequence[Axis], more: int) -> tuple[Tensor, ...]:
    """The inputs with every open axis longer by so much, their first entries repeated."""
    made = list(inputs)
    for axis in axes:
        x = made[axis.input]
        made[axis.input] = torch.cat([x, x.narrow(axis.axis, 0, min(more, x.shape[axis.axis]))], axis.axis)
    return tuple(made)


# A bound above is torch's own, so that sizes fit in their integers.
LARGEST_SIZE = 2**20


def limits(program: ExportedProgram, opened: Sequence[Mapping[int, str]]) -> dict[str, tuple[int, int | None]]:
    """By the name of an open axis the sizes, from and to, at which a network goes the way that was traced.

    Args:
        program: what ``torch.export`` made.
        opened: for each input that is a tensor, the names of its open axes.
    """
    found: dict[str, tuple[int, int | None]] = {}
    for size, name in open_symbols(program, opened):
        known = program.range_constraints.get(size)
        if known is not None:
            found[name] = (int(known.lower), int(known.upper) if known.upper <= LARGEST_SIZE else None)
    return found


def open_symbols(program: ExportedProgram, opened: Sequence[Mapping[int, str]]) -> Iterator[tuple[sympy.Expr, str]]:
    """The open axes: what torch calls them, and their names."""
    given = set(program.graph_signature.user_inputs)
    inputs = [n for n in program.graph.nodes if n.name in given and isinstance(n.meta.get("val"), Tensor)]
    for node, axes in zip(inputs, opened, strict=True):
        shape = node.meta["val"].shape
        for axis, name in axes.items():
            if axis < len(shape) and isinstance(shape[axis], torch.SymInt):
                yield shape[axis].node.expr, name
