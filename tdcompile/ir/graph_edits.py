"""Edits of ``torch.fx`` graphs: copy a graph, replace a module, drop a node."""

from __future__ import annotations

import copy
import operator
from itertools import chain

from torch import fx, nn

from tdcompile.ir.modules import parent_of

_IN_PLACE = {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv}


def copy_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """Copy the graph and the module tree and share the tensors, so that large networks are not duplicated."""
    shared: dict[int, object] = {id(t): t for t in chain(graph.parameters(), graph.buffers())}
    return copy.deepcopy(graph, shared)


def copy_weights(graph: fx.GraphModule) -> fx.GraphModule:
    """Copy the graph and its tensors, for a pass that trains."""
    return copy.deepcopy(graph)


def works_in_place(node: fx.Node, module: nn.Module) -> bool:
    """Return whether a node may change a tensor that it reads.

    Args:
        module: the root of the modules that the graph calls.
    """
    if node.op == "call_module":
        parts = module.get_submodule(str(node.target)).modules()
        return any(bool(getattr(part, "inplace", False)) for part in parts)
    if node.op not in ("call_function", "call_method"):
        return False
    called = getattr(node.target, "overloadpacket", node.target)  # an ATen operator: "relu_", not "relu_.default"
    name = called if isinstance(called, str) else getattr(called, "__name__", "")
    written = name.endswith("_") and not name.endswith("__")
    return node.target in _IN_PLACE or written or bool(node.kwargs.get("inplace", False))


def replace_module(graph: fx.GraphModule, name: str, new: nn.Module) -> None:
    """Replace a module under all its names and at every call.

    If the graph calls the module and the new one is a sequence, each member becomes a node, ``name.0``, ``name.1``, ...
    Inside an untraced leaf the sequence stays one module.
    """
    nodes = [node for node in graph.graph.nodes if node.op == "call_module" and node.target == name]
    parent, leaf = parent_of(graph, name)
    old = getattr(parent, leaf)
    for other, module in list(graph.named_modules(remove_duplicate=False)):  # a shared module has several names
        if module is old:
            holder, key = parent_of(graph, other)
            setattr(holder, key, new)
    for node in nodes:
        if isinstance(new, nn.Sequential):
            _spread(graph, node, len(new))


def _spread(graph: fx.GraphModule, node: fx.Node, count: int) -> None:
    value: fx.Node = node.args[0] if node.args else next(iter(node.kwargs.values()))  # type: ignore[assignment]
    with graph.graph.inserting_before(node):
        for position in range(count):
            value = graph.graph.call_module(f"{node.target}.{position}", (value,))
    node.replace_all_uses_with(value)
    graph.graph.erase_node(node)


def calls_of(graph: fx.GraphModule, name: str) -> list[fx.Node]:
    """Return the nodes that call the module of this name."""
    return [node for node in graph.graph.nodes if node.op == "call_module" and node.target == name]


def module_at(graph: fx.GraphModule, node: fx.Node | object) -> nn.Module | None:
    """Return the module that a node calls, or None if it calls none."""
    if isinstance(node, fx.Node) and node.op == "call_module":
        return graph.get_submodule(str(node.target))
    return None


def only_user(node: fx.Node) -> fx.Node | None:
    """Return the only node that reads this one, or None if there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def drop_node(graph: fx.GraphModule, node: fx.Node) -> None:
    """Replace a node by its first argument, and delete its module if no other node calls it."""
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]  # a call_module's first argument is a node
    graph.graph.erase_node(node)
    if node.op == "call_module" and not calls_of(graph, str(node.target)):
        graph.delete_submodule(str(node.target))


def attribute(root: object, path: str) -> object:
    """Return the value at a dotted path."""
    return operator.attrgetter(path)(root)
