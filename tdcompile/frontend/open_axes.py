"""Find batch axes, and steps of open axes, by running the network at other sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, product

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tdcompile.errors import FixedAxisError, first_line
from tdcompile.frontend.equivalence import isolated_copy, run_network
from tdcompile.frontend.signature import Call
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode
from tdcompile.ir.dynamic_shapes import Axis, batch_of, batch_size, resized

# Assignments of batch axes that are tried, each by one run of the network.
_ASSIGNMENTS = 64
# Steps that are tried beside the divisors of the example's length: strides of pyramids and windows.
_USUAL_STEPS = (1, 2, 4, 8, 16, 32, 64)
# A step is right if the network runs at the example's length plus these multiples.
_MULTIPLES = (1, 2, 3)

Runs = Callable[[Sequence[Tensor]], bool]
BatchAxes = tuple[int | None, ...]


def prober(module: nn.Module, call: Call) -> Runs | None:
    """Return a function that says whether a copy of the network runs on tensors.

    None if it cannot be copied, or does not run on the example: the reason is then for the equivalence check to tell.
    """
    copied = isolated_copy(module, share=False)
    if copied is module or call.tensors[0].is_meta:
        return None

    def runs(tensors: Sequence[Tensor]) -> bool:
        try:
            with torch.random.fork_rng(devices=[]):
                run_network(copied, call.with_tensors(tensors))
        except Exception:  # noqa: BLE001  # whatever the network's own code raises
            return False
        return True

    return runs if runs(call.tensors) else None


def entries_not_samples(call: Call, batch: BatchAxes, runs: Runs) -> list[Axis]:
    """Return the first axes as open axes if they are no batch: the network runs with more entries and not with one.

    The nodes of a graph are such entries; samples do not need each other.
    """
    size = batch_size(call.tensors, batch)
    if size is None or size == 1 or runs(batch_of(call.tensors, 1, batch)):
        return []
    first = next(place for place, axis in enumerate(batch) if axis is not None)
    name = f"{call.names[first]}_{batch[first]}"
    found = [Axis(place, axis, name) for place, axis in enumerate(batch) if axis is not None]
    return found if runs(resized(call.tensors, found, 1)) else []


def check_recurrent_time(module: nn.Module, call: Call, batch: BatchAxes, axes: Sequence[Axis]) -> None:
    """Require that no recurrent layer runs over an open axis: torch exports its steps for one length only.

    Raises:
        FixedAxisError: a layer does.
    """
    copied = isolated_copy(module, share=False)
    if call.tensors[0].is_meta or not any(isinstance(part, nn.RNNBase) for part in copied.modules()):
        return
    plain = _recurrent_steps(copied, call, call.tensors)
    size = batch_size(call.tensors, batch)
    if size is not None:
        found = _longer(plain, _recurrent_steps(copied, call, batch_of(call.tensors, size + 1, batch)))
        if found:
            raise FixedAxisError(
                f"the recurrent layer '{found}' runs over the batch axis, {describe_batch_axes(batch, call.names)}, as "
                "if it were time, and torch exports its steps for one length only: give --batch-axis NAME=AXIS for the "
                "axis of the samples, or --no-dynamic-batch"
            )
    for name in dict.fromkeys(axis.name for axis in axes):
        own = [axis for axis in axes if axis.name == name]
        grown = own if own[0].alone else axes
        found = _longer(plain, _recurrent_steps(copied, call, resized(call.tensors, grown, 4)))
        if found:
            raise FixedAxisError(
                f"the recurrent layer '{found}' runs over the open axis '{name}', and torch exports its steps for one "
                "length only: give no --dynamic for it, and pad to the length of the example"
            )


def _recurrent_steps(module: nn.Module, call: Call, tensors: Sequence[Tensor]) -> dict[str, int]:
    """Return the number of steps of each recurrent layer, at its last call; nothing if the network does not run."""
    steps: dict[str, int] = {}
    hooks = []
    for name, part in module.named_modules():
        if isinstance(part, nn.RNNBase):

            def record(part: nn.Module, given: tuple[Tensor | PackedSequence, ...], name: str = name) -> None:
                x = given[0] if given else None
                if isinstance(x, PackedSequence):
                    steps[name] = len(x.batch_sizes)
                elif isinstance(x, Tensor):
                    steps[name] = x.shape[1 if part.batch_first and x.dim() == 3 else 0]

            hooks.append(part.register_forward_pre_hook(record))
    try:
        with torch.random.fork_rng(devices=[]):
            run_network(module, call.with_tensors(tensors))
    except Exception:  # noqa: BLE001  # the equivalence check tells what the network's own code raises
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    return steps


def _longer(before: dict[str, int], after: dict[str, int]) -> str:
    return next((name or "the network" for name, count in after.items() if before.get(name) not in (None, count)), "")


def find_batch_axes(
    module: nn.Module, call: Call, default: BatchAxes, runs: Runs, *, search: bool = True
) -> tuple[BatchAxes, list[Diagnostic]]:
    """Return the batch axis of each input: the default if the network runs along it, else the axes that work.

    Of several assignments, the one that gives the most inputs a batch is taken.

    Args:
        module: the network.
        call: the example inputs.
        default: the first axis of each input that is as long as the first input, or what the user gives.
        runs: see ``prober``.
        search: try other axes if the network does not run along these.

    Raises:
        FixedAxisError: no assignment works, or several that give equally many inputs a batch.
    """
    size = batch_size(call.tensors, default)
    if size is None or runs(batch_of(call.tensors, size + 1, default)):
        return default, []
    found: list[BatchAxes] = []
    for axes in islice(_assignments(call.tensors, default), _ASSIGNMENTS if search else 0):
        own = batch_size(call.tensors, axes)
        if own is not None and all(runs(batch_of(call.tensors, own + more, axes)) for more in (1, 2)):
            found.append(axes)
    most = max(map(_batched, found), default=0)
    found = [axes for axes in found if _batched(axes) == most]
    if len(found) == 1:
        said = describe_batch_axes(found[0], call.names)
        note = f"the batch is open along {said}: the network runs at other sizes of these axes together"
        return found[0], [Diagnostic("info", DiagnosticCode.OPEN_AXES, note)]
    if found:
        each = " or ".join(" ".join(_flags(axes, call.names)) for axes in found[:3])
        instead = f"give {each}, or --no-dynamic-batch"
    else:
        instead = "give --no-dynamic-batch, or --batch-axis NAME=AXIS if the samples lie along another axis"
    reason = _refusal(module, call, batch_of(call.tensors, size + 1, default))
    raise FixedAxisError(
        f"the network runs on an input of {call.given} and not at a batch of {size + 1}, so that axis cannot stay "
        f"open: {instead}; it says: {reason}",
        reason,
    )


def describe_batch_axes(batch: BatchAxes, names: Sequence[str]) -> str:
    """Return batch axes in words."""
    return ", ".join(f"axis {axis} of '{name}'" for axis, name in zip(batch, names, strict=True) if axis is not None)


def settle_axes(call: Call, axes: Sequence[Axis], runs: Runs) -> tuple[tuple[Axis, ...], list[Diagnostic]]:
    """Return open axes with their steps, under one name where the network runs only if they are equally long.

    A label or a step that the user gives is not changed.

    Args:
        call: the example inputs.
        axes: the axes that the user opens.
        runs: see ``prober``.

    Returns:
        The axes, and notes on what the user may not expect. Axes along which the network does not run are unchanged.
    """
    tensors, settled, notes = call.tensors, list(axes), list[Diagnostic]()
    if not axes:
        return (), notes
    together = runs(resized(tensors, settled, 1))
    for name in list(dict.fromkeys(axis.name for axis in axes)):
        own = [axis for axis in settled if axis.name == name]
        if not own or own[0].alone:
            continue
        step = _step(tensors, own, runs, find=not together)
        if step is not None:
            settled = [replace(a, step=step, alone=True) if a.name == name else a for a in settled]
            notes += _step_note(own[0], step)
            continue
        for partner in _partners(call, own[0], settled):
            both = [a for a in settled if a.name in (name, partner)]
            step = _step(tensors, both, runs, find=not together)
            if step is not None:
                settled = [replace(a, name=name, step=step, alone=True) if a in both else a for a in settled]
                notes += [*_tie_note(both), *_step_note(own[0], step)]
                break
    if together and len({axis.name for axis in settled}) > 1:
        notes += [
            Diagnostic("warning", DiagnosticCode.OPEN_AXES, f"the network does not run where '{name}' alone is longer")
            for name in dict.fromkeys(axis.name for axis in settled if not axis.alone)
        ]
    return tuple(settled), notes


def _step(tensors: Sequence[Tensor], axes: Sequence[Axis], runs: Runs, *, find: bool) -> int | None:
    """Return the smallest step in which the network takes other sizes of axes that grow together; None if none."""
    length = tensors[axes[0].input].shape[axes[0].axis]
    divisors = {step for step in range(1, length + 1) if length % step == 0}
    steps = sorted(divisors | set(_USUAL_STEPS)) if find and axes[0].step == 1 else [axes[0].step]
    for step in steps:
        grown = [replace(axis, step=step) for axis in axes]
        if all(runs(resized(tensors, grown, more)) for more in _MULTIPLES):
            return step
    return None


def _partners(call: Call, axis: Axis, axes: Sequence[Axis]) -> list[str]:
    """Return the names of axes that may be one with this axis: equally long, without a label, not open alone."""

    def kind(other: Axis) -> tuple[int, int, bool]:
        unlabelled = other.name == f"{call.names[other.input]}_{other.axis}"
        return call.tensors[other.input].shape[other.axis], other.step, unlabelled

    wanted = (*kind(axis)[:2], True)
    alike = (a.name for a in axes if a.name != axis.name and not a.alone and kind(a) == kind(axis) == wanted)
    return list(dict.fromkeys(alike))


def _step_note(axis: Axis, step: int) -> list[Diagnostic]:
    note = f"the axis '{axis.name}' is open in steps of {step}: the network does not run at sizes in between"
    return [Diagnostic("info", DiagnosticCode.OPEN_AXES, note)] if step != axis.step else []


def _tie_note(axes: Sequence[Axis]) -> list[Diagnostic]:
    """Tell that two axes of one input are one size; that two inputs share a length is what a user expects."""
    if len({axis.input for axis in axes}) == len(axes):
        return []
    names = " and ".join(f"'{name}'" for name in dict.fromkeys(axis.name for axis in axes))
    note = f"the axes {names} are open as one size: the network does not run where they differ"
    return [Diagnostic("warning", DiagnosticCode.OPEN_AXES, note)]


def _assignments(tensors: Sequence[Tensor], default: BatchAxes) -> Iterator[BatchAxes]:
    """Yield the batch axes that inputs may have: axes of one length, that of the first axis of some input."""
    sizes = [batch_size(tensors, default), *(len(x) for x in tensors if x.dim())]
    for size in dict.fromkeys(sizes):
        choices = [(*(axis for axis, n in enumerate(x.shape) if n == size), None) for x in tensors]
        yield from (axes for axes in product(*choices) if any(axis is not None for axis in axes))


def _batched(batch: BatchAxes) -> int:
    return sum(axis is not None for axis in batch)


def _flags(batch: BatchAxes, names: Sequence[str]) -> list[str]:
    return [f"--batch-axis {name}={'none' if axis is None else axis}" for axis, name in zip(batch, names, strict=True)]


def _refusal(module: nn.Module, call: Call, tensors: Sequence[Tensor]) -> str:
    try:
        run_network(isolated_copy(module, share=False), call.with_tensors(tensors))
    except Exception as error:  # noqa: BLE001  # whatever the network's own code raises
        return first_line(error)
    return "nothing"
