"""``Stream``: values of a graph's nodes over many batches, computed when asked for, forgotten when a part changes.

What works through a network layer by layer, changing it on the way, would otherwise run it from the start for each.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx

_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


class Stream:
    """Values of nodes, a list with one entry a batch each.

    A value is dropped once every node that reads it has been computed; it comes back, at the cost of computing it
    again, where it is asked for afterwards.

    Args:
        graph: in eval mode.
        batches: the inputs of each.
    """

    def __init__(self, graph: fx.GraphModule, batches: Sequence[tuple[Tensor, ...]]) -> None:
        self._graph, self._runner = graph, fx.Interpreter(graph)
        self._count = len(batches)
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self._inputs = {node: [batch[i] for batch in batches] for i, node in enumerate(inputs) if i < len(batches[0])}
        self._values: dict[fx.Node, list[object]] = dict(self._inputs)
        self._done: set[fx.Node] = set()  # computed since the last change, dropped or not

    @torch.no_grad()
    def values(self, node: fx.Node) -> list[object]:
        """What the node gives for each batch."""
        todo = [node]
        while todo:
            current = todo[-1]
            missing = [n for n in current.all_input_nodes if n not in self._values]
            if current in self._values:
                todo.pop()
            elif missing:
                todo += missing
            else:
                self._values[current] = self._run(current)
                self._done.add(current)
                todo.pop()
                self._tidy(current, keep={node, *todo, *(n for waiting in todo for n in waiting.all_input_nodes)})
        return self._values[node]

    def changed(self, nodes: Iterable[fx.Node]) -> None:
        """The modules that these nodes call have changed: forget their values and all that follow from them."""
        todo, seen = list(nodes), set[fx.Node]()
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                self._values.pop(node, None)
                self._done.discard(node)
                todo += list(node.users)

    def _run(self, node: fx.Node) -> list[object]:
        if node.op == "placeholder":  # one with a default, which no batch gives
            return [node.args[0] if node.args else None] * self._count
        found = []
        for i in range(self._count):
            inputs = {n: self._values[n][i] for n in node.all_input_nodes}
            # The order here is not the program's: what works in place must not reach what others are yet to read.
            copied = {n: v.clone() if isinstance(v, Tensor) else v for n, v in inputs.items()}
            self._runner.env = copied if self._in_place(node) else inputs
            found.append(self._runner.run_node(node))
        self._runner.env = {}
        return found

    def _in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self._graph.get_submodule(str(node.target))
            return any(bool(getattr(part, "inplace", False)) for part in module.modules())
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or "inplace" in node.kwargs

    def _tidy(self, computed: fx.Node, keep: set[fx.Node]) -> None:
        for node in computed.all_input_nodes:
            if node not in keep and node not in self._inputs and self._done.issuperset(node.users):
                self._values.pop(node, None)
