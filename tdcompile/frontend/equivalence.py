"""Equivalence check: record a network's outputs on example inputs and compare a graph's outputs with them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tdcompile.data.nesting import tensors_in
from tdcompile.errors import FixedAxisError, InputError, first_line
from tdcompile.frontend.signature import Call
from tdcompile.ir.dynamic_shapes import Axis, BatchAxes, as_long, batch_of, batch_size, resized, steps_of
from tdcompile.ir.modules import register_trees

# Allowed difference of a graph's outputs, relative to the network's largest output. Equal operators in equal order
# differ by rounding only, plus a few bits if a layer is computed by another kernel.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# Parameters up to this size are saved while a network runs, since it may initialise them from its first inputs.
_SMALL_PARAMETER = 2**16
# Attributes of every module.
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training"}


@dataclass(frozen=True)
class Case:
    """Inputs and the network's outputs on them.

    Attributes:
        what: the inputs in words, for a message, such as ``at a batch of 3``.
    """

    what: str
    call: Call
    outputs: list[Tensor]


def record_cases(module: nn.Module, call: Call, axes: Sequence[Axis], batch: BatchAxes) -> tuple[list[Case], list[str]]:
    """Run the network on the example inputs and on inputs with longer dynamic axes, and record the outputs.

    Returns:
        The cases, and the names of state that each call changes: numbers, strings, collections and buffers, such as a
        count of calls. Plain tensor attributes count as caches and are not named.

    Raises:
        InputError: the network does not run on the inputs, or its outputs differ between calls on equal inputs.
        FixedAxisError: the network runs on the example inputs and not on another size of a dynamic axis.
    """
    fresh, start = isolated_copy(module, share=False), _state_snapshot(module)
    try:
        cases = [Case("on the example inputs", call, run_network(module, call))]
    except InputError:
        raise
    except Exception as error:  # whatever the network's own code raises
        raise InputError(f"the network does not run on an input of {call.given}: {first_line(error)}") from error
    first = _state_snapshot(module)
    others, longer = [], resized(call.tensors, axes, 1)
    size = batch_size(call.tensors, batch)
    if size is not None:
        others.append((f"at a batch of {size + 1}", batch_of(call.tensors, size + 1, batch), "--no-dynamic-batch"))
    if axes:
        steps = {axis.name: "one" if axis.step == 1 else str(axis.step) for axis in axes}
        said = " and ".join(
            f"{', '.join(name for name, own in steps.items() if own == step)} {step}"
            for step in dict.fromkeys(steps.values())
        )
        others.append((f"with {said} longer", longer, "no --dynamic for it"))
    free = dict.fromkeys(axis.name for axis in axes if axis.alone)
    for name in free if len(steps_of(axes)) > 1 else ():
        own = [axis for axis in axes if axis.name == name]
        others.append((f"with {name} alone longer", resized(call.tensors, own, 2), "no --dynamic for it"))
    if call.tensors[0].is_meta:
        return cases, []
    for what, tensors, instead in others:
        other = call.with_tensors(tensors)
        try:
            cases.append(Case(what, other, run_network(module, other)))
        except Exception as error:
            missing = _axes_to_open_too(module, call, axes) if tensors is longer else ""
            raise FixedAxisError(
                f"the network runs on an input of {call.given} and not {what}, so that axis cannot stay open"
                + (f" by itself: open {missing} too" if missing else f": give {instead}")
                + f"; it says: {first_line(error)}",
                first_line(error),
            ) from error
    again = [run_network(module, call)]
    kept, changed = _changed_names(start, first), _changed_names(first, _state_snapshot(module))
    if changed:  # every second call may differ
        again.append(run_network(module, call))
    if kept and fresh is not module:  # its state may depend on its first inputs
        again.append(_outputs_after_other_inputs(fresh, call))
    if any(output_difference(cases[0].outputs, other) is not None for other in again):
        known = changed or kept
        why = f"each call changes '{known[0]}'" if known else "it draws random numbers, or keeps state"
        raise InputError(
            f"the network gives different outputs for equal inputs in eval mode: {why}, and a compiled model, which "
            "keeps nothing from one call for the next, cannot be checked against it; turn that off where it is built"
        )
    other = call.with_tensors(_other_values(call.tensors))
    with suppress(Exception):  # inputs that the network rejects show nothing
        cases.append(Case("on other values", other, run_network(module, other)))
    held = {
        f"{path}.{key}" if path else key for path, part in module.named_modules() for key in _tensor_attributes(part)
    }
    return cases, [name for name in changed if name not in held]


def _axes_to_open_too(module: nn.Module, call: Call, axes: Sequence[Axis]) -> str:
    """Return further axes that must be dynamic too, as written for ``--dynamic``; empty if they do not help."""
    others = as_long(call.tensors, axes)
    with suppress(Exception):  # whatever the network's own code raises
        run_network(module, call.with_tensors(resized(call.tensors, (*axes, *others), 1)))
        return ", ".join(f"{call.names[axis.input]}:{axis.axis}" for axis in others)
    return ""


def _tensor_attributes(part: nn.Module) -> list[str]:
    return [key for key, value in vars(part).items() if isinstance(value, Tensor)]


def _outputs_after_other_inputs(module: nn.Module, call: Call) -> list[Tensor]:
    """Return the outputs on the example of a network whose first call had other inputs of the same shape."""
    with suppress(Exception):  # inputs that the network rejects change nothing
        run_network(module, call.with_tensors(_other_values(call.tensors)))
    return run_network(module, call)


def _other_values(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return inputs with other values: entries of the first axis in reverse, numbers doubled."""
    return [x if not x.dim() else (2 * x if x.is_floating_point() else x).flip(0) for x in tensors]


