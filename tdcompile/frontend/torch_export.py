"""Front end on ``torch.export``, which returns the network's ATen graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from tdcompile.errors import FixedAxisError, UntraceableError
from tdcompile.frontend.guards import guard_violations
from tdcompile.frontend.signature import Call
from tdcompile.ir.dynamic_shapes import BATCH, Axis, BatchAxes, default_batch_axes, symbolic_lengths
from tdcompile.support.quiet import captured_output


def trace_with_export(
    module: nn.Module, call: Call, *, batch: BatchAxes | None = None, axes: Sequence[Axis] = ()
) -> tuple[fx.GraphModule, list[list[dict[str, int]]]]:
    """Return the network's ATen graph, over the network's tensors, with the call's tensors in order as inputs.

    The second value holds sizes of the open axes that violate a guard of the trace, see ``guard_violations``.

    Args:
        module: a network in eval mode.
        call: the example inputs.
        batch: the dynamic batch axis of each tensor, or None; by default the first axis.
        axes: further dynamic axes.

    Raises:
        UntraceableError: ``torch.export`` cannot pass through the network; the message says where.
        FixedAxisError: the network fixes an axis that is to be dynamic.
    """
    samples = default_batch_axes(call.tensors) if batch is None else batch
    names: list[dict[int, str]] = [{} if along is None else {along: BATCH} for along in samples]
    for axis in axes:
        names[axis.input][axis.axis] = axis.name
    opened = [
        {axis: "the batch axis" if name == BATCH else f"the axis '{name}'" for axis, name in each.items()}
        for each in names
    ]
    if call.tensors_in_kwargs and any(opened):
        given = ", ".join(call.tensors_in_kwargs)
        raise UntraceableError(
            f"torch.export leaves no axis open where forward takes a tensor by **kwargs, here {given}: "
            "name it in forward's signature, or give --no-dynamic-batch"
        )
    args, kwargs = call.split(call.tensors)
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]  # torch's own
    for tensor, each in zip(call.tensors, opened, strict=True):
        if each:
            shapes[tensor] = dict.fromkeys(each, Dim.AUTO)
    nested = shapes.dynamic_shapes(module, args, kwargs) if any(opened) else None  # type: ignore[no-untyped-call]
    export = partial(torch.export.export, module, args, kwargs, dynamic_shapes=nested, strict=False)
    try:
        with captured_output(), torch.no_grad(), symbolic_lengths():
            try:
                program = export()
            except GuardOnDataDependentSymNode as error:
                try:
                    with _integer_buffers_as_constants(module):
                        program = export()
                except Exception:  # noqa: BLE001  # on failure of the second attempt the first error stands
                    raise error from None
    except Exception as error:  # a network's forward may raise anything on symbols
        raise UntraceableError(_reason(error)) from error
    held = program.module(check_guards=False)
    assert isinstance(held, fx.GraphModule)  # ``module`` returns one
    _check_open_axes(held, call, opened)
    sizes = {name: x.shape[axis] for x, each in zip(call.tensors, names, strict=True) for axis, name in each.items()}
    graph = _with_tensor_inputs(held, call, program.call_spec.out_spec)
    return fx.GraphModule(held, graph), guard_violations(program, names, sizes)


@contextmanager
def _integer_buffers_as_constants(module: nn.Module) -> Iterator[None]:
    """Turn integers that a network keeps in buffers, such as a stride, into constants for a while.

    ``torch.export`` treats a buffer's value as unknown, and sizes computed from it too.
    """
    changed: list[tuple[nn.Module, type[nn.Module], dict[str, Tensor | None]]] = []
    try:
        for part in module.modules():
            found = {
                name: value
                for name, value in part.named_buffers(recurse=False)
                if value.dim() == 0 and value.dtype in (torch.int32, torch.int64) and not value.is_meta
            }
            # torch's own modules count batches there, and a scripted module cannot be changed
            if not found or type(part).__module__.startswith("torch."):
                continue
            made = {name: property(_constant_getter(value)) for name, value in found.items()}
            changed.append((part, type(part), dict(part._buffers)))
            part.__class__ = type(type(part).__name__, (type(part),), made)
            for name in found:
                del part._buffers[name]
        yield
    finally:
        for part, kind, buffers in changed:
            part.__class__ = kind
            part._buffers.clear()  # all are restored, because the state dict has their order
            part._buffers.update(buffers)


def _constant_getter(value: Tensor) -> Callable[[nn.Module], Tensor]:
    number, kind = value.item(), value.dtype
    return lambda part: torch.tensor(number, dtype=kind)


def _check_open_axes(held: fx.GraphModule, call: Call, opened: Sequence[Mapping[int, str]]) -> None:
    inputs = _tensor_inputs(held)
    for node, name, axes in zip(inputs, call.names, opened, strict=True):
        for axis, what in axes.items():
            if isinstance(node.meta["val"].shape[axis], int):
                raise FixedAxisError(
                    f"the network fixes {what} of its input '{name}' at {node.meta['val'].shape[axis]}"
                )


def _tensor_inputs(held: fx.GraphModule) -> list[fx.Node]:
    return [n for n in held.graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), Tensor)]


def _with_tensor_inputs(held: fx.GraphModule, call: Call, spec: pytree.TreeSpec | None) -> fx.Graph:
    """Return a graph whose inputs are tensors only, with the network's output nesting in plain containers."""
    graph, known = fx.Graph(), dict[fx.Node, fx.Node]()
    tensors = dict(zip(_tensor_inputs(held), call.names, strict=True))
    for node in held.graph.nodes:
        if node.op == "placeholder":
            if node in tensors:
                known[node] = graph.placeholder(tensors[node])
                known[node].meta = dict(node.meta)
            elif node.users:
                raise UntraceableError(f"the value of the argument '{node.name}' is used as if it were an input")
        elif node.op == "output":
            leaves = pytree.tree_leaves(node.args[0])
            values = [known[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
            graph.output(_nest_outputs(values, spec) if spec is not None else values[0])
        else:
            known[node] = graph.node_copy(node, known.__getitem__)
    return graph


def _nest_outputs(leaves: Sequence[Any], spec: pytree.TreeSpec) -> Any:
    """Nest leaves in tuples and dicts; a dataclass or a model's output type becomes a dict by field name."""
    remaining = iter(leaves)

    def build(part: pytree.TreeSpec) -> Any:
        if part.is_leaf():
            return next(remaining)
        children = [build(child) for child in part.children()]
        keys = part.context
        if isinstance(keys, list) and keys and isinstance(keys[0], list):
            keys = keys[0]  # a dataclass has its field names here, and the names of fields that are None
        named = isinstance(keys, list | tuple) and len(keys) == len(children) and all(isinstance(k, str) for k in keys)
        if named and part.type is not tuple:
            return dict(zip(keys, children, strict=True))
        return tuple(children)

    return build(spec)


def _reason(error: Exception) -> str:
    """Return the first line of torch.export's message, which may be pages."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
