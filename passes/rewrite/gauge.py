"""``gauge``: choose the basis of the values between the factors of a layer so that int8 rounds them with less noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, fx, nn

from tdcompile.backend.evaluation import filled_batches
from tdcompile.backend.learned_quantization import LearnedScales
from tdcompile.core.passes import RewritePass, Rewritten
from tdcompile.core.plan import RankPlan
from tdcompile.ir.graph_edits import calls_of, module_at, only_user
from tdcompile.ir.layer import Layer
from tdcompile.ir.memory import samples_within
from tdcompile.ir.modules import called_differently, outputs_of
from tdcompile.ir.program import Change, Program
from tdcompile.numerics.gauge import channel_gauge, spreading_gauge
from tdcompile.support.options import Count

_BATCH = 32
_MEMORY = 500  # MB of values that are kept; if there are more, the graph runs twice
Read = Callable[[Tensor], None]  # takes values of a boundary, ``(n, r)``


class _Boundary(NamedTuple):
    """Two factors of one layer, the second of which reads nothing but the first."""

    layer: str
    names: tuple[str, str]
    modules: tuple[nn.Module, nn.Module]
    shapes: tuple[Layer, Layer]

    @property
    def dense(self) -> bool:
        """Whether the values may be mixed, and not only scaled."""
        return all(shape.groups == 1 for shape in self.shapes)


@dataclass(frozen=True)
class Gauge(RewritePass):
    """Rotate and scale the values between the factors of a layer for int8; the layer's function does not change.

    Nothing nonlinear lies between two factors A and B, so (B·G⁻¹)(G·A) equals B·A for every invertible G. Between dense
    factors G is the square-root split of the singular values in the metric of the samples, then a Hadamard rotation;
    between depthwise factors G only scales. Then each channel is scaled to the same largest value. With 8 bits this
    matters where a channel has outliers.

    The pass runs at export, on the compiled network of an int8 plan. It needs training samples. A network that was
    tuned through rounding keeps the basis in which it was tuned.

    Attributes:
        samples: upper bound on the training samples that tell the values' moments and ranges.
    """

    name: ClassVar[str] = "gauge"
    lowering: ClassVar[int] = 3  # batch norm in the last factor changes what reads the values
    samples: Count = 64

    def rewrite(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        """Replace the weights of the factors on both sides of each boundary."""
        plan, train = program.facts.get(RankPlan), program.task.train
        if plan is None or plan.precision != "int8" or train is None:
            return Rewritten(graph)
        learned = program.facts.get(LearnedScales)
        if learned is not None and learned.fit(graph):
            return Rewritten(graph)
        found = _boundaries(graph, [name for name, choice in plan.choices.items() if not choice.is_dense])
        if not found:
            return Rewritten(graph)
        size = samples_within(program, _BATCH)
        inputs = [batch.inputs for batch, _ in filled_batches(train, program, size, self.samples)]
        for boundary, gauge in zip(found, _gauges(graph, found, inputs, program), strict=True):
            _apply(boundary, gauge)
        changed = dict.fromkeys(boundary.layer for boundary in found)
        return Rewritten(
            graph, [Change(layer, self.name, "its inner values got a basis for int8") for layer in changed]
        )


def _boundaries(graph: fx.GraphModule, layers: Sequence[str]) -> list[_Boundary]:
    """Return the pairs of factors with nothing between them, in the order of the graph."""
    found = []
    for node in graph.graph.nodes:
        reader = only_user(node)
        first, second = module_at(graph, node), module_at(graph, reader)
        layer = next((name for name in layers if str(node.target).startswith(f"{name}.")), None)
        if first is None or second is None or reader is None or layer is None:
            continue
        names = str(node.target), str(reader.target)
        if not names[1].startswith(f"{layer}.") or any(len(calls_of(graph, name)) > 1 for name in names):
            continue
        shapes = Layer.of(first, ()), Layer.of(second, ())
        if shapes[0] is None or shapes[1] is None or shapes[0].bias or shapes[0].kind != shapes[1].kind:
            continue
        if called_differently(first) or called_differently(second):
            continue  # a hook would see other values
        found.append(_Boundary(layer, names, (first, second), (shapes[0], shapes[1])))
    return found


def _gauges(
    graph: fx.GraphModule, found: Sequence[_Boundary], inputs: Sequence[tuple[Tensor, ...]], program: Program
) -> list[Tensor]:
    """Return G of each boundary in float64: ``(r, r)``, or ``(r,)`` where it is diagonal."""
    moments: list[Tensor | float] = [0.0] * len(found)
    kept: list[tuple[int, Tensor]] = []  # all values in order, or none once they exceed ``_MEMORY``
    size = 0

    def add(place: int, values: Tensor) -> None:
        nonlocal size
        size += values.nbytes
        if size <= _MEMORY * 1e6:
            kept.append((place, values))
        else:
            kept.clear()
        if found[place].dense:
            wide = values.double()
            moments[place] = moments[place] + wide.T @ wide

    _observe(graph, {i: (one, partial(add, i)) for i, one in enumerate(found)}, inputs)
    generator, grams = program.generator("gauge"), _grams(found)
    mixed = {i: spreading_gauge(torch.as_tensor(moments[i]), grams[i], generator) for i in grams}
    ranges: list[tuple[Tensor, Tensor] | None] = [None] * len(found)

    def widen(place: int, values: Tensor) -> None:
        values = values.double() @ mixed[place].T if place in mixed else values.double()
        low, high = torch.aminmax(values, dim=0)
        known = ranges[place]
        ranges[place] = (low, high) if known is None else (low.minimum(known[0]), high.maximum(known[1]))

    if not kept:
        _observe(graph, {i: (one, partial(widen, i)) for i, one in enumerate(found)}, inputs)
    for place, values in kept:
        widen(place, values)
    gauges = []
    for place, known in enumerate(ranges):
        assert known is not None  # the samples went through every layer of the graph
        scale = channel_gauge(*known)
        gauges.append(scale[:, None] * mixed[place] if place in mixed else scale)
    return gauges


def _observe(
    graph: fx.GraphModule, reads: dict[int, tuple[_Boundary, Read]], inputs: Sequence[tuple[Tensor, ...]]
) -> None:
    """Run the graph and give the values of each boundary to its reader, with the channels last."""
    hooks = []
    for boundary, read in reads.values():
        axis = 1 - _weight(boundary.modules[0]).dim()  # of the channels: before the spatial axes, if there are any

        def hook(_: nn.Module, __: object, output: Tensor, read: Read = read, axis: int = axis) -> None:
            read(output.detach().movedim(axis, -1).flatten(0, -2))

        hooks.append(boundary.modules[0].register_forward_hook(hook))
    try:
        for batch in inputs:
            outputs_of(graph, batch)
    finally:
        for handle in hooks:
            handle.remove()


def _grams(found: Sequence[_Boundary]) -> dict[int, Tensor]:
    """Return the Gram matrix of what reads each dense boundary, up to the end of its chain of dense factors.

    It is the sum of B_kᵀ N B_k over the taps k of the reader, with N that of the next boundary, or the identity.
    """
    grams: dict[int, Tensor] = {}
    after: dict[str, Tensor] = {}
    for place in reversed(range(len(found))):
        boundary = found[place]
        if not boundary.dense:
            continue
        weight = _weight(boundary.modules[1]).double()
        weight = weight.reshape(*weight.shape[:2], -1)
        following = after.get(boundary.names[1])
        seen = weight if following is None else torch.einsum("st,tik->sik", following, weight)
        grams[place] = torch.einsum("tik,tjk->ij", weight, seen)
        after[boundary.names[0]] = grams[place]
    return grams


@torch.no_grad()
def _apply(boundary: _Boundary, gauge: Tensor) -> None:
    """Multiply the first factor by G from the left and the second by its inverse from the right."""
    first, second = boundary.modules
    rows, columns = _weight(first), _weight(second)
    if gauge.dim() == 2:
        made = torch.einsum("ij,j...->i...", gauge, rows.double())
        other = torch.einsum("ij...,jk->ik...", columns.double(), torch.linalg.inv(gauge))
    else:
        groups = boundary.shapes[1].groups
        # (T, C / groups): the inputs that each output of the second factor reads
        inverse = gauge.reciprocal().reshape(groups, -1).repeat_interleave(len(columns) // groups, 0)
        made = rows.double() * gauge.reshape(-1, *(1,) * (rows.dim() - 1))
        other = columns.double() * inverse.reshape(*inverse.shape, *(1,) * (columns.dim() - 2))
    for module, old, new in ((first, rows, made), (second, columns, other)):
        module.weight = nn.Parameter(new.to(old.dtype).contiguous(), requires_grad=old.requires_grad)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)  # ``Layer.of`` accepts no module without a weight
    return weight.detach()
