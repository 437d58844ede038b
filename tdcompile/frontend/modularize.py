"""Replace functional layers in a graph, such as ``F.conv2d`` or ``aten.linear``, by modules over their weights.

After that a layer is a module with a name, whichever front end traced it. A weight that is computed from parameters
only (a slice of a packed projection, a transposed matrix) is computed once, here.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import fx, nn

from tdcompile.frontend.constants import Constants
from tdcompile.frontend.layer_calls import TENSORS, TRANSPOSED_CONVS, LayerCall, arguments, read_layer_call, traced_in
from tdcompile.ir.conv_modules import TransposedConv
from tdcompile.ir.graph_edits import module_at

aten = torch.ops.aten

_PARAMETRIZED = ".parametrizations.weight."  # path of the tensors that a parametrised weight is computed from
# Run-time checks in a traced graph; the equivalence check of the graph replaces them.
_RUNTIME_CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}


def modularize(graph: fx.GraphModule) -> None:
    """Turn each layer with constant weights into a module call, in place; remove run-time checks and unread tensors."""
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target in _RUNTIME_CHECKS and not node.users:
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    _positional_arguments(graph)
    names, constants = _Names(graph), Constants(graph)
    calls = [call for node in graph.graph.nodes if (call := read_layer_call(node, constants)) is not None]
    modules = _transposed_convolutions(graph, constants)
    made: dict[tuple[object, ...], nn.Module | None] = {}
    for call in calls:
        if call.key not in made:
            made[call.key] = call.build(constants)
    built = [call for call in calls if made[call.key] is not None]
    called = names.of(built, constants)
    for call in built:
        name, module = called[call.key], made[call.key]
        assert module is not None  # ``built`` has no other
        modules[name] = module.train(graph.training)
        with graph.graph.inserting_before(call.node):
            new = graph.graph.create_node("call_module", name, (arguments(call.node)["input"],))
        new.meta = dict(call.node.meta)
        call.node.replace_all_uses_with(new)
        _erase_with_sources(graph.graph, call.node)
    _drop_unread(graph)  # a weight that was computed replaces its source, which is removed
    for name in sorted(modules, key=lambda name: name.count(".")):
        graph.add_submodule(name, modules[name])
    graph.graph.lint()
    graph.recompile()


def _positional_arguments(graph: fx.GraphModule) -> None:
    """Turn keyword arguments of torch's modules into positional ones: passes read the first argument."""
    for node in graph.graph.nodes:
        part = module_at(graph, node)
        if part is None or not node.kwargs or not type(part).__module__.startswith("torch.nn."):
            continue
        given, named = list(node.args), dict(node.kwargs)
        for parameter in list(inspect.signature(part.forward).parameters.values())[len(given) :]:
            if parameter.name not in named or parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
                break
            given.append(named.pop(parameter.name))
        node.args, node.kwargs = tuple(given), named


def _transposed_convolutions(graph: fx.GraphModule, constants: Constants) -> dict[str, nn.Module]:
    """Return replacements of torch's transposed convolution modules by name."""
    found: dict[str, nn.Module] = {}
    for node in graph.graph.nodes:
        part = module_at(graph, node) if str(node.target) not in found else None
        if isinstance(part, TRANSPOSED_CONVS) and len(node.args) == 1 and not node.kwargs:
            found[str(node.target)] = TransposedConv.of(part, constants.transposed)
    return found


def _drop_unread(graph: fx.GraphModule) -> None:
    """Remove unread parameters and buffers from the graph's plain containers; layers keep theirs."""
    used = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for path, part in graph.named_modules():
        if part is graph or type(part) is nn.Module:
            for kept in (part._parameters, part._buffers):
                for name in list(kept):
                    if (f"{path}.{name}" if path else name) not in used:
                        del kept[name]


def _erase_with_sources(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node and the nodes that only it reads."""
    pending = [node]
    while pending:
        gone = pending.pop()
        if gone.users or gone.op in ("placeholder", "call_module"):
            continue
        sources = gone.all_input_nodes
        graph.erase_node(gone)
        pending += [source for source in sources if not source.users and not source.is_impure()]


class _Names:
    """Chooses names for new modules of a graph."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
        self._known = {name for name, _ in graph.named_modules()}
        self._inside: dict[str, set[str]] = {}  # targets that the graph reads or calls, by each module above them
        for node in graph.graph.nodes:
            if node.op in ("get_attr", "call_module"):
                parts = str(node.target).split(".")
                for end in range(1, len(parts)):
                    self._inside.setdefault(".".join(parts[:end]), set()).add(str(node.target))

    def of(self, calls: Sequence[LayerCall], constants: Constants) -> dict[tuple[object, ...], str]:
        """Return a name for each call's key: the module that holds the weight, ``fc`` for ``fc.weight``.

        If that module has other uses, the name is derived from the weight, ``blocks.0.w_layer`` from ``blocks.0.w``.
        A layer without a weight is named after the module in which it was traced.
        """
        found: dict[tuple[object, ...], str] = {}
        for call in calls:
            holder = self._holder(call.node, constants)
            if call.key not in found and holder and holder not in self._called:
                found[call.key] = self._take(holder)
        for call in calls:
            if call.key not in found:
                found[call.key] = self._fresh(self._base(call.node, constants))
        return found

    def _holder(self, node: fx.Node, constants: Constants) -> str:
        """Return the module that holds this layer only, or an empty text if there is none."""
        weight = arguments(node).get("weight")
        if not isinstance(weight, fx.Node):
            path = traced_in(node)
            return "" if path in self._inside else path
        source = self._base(node, constants)
        if _PARAMETRIZED in source:
            holder, leaf = source.partition(_PARAMETRIZED)[0], "weight"
        else:
            holder, _, leaf = source.rpartition(".")
        own = {str(other.target) for other in _reads(node)}
        return holder if leaf == "weight" and self._inside.get(holder, set()) <= own else ""

    def _base(self, node: fx.Node, constants: Constants) -> str:
        weight = arguments(node).get("weight")
        if not isinstance(weight, fx.Node):
            path = traced_in(node)
            return f"{path}.dropout" if path else node.name
        sources = constants.sources(weight)
        assert sources  # a weight that depends on an input is not a layer's call
        return str(sources[0].target)

    def _fresh(self, base: str) -> str:
        """Return a new name outside all modules that the graph calls."""
        parts = base.split(".")
        for end in range(1, len(parts)):
            if ".".join(parts[:end]) in self._called:
                parts = [*parts[: end - 1], "_".join(parts[end - 1 :])]
                break
        base = ".".join(parts)
        name, count = f"{base}_layer", 1
        while name in self._known:
            name, count = f"{base}_layer{count}", count + 1
        return self._take(name)

    def _take(self, name: str) -> str:
        self._called.add(name)
        self._known.add(name)
        return name


def _reads(node: fx.Node) -> list[fx.Node]:
    """Return the nodes of the parameters and buffers that a call reads."""
    found, pending = [], [value for name in TENSORS if isinstance(value := arguments(node).get(name), fx.Node)]
    while pending:
        other = pending.pop()
        found += [other] if other.op == "get_attr" else []
        pending += other.all_input_nodes
    return found
