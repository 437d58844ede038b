"""Dynamic axes: their names, test inputs of other sizes, and the limits that a trace sets."""

from __future__ import annotations

import builtins
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram

from tdcompile.errors import InputError, nearest

BATCH = "batch"
_OPEN = re.compile(r"^(?P<input>[A-Za-z_][\w.]*):(?P<axis>\d+)(?:=(?P<name>[A-Za-z_]\w*))?(?:%(?P<step>[1-9]\d*))?$")
_BATCH_AXIS = re.compile(r"^(?P<input>[A-Za-z_][\w.]*)=(?P<axis>\d+|none)$")

# For each input the axis of its samples; None if it has none.
BatchAxes = Sequence[int | None]


@dataclass(frozen=True)
class Axis:
    """A dynamic axis of an input.

    Attributes:
        input: position of the input among the network's tensors.
        axis: position of the axis in that tensor.
        name: axes with the same name have the same length.
        step: the sizes are that of the example and those that differ from it by a multiple of this.
        alone: the network runs with this axis longer while axes of other names stay as they are.
    """

    input: int
    axis: int
    name: str
    step: int = 1
    alone: bool = False


def shares_batch(inputs: Sequence[Tensor]) -> list[bool]:
    """Return for each input whether its first axis is the batch: it is as long as the first input's."""
    size = next((len(x) for x in inputs if x.dim()), 0)
    return [x.dim() > 0 and len(x) == size for x in inputs]


def default_batch_axes(inputs: Sequence[Tensor]) -> tuple[int | None, ...]:
    """Return 0 for each input that is as long as the first one, and None for the others."""
    return tuple(0 if batched else None for batched in shares_batch(inputs))


def batch_size(inputs: Sequence[Tensor], batch: BatchAxes) -> int | None:
    """Return the number of samples in example inputs; None if no input has a batch axis."""
    return next((x.shape[axis] for x, axis in zip(inputs, batch, strict=True) if axis is not None), None)


