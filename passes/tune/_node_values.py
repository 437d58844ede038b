"""``Stream``: values of a graph's nodes over many batches, computed when asked for, forgotten when a part changes.

What works through a network layer by layer, changing it on the way, would otherwise run it from the start for each.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tdcompile.ir.graph_edits import works_in_place
from tdcompile.ir.modules import outputs_of, tensors_in


class Stream:
    """Values of nodes, a list with one entry a batch each.

    A value is dropped once every node that reads it has been computed; it comes back, at the cost of computing it
    again, where it is asked for afterwards. What works in place works on a copy here, and what reads the value after it
    in the program reads its result; ``follows`` says whether that is all there is to a graph.

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
        self._reads = self._readings()
        self._users: dict[fx.Node, list[fx.Node]] = {node: [] for node in graph.graph.nodes}
        for node, readings in self._reads.items():
            for source in readings.values():
                self._users[source].append(node)

    @torch.no_grad()
    def values(self, node: fx.Node) -> list[object]:
        """What the node gives for each batch."""
        todo = [node]
        while todo:
            current = todo[-1]
            missing = [n for n in self._sources(current) if n not in self._values]
            if current in self._values:
                todo.pop()
            elif missing:
                todo += missing
            else:
                self._values[current] = self._run(current)
                self._done.add(current)
                todo.pop()
                self._tidy(current, keep={node, *todo, *(n for waiting in todo for n in self._sources(waiting))})
        return self._values[node]

    def read(self, reader: fx.Node, node: fx.Node) -> list[object]:
        """What one node reads of another: its value, or what has been made of it in place before."""
        return self.values(self._reads[reader][node])

    def changed(self, nodes: Iterable[fx.Node]) -> None:
        """The modules that these nodes call have changed: forget their values and all that follow from them."""
        todo, seen = list(nodes), set[fx.Node]()
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                self._values.pop(node, None)
                self._done.discard(node)
                todo += self._users[node]

    def _run(self, node: fx.Node) -> list[object]:
        if node.op == "placeholder":  # one with a default, which no batch gives
            return [node.args[0] if node.args else None] * self._count
        found = []
        for i in range(self._count):
            inputs = {n: self._values[source][i] for n, source in self._reads[node].items()}
            # The order here is not the program's: what works in place must not reach what others are yet to read.
            copied = {n: v.clone() if isinstance(v, Tensor) else v for n, v in inputs.items()}
            self._runner.env = copied if works_in_place(node, self._graph) else inputs
            found.append(self._runner.run_node(node))
        self._runner.env = {}
        return found

    def _readings(self) -> dict[fx.Node, dict[fx.Node, fx.Node]]:
        """For each node the nodes it names, and the nodes whose values it then reads."""
        latest: dict[fx.Node, fx.Node] = {}  # what was changed in place, and by which node
        found: dict[fx.Node, dict[fx.Node, fx.Node]] = {}

        def now(node: fx.Node) -> fx.Node:
            while node in latest:
                node = latest[node]
            return node

        for node in self._graph.graph.nodes:
            found[node] = {source: now(source) for source in node.all_input_nodes}
            if node.target is not operator.setitem and node.all_input_nodes and works_in_place(node, self._graph):
                latest[now(node.all_input_nodes[0])] = node
        return found

    def _sources(self, node: fx.Node) -> Iterable[fx.Node]:
        return self._reads[node].values()

    def _tidy(self, computed: fx.Node, keep: set[fx.Node]) -> None:
        for node in self._sources(computed):
            if node not in keep and node not in self._inputs and self._done.issuperset(self._users[node]):
                self._values.pop(node, None)


def follows(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> bool:
    """Whether a ``Stream`` of a graph in eval mode gives what the graph gives.

    It does not where a value is changed through a view of it, or by an assignment to a part of it.
    """
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    stream = Stream(graph, [tuple(x.clone() for x in inputs)])
    values: dict[fx.Node, Any] = {node: stream.read(output, node)[0] for node in output.all_input_nodes}
    given = tensors_in(fx.node.map_arg(output.args[0], values.__getitem__))
    return all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()), equal_nan=True)
        for a, b in zip(given, outputs_of(graph, inputs), strict=True)
        if b.numel()
    )
