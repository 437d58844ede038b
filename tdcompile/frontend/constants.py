"""``Constants``: values in a traced graph that depend on parameters and buffers only and are computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from tdcompile.ir.graph_edits import attribute, module_at


class Constants:
    """Values of the nodes of a freshly traced graph that depend on parameters and buffers only.

    Attributes:
        transposed: parameters with another parameter's values in a different axis order, by the other's ``id``.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._known: dict[fx.Node, Tensor | None] = {}
        self._parameters: dict[int, nn.Parameter] = {}
        self._sources: dict[fx.Node, list[fx.Node] | None] = {}
        self._readers: dict[int, list[fx.Node]] = {}  # ``get_attr`` nodes by the ``id`` of their tensor
        self._elsewhere: set[int] = set()  # tensors that a module of the graph reads
        self.transposed: dict[int, nn.Parameter] = {}
        for node in graph.graph.nodes:
            self._sources[node] = self._find_sources(node)
            if node.op == "get_attr":
                self._readers.setdefault(id(attribute(graph, str(node.target))), []).append(node)
            part = module_at(graph, node)
            if part is not None:
                self._elsewhere |= {id(tensor) for tensor in (*part.parameters(), *part.buffers())}

    def _find_sources(self, node: fx.Node) -> list[fx.Node] | None:
        if node.op == "get_attr":
            return [node]
        if node.op not in ("call_function", "call_method") or node.is_impure():
            return None
        found: list[fx.Node] = []
        for other in node.all_input_nodes:
            inner = self._sources[other]
            if inner is None:
                return None
            found += inner
        return found or None

    def sources(self, node: fx.Node) -> list[fx.Node] | None:
        """Return the parameters and buffers that a value is computed from, or None if it depends on an input."""
        return self._sources.get(node)

    def value(self, node: object) -> Tensor | None:
        """Return the value of a node, or None if it depends on an input or a copy of it would undo weight sharing."""
        if not isinstance(node, fx.Node):
            return None
        if node.op == "get_attr":
            value = attribute(self._graph, str(node.target))
            return value if isinstance(value, Tensor) and value.is_floating_point() else None
        if node not in self._known:
            self._known[node] = self._compute(node)
        return self._known[node]

    def parameter(self, node: fx.Node) -> nn.Parameter | None:
        """Return the value of a node as a parameter: the network's own, or a new one for a computed value."""
        value = self.value(node)
        if value is None or isinstance(value, nn.Parameter):
            return value
        if id(value) not in self._parameters:
            self._parameters[id(value)] = nn.Parameter(value, requires_grad=node.op != "get_attr")
        return self._parameters[id(value)]

    def read_only_by(self, node: object, call: fx.Node) -> bool:
        """Return whether only calls of ``call``'s operator read a tensor; otherwise a transposed copy could diverge."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return True
        key = id(attribute(self._graph, str(node.target)))
        users = [user for reader in self._readers[key] for user in reader.users]
        return key not in self._elsewhere and all(user.target == call.target for user in users)

    @torch.no_grad()
    def _compute(self, node: fx.Node) -> Tensor | None:
        sources = self.sources(node)
        if sources is None:
            return None
        value = self._evaluate(node)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return None
        for source in sources:
            base = attribute(self._graph, str(source.target))
            if not isinstance(base, Tensor) or not self._is_independent(base, node, value):
                return None
        return value.detach().clone(memory_format=torch.contiguous_format)

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return attribute(self._graph, str(node.target))
        arguments, options = fx.map_arg((node.args, node.kwargs), self._evaluate)
        if node.op == "call_method":
            return getattr(arguments[0], str(node.target))(*arguments[1:], **options)
        assert callable(node.target)  # a call_function's target is
        return node.target(*arguments, **options)

    def _is_independent(self, base: Tensor, node: fx.Node, value: Tensor) -> bool:
        """Return whether a copy is safe: the value alone, or only partial views, are computed from the parameter."""
        if id(base) in self._elsewhere:
            return False
        ends = self._ends(base)
        return ends <= {node} or (
            _is_view_of(value, base) and all(other is node or self._is_part(other, base) for other in ends)
        )

    def _is_part(self, node: fx.Node, base: Tensor) -> bool:
        value = self._evaluate(node)
        return isinstance(value, Tensor) and _is_view_of(value, base)

    def _ends(self, base: Tensor) -> set[fx.Node]:
        """Return the nodes that combine values computed from a parameter with values computed from an input."""
        pending, ends = list(self._readers.get(id(base), ())), set[fx.Node]()
        while pending:
            node = pending.pop()
            for user in node.users:
                if self.sources(user) is None:
                    ends.add(node)
                else:
                    pending.append(user)
        return ends


def _is_view_of(value: Tensor, base: Tensor) -> bool:
    """Return whether a value is a view of a part of a parameter."""
    return value.untyped_storage().data_ptr() == base.untyped_storage().data_ptr() and value.numel() < base.numel()