def batch_of(inputs: Sequence[Tensor], size: int, batch: BatchAxes | None = None) -> tuple[Tensor, ...]:
    """Repeat or cut the samples to this batch size; inputs without a batch axis are unchanged.

    Args:
        inputs: the example inputs.
        size: number of samples.
        batch: axis of the samples in each input; by default the first where it is as long as the first input's.
    """
    axes = default_batch_axes(inputs) if batch is None else batch
    return tuple(
        x if axis is None else torch.cat([x] * -(-size // x.shape[axis]), axis).narrow(axis, 0, size).contiguous()
        for x, axis in zip(inputs, axes, strict=True)
    )


def read_batch_axes(texts: Sequence[str], names: Sequence[str], inputs: Sequence[Tensor]) -> tuple[int | None, ...]:
    """Read ``NAME=AXIS`` or ``NAME=none``; inputs that are not named have the batch first if it is as long there.

    Raises:
        InputError: the form is wrong, the input or axis does not exist, an input is named twice, or lengths differ.
    """
    given: dict[int, int | None] = {}
    for text in texts:
        match = _BATCH_AXIS.match(text.strip())
        if match is None:
            raise InputError(f"the batch axis '{text}' is not of the form NAME=AXIS or NAME=none, e.g. state=1")
        place = _place_of(match["input"], names, f"the batch axis '{text}'")
        shape = tuple(inputs[place].shape)
        if match["axis"] != "none" and int(match["axis"]) >= len(shape):
            raise InputError(f"the batch axis '{text}' does not exist: '{names[place]}' is {shape}")
        if place in given:
            raise InputError(f"the batch axis of '{names[place]}' is given twice")
        given[place] = None if match["axis"] == "none" else int(match["axis"])
    sizes = {names[place]: inputs[place].shape[axis] for place, axis in given.items() if axis is not None}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"'{name}' has {size}" for name, size in sizes.items())
        raise InputError(f"the inputs differ in their number of samples along the batch axes: {said}")
    rest = [x for place, x in enumerate(inputs) if place not in given and x.dim()]
    size = next(iter(sizes.values()), next((len(x) for x in rest), 0))
    return tuple(
        given[place] if place in given else (0 if x.dim() and len(x) == size else None)
        for place, x in enumerate(inputs)
    )


def open_axes(
    texts: Sequence[str], names: Sequence[str], inputs: Sequence[Tensor], batch: BatchAxes | None = None
) -> tuple[Axis, ...]:
    """Read ``NAME:AXIS``, ``NAME:AXIS=LABEL`` and ``NAME:AXIS%STEP``; axes are one only if they have one label.

    Args:
        texts: the axes.
        names: the names of the inputs.
        inputs: the example inputs.
        batch: axis of the samples in each input; by default the first where it is as long as the first input's.

    Raises:
        InputError: the form is wrong, the input or axis does not exist, it is the batch axis, its length is 1 or no
            multiple of the step, or axes of one label differ in length or step.
    """
    samples = default_batch_axes(inputs) if batch is None else batch
    found: list[Axis] = []
    for text in texts:
        match = _OPEN.match(text.strip())
        if match is None:
            raise InputError(
                f"the open axis '{text}' is not of the form NAME:AXIS, NAME:AXIS=LABEL or NAME:AXIS%STEP, e.g. "
                "ids:1=time or x:2%8"
            )
        place, axis = _place_of(match["input"], names, f"the open axis '{text}'"), int(match["axis"])
        shape, step = tuple(inputs[place].shape), int(match["step"] or 1)
        if axis >= len(shape):
            raise InputError(f"the open axis '{text}' does not exist: '{names[place]}' is {shape}")
        if axis == samples[place]:
            raise InputError(
                f"'{text}' is the batch axis, which is open by default: leave it out, or give --no-dynamic-batch if it "
                "is no batch"
            )
        if shape[axis] < 2:
            raise InputError(f"the open axis '{text}' is 1 long in the example: torch takes 1 for a constant, give 2")
        if shape[axis] % step:
            raise InputError(f"the open axis '{text}' is {shape[axis]} long in the example, no multiple of {step}")
        if any((other.input, other.axis) == (place, axis) for other in found):
            raise InputError(f"the axis {axis} of '{names[place]}' is opened twice")
        made = Axis(place, axis, match["name"] or f"{names[place]}_{axis}", step)
        _check_label(made, [other for other in found if other.name == made.name], inputs)
        found.append(made)
    return tuple(found)


def _check_label(axis: Axis, others: Sequence[Axis], inputs: Sequence[Tensor]) -> None:
    size = inputs[axis.input].shape[axis.axis]
    if axis.name == BATCH:
        raise InputError(f"the label '{BATCH}' is that of the batch: write --batch-axis NAME={axis.axis}")
    for other in others:
        length = inputs[other.input].shape[other.axis]
        if length != size or other.step != axis.step:
            raise InputError(
                f"two axes are named '{axis.name}', and differ in the example: {length} in steps of {other.step}, "
                f"{size} in steps of {axis.step}"
            )


def _place_of(name: str, names: Sequence[str], what: str) -> int:
    plain = re.sub(r"\W", "_", name)  # entries of nested inputs have one name, batch.image is batch_image
    if plain not in names:
        raise InputError(f"{what} names no input: {nearest(name, names)}")
    return list(names).index(plain)


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


def steps_of(axes: Sequence[Axis]) -> dict[str, int]:
    """Return the step of each name."""
    return {axis.name: axis.step for axis in axes}


def sized(inputs: Sequence[Tensor], axes: Sequence[Axis], size: int) -> tuple[Tensor, ...]:
    """Repeat or cut the entries of these axes to this size."""
    made = list(inputs)
    for axis in axes:
        x = made[axis.input]
        made[axis.input] = x.index_select(axis.axis, torch.arange(size, device=x.device) % x.shape[axis.axis])
    return tuple(made)


def resized(inputs: Sequence[Tensor], axes: Sequence[Axis], more: int) -> tuple[Tensor, ...]:
    """Lengthen every dynamic axis by ``more`` of its steps; the new entries repeat the first ones."""
    made = list(inputs)
    for axis in axes:
        x = made[axis.input]
        size = x.shape[axis.axis] + more * axis.step
        made[axis.input] = x.index_select(axis.axis, torch.arange(size, device=x.device) % x.shape[axis.axis])
    return tuple(made)


def _tell_dynamo(function: Callable[..., Any]) -> None:
    """Let dynamo list Python's own functions before one is replaced: it lists them once in a process."""
    with suppress(ImportError, AttributeError):  # dynamo's own names, which another torch may lack
        from torch._dynamo.trace_rules import is_builtin_callable

        is_builtin_callable(function)


@contextmanager
def symbolic_lengths() -> Iterator[None]:
    """Let ``len(tensor)`` return the symbol of an open axis inside the context; Python would make it a number."""
    plain = builtins.len
    _tell_dynamo(plain)

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