def _changed_names(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    return [name for name, value in after.items() if before.get(name) != value]


@torch.no_grad()
def run_network(module: nn.Module, call: Call) -> list[Tensor]:
    """Call a network on copies of the inputs and return its output tensors.

    Raises:
        InputError: the output contains a number or string.
    """
    args, kwargs = call.split([x.clone() for x in call.tensors])  # a network may change its inputs in place
    output = module(*args, **kwargs)
    plain = next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, int | float | str)), None)
    if plain is not None:
        raise InputError(
            f"the network returns {plain!r}, and an ONNX model returns tensors only: return it as a "
            "tensor, or leave it out"
        )
    register_trees(output)  # torch.export requires it
    return list(tensors_in(output))


def output_difference(expected: Sequence[Tensor], got: Sequence[Tensor]) -> str | None:
    """Return the first deviation of a graph's outputs in words, or None if they are equivalent."""
    if len(expected) != len(got):
        return f"{len(got)} outputs for {len(expected)}"
    for place, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"output {place} is {tuple(ours.shape)} {ours.dtype} for {tuple(theirs.shape)} {theirs.dtype}"
        if ours.is_meta or not ours.numel() or _clearly_equal(theirs, ours):
            continue
        a, b = ours.detach().double(), theirs.detach().double()
        finite = torch.isfinite(b)
        scale = float(b[finite].abs().max()) if bool(finite.any()) else 0.0
        most = float((a - b)[finite].abs().max()) if bool(finite.any()) else 0.0
        same = bool(((a == b) | (a.isnan() & b.isnan()))[~finite].all())
        if not same or not most <= _TOLERANCE.get(theirs.dtype, 0.0) * max(scale, 1e-3):
            return f"output {place} differs by {most:.3g} on a scale of {scale:.3g}"
    return None


def _clearly_equal(expected: Tensor, got: Tensor) -> bool:
    """Return whether two tensors differ by less than half of what is allowed; never true where a value is not finite.

    It needs one tensor beside the two, in their precision: the logits of a language model are large.
    """
    if expected.dtype not in _TOLERANCE:
        return False
    scale = float(torch.linalg.vector_norm(expected.detach(), math.inf))
    most = float(torch.linalg.vector_norm(got.detach() - expected.detach(), math.inf))
    return math.isfinite(scale) and most <= _TOLERANCE[expected.dtype] * max(scale, 1e-3) / 2


