"""``cases_of``: what a network answers, to the example inputs and to others, and whether it answers alike twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tdcompile.errors import FixedAxisError, InputError
from tdcompile.signature import Axis, Call, batch_of, resized, shares_batch
from tdcompile.surgery import register_trees, tensors_in

# How far a graph's outputs may be from the network's, of the largest: the same operators in the same order leave
# rounding alone, and that of a few more or fewer bits where a layer is computed by another kernel.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Case:
    """Inputs, and what the network answers to them.

    Attributes:
        what: the inputs in words, to follow a verb.
    """

    what: str
    call: Call
    outputs: list[Tensor]


def cases_of(module: nn.Module, call: Call, axes: Sequence[Axis], dynamic_batch: bool) -> tuple[list[Case], list[str]]:
    """The network's answers to the example inputs, and to others of every size that is to stay open.

    Beside them the network's own values that each answer changes, a count of its calls say.

    Raises:
        InputError: the network does not run on the inputs, or answers the same inputs in two ways.
        FixedAxisError: it does, but not on another size.
    """
    try:
        cases = [Case("on the example inputs", call, answer(module, call))]
    except InputError:
        raise
    except Exception as error:  # whatever the network's own code raises
        raise InputError(f"the network does not run on an input of {shapes(call)}: {first_line(error)}") from error
    before = _values(module)
    others = []
    if dynamic_batch and any(shares_batch(call.tensors)):
        size = next(len(x) for x, batched in zip(call.tensors, shares_batch(call.tensors), strict=True) if batched)
        others.append((f"at a batch of {size + 1}", batch_of(call.tensors, size + 1), "--no-dynamic-batch"))
    if axes:
        names = ", ".join(dict.fromkeys(axis.name for axis in axes))
        others.append((f"with {names} one longer", resized(call.tensors, axes, 1), "no --dynamic for it"))
    if call.tensors[0].is_meta:
        return cases, []
    for what, tensors, instead in others:
        other = call.having(tensors)
        try:
            cases.append(Case(what, other, answer(module, other)))
        except Exception as error:
            raise FixedAxisError(
                f"the network runs on an input of {shapes(call)} and not {what}, so that axis cannot stay open: "
                f"give {instead}; it says: {first_line(error)}"
            ) from error
    again = [answer(module, call)]
    changed = [name for name, value in _values(module).items() if name in before and before[name] != value]
    if changed:  # every second call may be another
        again.append(answer(module, call))
    if any(difference(cases[0].outputs, other) is not None for other in again):
        why = f"it changes '{changed[0]}' as it answers" if changed else "it draws random numbers"
        raise InputError(
            f"the network gives different answers to the same inputs in eval mode: {why}, and a compiled model, which "
            "keeps nothing from one call for the next, cannot be checked against it; turn that off where it is built"
        )
    return cases, changed


@torch.no_grad()
def answer(module: nn.Module, call: Call) -> list[Tensor]:
    """The tensors that a network returns.

    Raises:
        InputError: there is something else among them.
    """
    args, kwargs = call.split([x.clone() for x in call.tensors])  # a network may work in place
    output = module(*args, **kwargs)
    plain = next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, int | float | str)), None)
    if plain is not None:
        raise InputError(
            f"among what the network returns is {plain!r}, and an ONNX model returns tensors alone: return it as a "
            "tensor, or leave it out"
        )
    register_trees(output)  # torch.export asks for it
    return list(tensors_in(output))


def difference(expected: Sequence[Tensor], got: Sequence[Tensor]) -> str | None:
    """What is wrong with a graph's outputs, in a few words; None where nothing is."""
    if len(expected) != len(got):
        return f"{len(got)} outputs for {len(expected)}"
    for place, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"output {place} is {tuple(ours.shape)} {ours.dtype} for {tuple(theirs.shape)} {theirs.dtype}"
        if ours.is_meta or not ours.numel():
            continue
        a, b = ours.detach().double(), theirs.detach().double()
        finite = torch.isfinite(b)
        scale = float(b[finite].abs().max()) if bool(finite.any()) else 0.0
        most = float((a - b)[finite].abs().max()) if bool(finite.any()) else 0.0
        same = bool(((a == b) | (a.isnan() & b.isnan()))[~finite].all())
        if not same or not most <= _TOLERANCE.get(theirs.dtype, 0.0) * max(scale, 1e-3):
            return f"output {place} differs by {most:.3g} on a scale of {scale:.3g}"
    return None


@contextmanager
def keeping_buffers(module: nn.Module) -> Iterator[None]:
    """Put the buffers back afterwards that a network changes in place as it answers."""
    plain = [buffer for buffer in module.buffers() if not buffer.is_meta and buffer.layout == torch.strided]
    kept = [(buffer, buffer.clone()) for buffer in plain]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def shapes(call: Call) -> str:
    """The inputs' shapes and kinds of number, to be read."""
    return ", ".join(f"{'x'.join(map(str, x.shape))}:{str(x.dtype).removeprefix('torch.')}" for x in call.tensors)


def first_line(error: Exception) -> str:
    """Of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _values(module: nn.Module) -> Mapping[str, object]:
    """The numbers, words and buffers that a network holds, by name: buffers by how often they have been changed."""
    found: dict[str, object] = {}
    for path, part in module.named_modules():
        own = {key: value for key, value in vars(part).items() if isinstance(value, int | float | str)}
        own |= {key: (id(buffer), _changes(buffer)) for key, buffer in part._buffers.items() if buffer is not None}
        found |= {f"{path}.{key}" if path else key: value for key, value in own.items()}
    return found


def _changes(tensor: Tensor) -> int:
    """How often it was changed in place; what was made in inference mode does not count it."""
    return 0 if tensor.is_inference() else tensor._version
