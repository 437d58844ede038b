"""Front end on ``torch.fx`` proxies; a module that proxies cannot pass through becomes a leaf."""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from tdcompile.errors import UntraceableError, first_line
from tdcompile.frontend.signature import Call
from tdcompile.ir.graph_edits import works_in_place


class _Tracer(fx.Tracer):
    """Symbolic tracer with additional leaf modules."""

    def __init__(self, leaves: Mapping[str, str]) -> None:
        super().__init__()
        self.leaves = leaves
        self.stack: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is one of torch.nn's own, except containers, or failed in an earlier attempt."""
        return module_qualified_name in self.leaves or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward, args, kwargs):  # type: ignore[no-untyped-def]  # fx's own signature
        """Record the stack of modules, which shows where an error was raised."""
        self.stack.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.stack.pop()
        return result


def trace_with_fx(module: nn.Module, call: Call) -> tuple[fx.GraphModule, dict[str, str]]:
    """Trace a network; the innermost module that fails becomes a leaf, until tracing succeeds.

    Returns:
        The graph, and the reason for each leaf by its name.

    Raises:
        UntraceableError: an argument contains tensors, which a proxy cannot represent.
    """
    if call.nested:
        raise UntraceableError("an argument holds tensors inside it, and a proxy stands for a whole argument")
    leaves: dict[str, str] = {}
    while True:
        tracer = _Tracer(leaves)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # one for every argument with its default value
                graph = tracer.trace(module, call.defaults())
            _keep_tensor_inputs(graph, call, module)
            _inline_dtypes(graph, module)
            graph.lint()
            made = fx.GraphModule(module, graph)
        except Exception as error:  # noqa: BLE001  # a network's forward may raise anything on proxies
            reason = first_line(error)
            if not tracer.stack or tracer.stack[-1] in leaves:
                return _single_node_graph(module, call), {"": reason}
            leaves[tracer.stack[-1]] = reason
            continue
        return made, leaves


def _keep_tensor_inputs(graph: fx.Graph, call: Call, module: nn.Module) -> None:
    """Remove the graph's inputs that are not tensors: fx makes an input of every argument."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    found: dict[str, fx.Node] = {}
    for node in inputs:
        name = str(node.target)
        if name in call.names:
            node.args = ()
            found[name] = node
            continue
        for check in [user for user in node.users if not user.users]:  # fx's checks that the default is unchanged
            graph.erase_node(check)
        for part in [user for user in node.users if all(not u.users for u in user.users)]:
            for check in list(part.users):
                graph.erase_node(check)
            graph.erase_node(part)
        if node.users:
            raise UntraceableError(f"the argument '{name.removeprefix('*')}', which has no example, is used")
        graph.erase_node(node)
    for node in graph.nodes:
        if not node.users and works_in_place(node, module):
            raise UntraceableError(f"'{node.name}' works in place, which symbolic tracing loses")
    end = next(node for node in graph.nodes if node.op == "output")
    end.args = (_plain_containers(end.args[0]),)
    if list(found) != list(call.names):
        raise UntraceableError(f"the graph takes {', '.join(found)} where {', '.join(call.names)} are given")


def _inline_dtypes(graph: fx.Graph, module: nn.Module) -> None:
    """Replace ``weight.dtype`` by its value, so that its users do not read the weight."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not getattr or node.args[1:] != ("dtype",):
            continue
        weight = node.args[0]
        if weight.op == "get_attr":
            kind = operator.attrgetter(str(weight.target))(module).dtype
            for user in list(node.users):
                user.args = _replace_argument(user.args, node, kind)
                user.kwargs = _replace_argument(user.kwargs, node, kind)
            graph.erase_node(node)
            if not weight.users:
                graph.erase_node(weight)


def _replace_argument(arguments: Any, node: fx.Node, value: Any) -> Any:
    """Return a node's arguments with a value in place of another node."""

    def put(other: fx.Node) -> Any:
        return value if other is node else other

    return fx.map_arg(arguments, put)


def _plain_containers(value: Any) -> Any:
    """Return an output with dataclasses as mappings, so that the graph returns tensors in plain containers only."""
    if isinstance(value, fx.Node):
        if value.op != "call_function" or not dataclasses.is_dataclass(value.target):
            return value
        names = [field.name for field in dataclasses.fields(value.target)]
        return {
            name: _plain_containers(part)
            for name, part in {**dict(zip(names, value.args, strict=False)), **value.kwargs}.items()
        }
    if isinstance(value, dict):
        return {key: _plain_containers(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(_plain_containers, value))
    return value


def _single_node_graph(module: nn.Module, call: Call) -> fx.GraphModule:
    """Return a graph of one node that calls the network, for a network whose own ``forward`` cannot be traced."""
    holder = nn.Module()
    holder.add_module("network", module)
    graph = fx.Graph()
    values = [graph.placeholder(name) for name in call.names]
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = call.split(values)
    graph.output(graph.call_module("network", *arguments))
    made = fx.GraphModule(holder, graph)
    torch.nn.Module.train(made, module.training)
    return made