def isolated_copy(module: nn.Module, share: bool = True) -> nn.Module:
    """Return a copy over shared tensors, so that state a network keeps in a call, such as a cache, stays in the copy.

    A module that cannot be copied is returned itself.

    Args:
        module: the network.
        share: also share tensors that a call may change: buffers and small parameters.
    """
    own = set() if share else {id(t) for t in _mutable_tensors(module)}
    shared: dict[int, object] = {id(t): t for t in (*module.parameters(), *module.buffers()) if id(t) not in own}
    # torch does not copy computed tensors (not leaves of autograd), which any attribute may hold
    loose = (v for part in module.modules() for v in vars(part).values() if isinstance(v, Tensor))
    shared |= {id(v): v.detach() for v in loose if not v.is_leaf}
    try:
        copied = copy.deepcopy(module, shared)
    except Exception:  # noqa: BLE001  # a network may hold anything
        return module
    for part in copied.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            hooks.update({key: _rebound(hook, shared) for key, hook in hooks.items()})
        own_functions = {key: value for key, value in vars(part).items() if isinstance(value, FunctionType)}
        vars(part).update({key: _rebound(value, shared) for key, value in own_functions.items()})
    return copied


def _rebound(value: Any, copies: dict[int, Any]) -> Any:
    """Return a value that a function of the network holds, with copies in place of what was copied.

    ``copy.deepcopy`` takes a function as it is, and a hook would write to the network it was defined in.
    """
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, partial):
        keywords = {key: _rebound(held, copies) for key, held in value.keywords.items()}
        return partial(_rebound(value.func, copies), *(_rebound(held, copies) for held in value.args), **keywords)
    if isinstance(value, dict | list | set):
        return copy.deepcopy(value, copies)
    if not isinstance(value, FunctionType) or not (value.__closure__ or value.__defaults__):
        return value
    cells = tuple(CellType() for _ in value.__closure__ or ())
    made = FunctionType(value.__code__, value.__globals__, value.__name__, closure=cells)
    copies[id(value)] = made  # first: a function may hold itself
    for cell, old in zip(cells, value.__closure__ or (), strict=True):
        with suppress(ValueError):  # an empty cell
            cell.cell_contents = _rebound(old.cell_contents, copies)
    made.__defaults__ = tuple(_rebound(held, copies) for held in value.__defaults__ or ()) or None
    made.__kwdefaults__ = value.__kwdefaults__
    made.__dict__.update(value.__dict__)
    return made


def _mutable_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.buffers(), *(p for p in module.parameters() if p.numel() <= _SMALL_PARAMETER)]


@contextmanager
def restoring_state(module: nn.Module) -> Iterator[None]:
    """Restore buffers and small parameters that a network changes in place, at the end of the context."""
    tensors = [t for t in _mutable_tensors(module) if not t.is_meta and t.layout == torch.strided]
    kept = [(t, t.detach().clone()) for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def _state_snapshot(module: nn.Module) -> Mapping[str, object]:
    """Return a comparable snapshot of a network's state by name; tensors count by their number of changes."""
    found: dict[str, object] = {}
    for path, part in module.named_modules():
        own = {key: _fingerprint(value) for key, value in vars(part).items() if key not in _MODULE_ATTRIBUTES}
        own |= {key: _fingerprint(value) for key, value in part._buffers.items()}
        found |= {f"{path}.{key}" if path else key: value for key, value in own.items()}
    return found


def _fingerprint(value: object) -> object:
    if isinstance(value, Tensor):
        return id(value), _version(value)
    if isinstance(value, dict | list | set):
        return id(value), len(value)
    return repr(value) if isinstance(value, int | float | str | None) else id(value)  # NaN is not itself


def _version(tensor: Tensor) -> int:
    """Return the number of in-place changes; tensors made in inference mode do not count them."""
    return 0 if tensor.is_inference() else tensor._version
