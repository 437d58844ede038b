"""``Stream``: values of a graph's nodes over many batches, computed on demand and dropped when a module changes.

A pass that changes a network layer by layer would otherwise run it from the start for each layer.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tdcompile.backend.quantized_form import QuantizedForm
from tdcompile.data.nesting import tensors_in
from tdcompile.ir.graph_edits import works_in_place
from tdcompile.ir.memory import footprint
from tdcompile.ir.modules import outputs_of


class Stream:
    """Values of nodes: a list with one entry for each batch.

    A value is dropped once every node that reads it has been computed. It is recomputed if it is read again later. An
    in-place operation works on a copy, and later readers of the value read its result. ``follows`` checks whether this
    reproduces a graph.

    Args:
        graph: a graph in eval mode.
        batches: the graph inputs of each batch.
        readers: nodes that read rounded values, as an int8 model computes them.
        form: how they are rounded; None rounds nothing.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        batches: Sequence[tuple[Tensor, ...]],
        readers: Collection[fx.Node] = (),
        form: QuantizedForm | None = None,
    ) -> None:
        self._graph, self._runner = graph, fx.Interpreter(graph)
        self._count, self._form = len(batches), form
        self._reads = self._readings()
        self._rounded = {source for reader in readers for source in self._reads[reader].values()} if form else set()
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self._inputs = {
            node: self._given(node, [batch[i] for batch in batches])
            for i, node in enumerate(inputs)
            if i < len(batches[0])
        }
        self._values: dict[fx.Node, list[object]] = dict(self._inputs)
        self._done: set[fx.Node] = set()  # nodes computed since the last change, whether their value is kept or dropped
        self._users: dict[fx.Node, list[fx.Node]] = {node: [] for node in graph.graph.nodes}
        for node, readings in self._reads.items():
            for source in readings.values():
                self._users[source].append(node)

    @property
    def rounds(self) -> bool:
        """Whether there are rounded values."""
        return bool(self._rounded)

    @torch.no_grad()
    def values(self, node: fx.Node) -> list[object]:
        """Return the node's value for each batch."""
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
        """Return the value of ``node`` that ``reader`` reads, after the in-place operations between them."""
        return self.values(self._reads[reader][node])

    def changed(self, nodes: Iterable[fx.Node]) -> None:
        """Drop the values of these nodes, whose modules have changed, and all values that depend on them."""
        todo, seen = list(nodes), set[fx.Node]()
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                self._values.pop(node, None)
                self._done.discard(node)
                todo += self._users[node]

    def _run(self, node: fx.Node) -> list[object]:
        if node.op == "placeholder":  # an input with a default, which the batches leave out
            return [node.args[0] if node.args else None] * self._count
        # Nodes do not run in program order, so an in-place operation must not change a value that others read.
        copied = works_in_place(node, self._graph)
        found = []
        for i in range(self._count):
            inputs = {n: self._values[source][i] for n, source in self._reads[node].items()}
            if copied:
                inputs = {n: v.clone() if isinstance(v, Tensor) else v for n, v in inputs.items()}
            self._runner.env = inputs
            found.append(self._runner.run_node(node))
        self._runner.env = {}
        return self._given(node, found)

    def _given(self, node: fx.Node, values: list[object]) -> list[object]:
        """Return the values of a node as others read them."""
        return rounded(values, self._form) if self._form is not None and node in self._rounded else values

    def _readings(self) -> dict[fx.Node, dict[fx.Node, fx.Node]]:
        """Return, for each node, its argument nodes mapped to the nodes whose values it reads."""
        latest: dict[fx.Node, fx.Node] = {}  # a node whose value was changed in place -> the node that changed it
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


def rounded(values: Sequence[object], form: QuantizedForm) -> list[object]:
    """Return values rounded to 8 bits, with one scale from their least and largest entry over all batches."""
    floats = [v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.numel()]
    low = min((float(v.min()) for v in floats), default=math.nan)
    high = max((float(v.max()) for v in floats), default=math.nan)
    if not (math.isfinite(low) and math.isfinite(high)):  # whoever reads them says so
        return list(values)
    step = form.step(low, high)
    least, most = form.limits
    zero = 0 if form.symmetric else round(-min(low, 0.0) / step)
    return [
        ((v / step).round_() + zero).clamp_(least, most).sub_(zero).mul_(step)
        if isinstance(v, Tensor) and v.is_floating_point()
        else v
        for v in values
    ]


def follows(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> bool:
    """Return whether a ``Stream`` of a graph in eval mode reproduces the graph's outputs.

    It does not if a value is changed through a view, or by an assignment to a part of it.
    """
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    stream = Stream(graph, [tuple(x.clone() for x in inputs)])
    values: dict[fx.Node, Any] = {node: stream.read(output, node)[0] for node in output.all_input_nodes}
    given = tensors_in(fx.node.map_arg(output.args[0], values.__getitem__))
    return all(_close(a, b) for a, b in zip(given, outputs_of(graph, inputs), strict=True) if b.numel())


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether two outputs agree up to rounding; indices and masks of equal values are equal."""
    if not theirs.is_floating_point():
        return torch.equal(ours, theirs)
    scale = float(theirs.abs().max())
    return torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)


def samples_in_memory(graph: fx.GraphModule, inputs: Sequence[Tensor], memory: int) -> int:
    """Return how many samples a ``Stream`` of two networks holds in ``memory`` MB, at least 2.

    Each network keeps about three of its largest tensors alive.
    """
    return max(2, int(memory * 1e6 / (6 * footprint(graph, inputs).largest)))
