"""``Constants``: what in a traced graph depends on parameters and buffers alone, and may be computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from tdcompile.ir.graph_edits import attribute, module_at


class Constants:
    """Values of nodes that depend on parameters and buffers alone, in the graph as it was traced.

    Attributes:
        turned: parameters that hold another's values in another order, by the other's identity.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._known: dict[fx.Node, Tensor | None] = {}
        self._parameters: dict[int, nn.Parameter] = {}
        self._sources: dict[fx.Node, list[fx.Node] | None] = {}
        self._readers: dict[int, list[fx.Node]] = {}  # the nodes that stand for a tensor, whatever its name
        self._elsewhere: set[int] = set()  # tensors that a module of the graph reads by itself
        self.turned: dict[int, nn.Parameter] = {}
        for node in graph.graph.nodes:
            self._sources[node] = self._from(node)
            if node.op == "get_attr":
                self._readers.setdefault(id(attribute(graph, str(node.target))), []).append(node)
            part = module_at(graph, node)
            if part is not None:
                self._elsewhere |= {id(tensor) for tensor in (*part.parameters(), *part.buffers())}

    def _from(self, node: fx.Node) -> list[fx.Node] | None:
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
        """The parameters and buffers that a value is computed from; None where an input goes into it."""
        return self._sources.get(node)

    def of(self, node: object) -> Tensor | None:
        """The value of a node; None where it depends on an input, or is shared in a way that a copy would undo."""
        if not isinstance(node, fx.Node):
            return None
        if node.op == "get_attr":
            value = attribute(self._graph, str(node.target))
            return value if isinstance(value, Tensor) and value.is_floating_point() else None
        if node not in self._known:
            self._known[node] = self._computed(node)
        return self._known[node]

    def parameter(self, node: fx.Node) -> nn.Parameter | None:
        """The same as a parameter: the network's own, or one made of what is computed."""
        value = self.of(node)
        if value is None or isinstance(value, nn.Parameter):
            return value
        if id(value) not in self._parameters:
            self._parameters[id(value)] = nn.Parameter(value, requires_grad=node.op != "get_attr")
        return self._parameters[id(value)]

    def only(self, node: object, call: fx.Node) -> bool:
        """Whether nothing reads a tensor but calls of one operator: a copy in another order would come apart."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return True
        key = id(attribute(self._graph, str(node.target)))
        users = [user for reader in self._readers[key] for user in reader.users]
        return key not in self._elsewhere and all(user.target == call.target for user in users)

    @torch.no_grad()
    def _computed(self, node: fx.Node) -> Tensor | None:
        sources = self.sources(node)
        if sources is None:
            return None
        value = self._value(node)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return None
        for source in sources:
            base = attribute(self._graph, str(source.target))
            if not isinstance(base, Tensor) or not self._alone(base, node, value):
                return None
        return value.detach().clone(memory_format=torch.contiguous_format)

    def _value(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return attribute(self._graph, str(node.target))
        arguments, options = fx.map_arg((node.args, node.kwargs), self._value)
        if node.op == "call_method":
            return getattr(arguments[0], str(node.target))(*arguments[1:], **options)
        assert callable(node.target)  # a call_function's target is
        return node.target(*arguments, **options)

    def _alone(self, base: Tensor, node: fx.Node, value: Tensor) -> bool:
        """Whether nothing else is computed from a parameter but other parts of it: a copy would come apart from it."""
        if id(base) in self._elsewhere:
            return False
        ends = self._ends(base)
        return ends <= {node} or (
            _is_view_of(value, base) and all(other is node or self._is_part(other, base) for other in ends)
        )

    def _is_part(self, node: fx.Node, base: Tensor) -> bool:
        value = self._value(node)
        return isinstance(value, Tensor) and _is_view_of(value, base)

    def _ends(self, base: Tensor) -> set[fx.Node]:
        """Where what is computed from a parameter meets what is computed from an input."""
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
    """Whether a value lies in a parameter's own memory and is less than the whole."""
    return value.untyped_storage().data_ptr() == base.untyped_storage().data_ptr() and value.numel() < base.numel()
