"""Fake quantisation: a PyTorch graph that rounds where an int8 model does, with the same scales and zero points."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions
from torch.export import Dim

from tdcompile.backend.quantize import Quantized, Scales, described_value
from tdcompile.backend.session import infer, open_session
from tdcompile.backend.weight_uses import UnmatchedError, round_weights
from tdcompile.ir.modules import evaluating, separate_attention
from tdcompile.ir.target import Target
from tdcompile.support.quiet import captured_output

# Two kernels of one operator differ by about 1e-6 of the value's scale; two values of a network differ by far more.
_SAME = 1e-4
_FEW = 64  # values that are compared first
_PLACE = "fake_quantize_{}"  # name of a module in the graph
# They do not change an integer if their input has the scale of their output.
_EXACT = ("MaxPool", "Relu", "Clip", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Concat")
# The exporter writes them as several operators, some of which have integer kernels.
_COMPOSED = [torch.ops.aten.silu, torch.ops.aten.hardswish, torch.ops.aten.hardsigmoid, torch.ops.aten.mish]

Array = NDArray[Any]


class FakeQuantize(nn.Module):
    """Round an activation to 8 bits and back.

    Attributes:
        tensor: its name in the float ONNX model.
    """

    def __init__(self, tensor: str, scale: float, zero: int, signed: bool) -> None:
        super().__init__()
        self.tensor = tensor
        self.low, self.high = (-128, 127) if signed else (0, 255)
        self.scale: Tensor
        self.zero: Tensor
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("zero", torch.tensor(zero, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """Return the values between two steps at the nearer one, and those out of range at its end."""
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, self.low, self.high)


@dataclass(frozen=True)
class Rounding:
    """Where the value of a graph's node is rounded, by which tensor's scale, and for which users; None for all."""

    node: str
    tensor: str
    users: frozenset[str] | None = None


@dataclass(frozen=True)
class Roundings:
    """All places where a graph is rounded; ``by_operator`` if they exist only after ``by_operator(graph, …)``."""

    places: tuple[Rounding, ...]
    by_operator: bool


def fake_quantized(
    graph: fx.GraphModule, model: Path, quantized: Quantized, inputs: Sequence[Tensor]
) -> fx.GraphModule:
    """Return a copy of a graph that rounds the weights and activations that an int8 model rounds.

    An ONNX value belongs to the nodes of the graph that have the same value on the inputs. If a value exists only
    inside a module, the copy is traced again by ``torch.export``, operator by operator.

    Args:
        graph: the lowered graph that the float model was exported from, in eval mode.
        model: the float model.
        quantized: the int8 model made from it.
        inputs: at least two samples, in the graph's order.

    Raises:
        UnmatchedError: the graph has no such value or weight; the message names it.
    """
    copied = copy.deepcopy(graph)
    round_weights(copied, onnx.load(model), onnx.load(quantized.path))
    found = roundings(graph, model, quantized, inputs)
    copied = by_operator(copied, inputs) if found.by_operator else copied
    signed = quantized.form.symmetric
    insert(copied, found.places, lambda tensor: FakeQuantize(tensor, *quantized.scales[tensor], signed))
    return copied


def roundings(graph: fx.GraphModule, model: Path, quantized: Quantized, inputs: Sequence[Tensor]) -> Roundings:
    """Return where a graph has the values that an int8 model rounds; see ``fake_quantized``.

    Raises:
        UnmatchedError: the graph has no such value; the message names it.
    """
    proto = onnx.load(model)
    ends = {name: _ends(proto, name) for name in quantized.scales}
    known = _values(proto, {*quantized.scales, *(end for each in ends.values() for end in each)}, inputs)
    sought = _Sought(known, ends, quantized.scales, equal_roundings(proto, quantized.scales))
    found, missing = _matched(graph, sought, inputs)
    inside = bool(missing)
    if inside:
        found, missing = _matched(by_operator(graph, inputs), sought, inputs)
    if missing:
        raise UnmatchedError(
            f"the value of {described_value(proto, missing[0])} is rounded to int8 in the ONNX model and has no "
            "counterpart in the PyTorch graph"
        )
    return Roundings(tuple(found), inside)


@dataclass(frozen=True)
class _Sought:
    """The values of the float model that have to be found in the graph.

    Attributes:
        values: by name, in the order in which the model computes them.
        ends: for each quantised value, the results of the operators that read it.
        scales: see ``Quantized``.
        redundant: quantised values that need not be found.
    """

    values: Mapping[str, Array]
    ends: Mapping[str, Sequence[str]]
    scales: Mapping[str, tuple[float, int]]
    redundant: Collection[str]


def _values(proto: onnx.ModelProto, names: Collection[str], inputs: Sequence[Tensor]) -> dict[str, Array]:
    """Return values of the float model on the inputs, in the order in which it computes them."""
    given = [value.name for value in proto.graph.input]
    computed = [name for node in proto.graph.node for name in node.output if name in names]
    found = {name: x.numpy() for name, x in zip(given, inputs, strict=True) if name in names}
    if not computed:
        return found
    widened = onnx.ModelProto()
    widened.CopyFrom(proto)
    del widened.graph.output[:]
    widened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in computed)
    session = open_session(widened.SerializeToString(), Target(), optimised=False)
    return found | dict(zip(computed, infer(session, inputs), strict=True))


def _ends(proto: onnx.ModelProto, name: str) -> list[str]:
    """Return the results of the operators that read a value, with those of the bias and reshape behind them."""
    stored = {weight.name for weight in proto.graph.initializer}
    found, frontier = [], [node for node in proto.graph.node if name in node.input]
    while frontier:
        outputs = [output for node in frontier for output in node.output]
        found += outputs
        frontier = [
            node
            for node in proto.graph.node
            if ((node.op_type == "Add" and set(node.input) & stored) or node.op_type == "Reshape")
            and set(node.input) & set(outputs)
        ]
    return found


def equal_roundings(proto: onnx.ModelProto, scales: Scales) -> dict[str, list[str]]:
    """Return the values whose rounding changes nothing, and the inputs, which are rounded to the same steps before."""
    stored = {weight.name for weight in proto.graph.initializer}
    found = {}
    for node in proto.graph.node:
        own = scales.get(node.output[0]) if node.output else None
        given = [name for name in node.input[: None if node.op_type == "Concat" else 1] if name not in stored]
        if own and node.op_type in _EXACT and given and all(scales.get(name) == own for name in given):
            found[node.output[0]] = given
    return found


class _Watched(fx.Interpreter):
    """Run a graph and find the nodes whose value is one of those sought, in its shape or in any."""

    def __init__(self, graph: fx.GraphModule, values: Mapping[str, Array], *, shaped: bool) -> None:
        super().__init__(graph)
        self.found: dict[str, list[str]] = {name: [] for name in values}
        self._shaped = shaped
        self._values: dict[object, list[tuple[str, Array, float]]] = {}
        for name, value in values.items():
            scale = float(np.abs(value).max(initial=0.0))
            self._values.setdefault(self._kind(value), []).append((name, value.reshape(-1), scale))

    def run_node(self, n: fx.Node) -> Any:
        """Compare the value of a node before a later one changes it in place."""
        value = super().run_node(n)
        if n.op not in ("get_attr", "output") and isinstance(value, Tensor) and value.is_floating_point():
            ours = value.detach().numpy()
            flat = ours.reshape(-1)
            for name, theirs, scale in self._values.get(self._kind(ours), []):
                if _agree(flat[:_FEW], theirs[:_FEW], scale) and _agree(flat, theirs, scale):
                    self.found[name].append(n.name)
        return value

    def _kind(self, value: Array) -> object:
        return value.shape if self._shaped else value.size


def _agree(ours: Array, theirs: Array, scale: float) -> bool:
    return bool(np.abs(ours - theirs).max(initial=0.0) <= _SAME * scale)


def _places(
    graph: fx.GraphModule, values: Mapping[str, Array], inputs: Sequence[Tensor], *, shaped: bool
) -> dict[str, list[str]]:
    watched = _Watched(graph, values, shaped=shaped)
    with evaluating(graph), torch.no_grad(), separate_attention():
        watched.run(*(x.clone() for x in inputs))
    return watched.found


def _matched(graph: fx.GraphModule, sought: _Sought, inputs: Sequence[Tensor]) -> tuple[list[Rounding], list[str]]:
    """Return the nodes to round, and the values without a node.

    A value may belong to several nodes, such as those before and after a dropout: rounding twice changes nothing. If
    several values with scales of their own agree, each has the node in its place.

    The exporter reshapes some values before it rounds them. The value before stays as it is, so it is rounded only for
    those users whose results are results of the reshaped value.
    """
    values = {name: value for name, value in sought.values.items() if name in sought.scales}
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, nodes in _places(graph, values, inputs, shaped=True).items():
        alike.setdefault(tuple(nodes), []).append(name)
    found = []
    missing = alike.pop((), [])
    for alternatives, names in alike.items():
        if len({sought.scales[name] for name in names}) == 1:
            found += [Rounding(node, names[0]) for node in alternatives]
        else:
            found += [Rounding(node, name) for node, name in zip(alternatives, names, strict=False)]
            missing += names[len(alternatives) :]
    missing = [name for name in missing if name not in sought.redundant]
    if missing:
        reshaped = _matched_users(graph, sought, missing, inputs)
        found += reshaped
        missing = [name for name in missing if name not in {each.tensor for each in reshaped}]
    return found, missing


def _matched_users(
    graph: fx.GraphModule, sought: _Sought, names: Sequence[str], inputs: Sequence[Tensor]
) -> list[Rounding]:
    wanted = {*names, *(end for name in names for end in sought.ends[name])}
    values = {name: value for name, value in sought.values.items() if name in wanted}
    places, nodes = _places(graph, values, inputs, shaped=False), {node.name: node for node in graph.graph.nodes}
    found = []
    for name in names:
        ends = {place for end in sought.ends[name] for place in places[end]}
        for place in places[name]:
            users = frozenset(user.name for user in nodes[place].users if user.name in ends)
            found += [Rounding(place, name, users)] if users else []
    return found


def by_operator(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Return the graph with its modules traced into, for any number of samples where they allow it."""
    samples = len(inputs[0])
    shapes = tuple({0: Dim.AUTO} if len(x) == samples else None for x in inputs)
    with evaluating(graph), torch.no_grad(), separate_attention(), captured_output():
        program = torch.export.export(graph, tuple(inputs), dynamic_shapes=(shapes,) if _packs(graph) else shapes)
        made = program.run_decompositions(get_decompositions(_COMPOSED)).module()
    assert isinstance(made, fx.GraphModule)
    return made


def _packs(graph: fx.GraphModule) -> bool:
    """Return whether the graph's ``forward`` collects its arguments in a tuple, as ``*args`` does."""
    return any(node.op == "placeholder" and str(node.target).startswith("*") for node in graph.graph.nodes)


def insert(graph: fx.GraphModule, found: Sequence[Rounding], make: Callable[[str], nn.Module]) -> None:
    """Round the values of a graph in place, each by the module that ``make`` returns for its tensor."""
    nodes = {node.name: node for node in graph.graph.nodes}
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for place, each in enumerate(found):
        node, module = nodes[each.node], _PLACE.format(place)
        graph.add_submodule(module, make(each.tensor))
        with graph.graph.inserting_after(last if node.op == "placeholder" else node):
            made = graph.graph.call_module(module, (node,))
        for user in [user for user in node.users if user is not made]:
            if each.users is None or user.name in each.users:
                user.replace_input_with(node, made)
    graph.graph.lint()
    graph.recompile()
