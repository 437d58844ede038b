"""Learned step sizes (LSQ): a fake-quantised graph whose scales are trained with its weights, and back to a file.

Esser et al., Learned Step Size Quantization, ICLR 2020. Rounding passes gradients straight through. The scale of an
activation is a parameter; the scales of a weight follow from its largest values at each step, as in the file.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from tdcompile.backend.fake_quantization import (
    FakeQuantize,
    by_operator,
    equal_roundings,
    insert,
    roundings,
)
from tdcompile.backend.quantize import Quantized, Scales, module_of
from tdcompile.backend.weight_scales import channel_scales, least_scales
from tdcompile.backend.weight_uses import UnmatchedError, equal_tensors, keep_lookups, tensors_of, weight_uses
from tdcompile.ir.facts import Fact
from tdcompile.ir.graph_edits import copy_weights
from tdcompile.ir.modules import parent_of

# Bounds of a scale, as shares of its first value. Ranges contain all values of the samples, so that larger scales
# lose steps only; an outlier may have made them far too large.
_LEAST, _MOST = 2.0**-10, 2.0**3
# Weight of a scale's gradient. Measured in five epochs of 9 steps at a rate of 0.02 with ranges 30 times too wide: with
# a weight of 1 scales fell by up to 2 %, with 10 by up to 13 %; with 50 by up to 43 %, but the first epoch doubled the
# loss.
_SPEED = 10.0


@dataclass(frozen=True)
class LearnedScales(Fact):
    """Scales of an int8 model that were trained together with the weights of its network.

    Attributes:
        scales: of the activations, by name in the exported fp32 model; empty if nothing was trained.
        floats: layers that went back to float before, with the reason.
        weights: digest of the weights that the scales were trained with; see ``digest_of``.
    """

    scales: Scales = field(default_factory=dict)
    floats: Mapping[str, str] = field(default_factory=dict)
    weights: str = ""

    def fit(self, graph: fx.GraphModule) -> bool:
        """Return whether a lowered graph has the weights that the scales were trained with."""
        return bool(self.scales) and self.weights == digest_of(graph)


def digest_of(graph: nn.Module) -> str:
    """Return a digest of the values of all parameters and buffers, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(graph.state_dict().items()):
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class _StraightThrough(torch.autograd.Function):
    """Replace a value by another; the gradient is that of the first."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        """Return the other value."""
        return other.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Pass the gradient to the first value."""
        return gradient, None


def _replaced(value: Tensor, other: Tensor) -> Tensor:
    made: Tensor = _StraightThrough.apply(value, other.detach())  # type: ignore[no-untyped-call]  # torch's
    return made


class _RoundInRange(torch.autograd.Function):
    """``torch._fake_quantize_learnable_per_tensor_affine`` for a CPU, in a fifth of its time.

    Measured on one thread with values of 128 × 16 × 32 × 32: 3.5 ms instead of 17 ms forward and back, where a 3×3
    convolution takes 8 ms (AMD EPYC, torch 2.13).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: int, low: int, high: int) -> Tensor:
        """Return the values at the nearest steps; those out of range at its end."""
        ctx.save_for_backward(x, scale)  # not the result, which the next operator may change in place
        ctx.limits = low - zero, high - zero
        return _at_steps(x, scale, ctx.limits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient to the values in range, and to the scale that of LSQ (equation 3) times ``_SPEED``."""
        x, scale = ctx.saved_tensors
        low, high = ctx.limits
        ends = (low - 0.5) * float(scale), (high + 0.5) * float(scale)
        within = torch.ops.aten.hardtanh_backward
        off = _at_steps(x, scale, ctx.limits).sub_(within(x, x, *ends))  # out of range: the end of the range
        slope = off.mul_(gradient).sum() / scale * _SPEED
        return within(gradient, x, *ends), slope, None, None, None


def _at_steps(x: Tensor, scale: Tensor, limits: tuple[int, int]) -> Tensor:
    """Return the values at the nearest multiples of a scale, between two of them."""
    return (x * float(scale.reciprocal())).round_().clamp_(*limits).mul_(float(scale))


class LearnedFakeQuantize(FakeQuantize):
    """Round an activation to 8 bits by a scale that is trained; its zero point stays.

    Args:
        tensor: see ``FakeQuantize``.
        scale: the scale, which is trained.
        zero: the zero point.
        signed: see ``FakeQuantize``.
    """

    def __init__(self, tensor: str, scale: LearnedScale, zero: int, signed: bool) -> None:
        super().__init__(tensor, scale.first, zero, signed)
        del self.scale
        self.learned, self._zero = scale, zero

    @property
    def scale(self) -> Tensor:  # type: ignore[override]  # the base class has a buffer
        """The scale, ``(1,)``."""
        bounded: Tensor = self.learned()
        return bounded

    def forward(self, x: Tensor) -> Tensor:
        """Return the values between two steps at the nearer one, and those out of range at its end."""
        made: Tensor
        if x.device.type == "cpu":
            made = _RoundInRange.apply(x, self.scale, self._zero, self.low, self.high)  # type: ignore[no-untyped-call]
        else:  # reading the scale would wait for the GPU
            zero = self.zero.float().reshape(1)
            made = torch._fake_quantize_learnable_per_tensor_affine(x, self.scale, zero, self.low, self.high, _SPEED)
        return made


class LearnedScale(nn.Module):
    """A trained scale within bounds; tensors that share a scale in the file share this module.

    The parameter is the logarithm of the scale over its first value (Jain et al., Trained Quantization Thresholds,
    MLSys 2020). Its gradient is LSQ's times the scale, so that neither the unit of the values nor their number decides
    how fast it moves, and the scale stays positive. SGD on the scale itself, with LSQ's weight 1 / √(n · Q), grew
    scales by 10⁴ where ranges clipped values, and moved others by less than 1 %.

    Args:
        scale: the first value.
        most: upper bound.
        tensors: names of the tensors, in the float ONNX model.
    """

    def __init__(self, scale: float, most: float, tensors: Sequence[str] = ()) -> None:
        super().__init__()
        self.first, self.tensors = scale, tuple(tensors)
        self.log = nn.Parameter(torch.zeros(1))
        self._least, self._most = scale * _LEAST, min(most, scale * _MOST)

    def forward(self) -> Tensor:
        """Return the scale, ``(1,)``; the gradient passes straight through the bounds."""
        scale = self.first * self.log.exp()
        return _replaced(scale, scale.clamp(self._least, self._most))


class RoundedWeight(nn.Module):
    """Parametrization: a weight rounded to 8 bits for each output channel; gradients pass straight through.

    Args:
        shape: of the weight in the ONNX model.
        transposed: whether the ONNX model has its transpose.
        axis: of the output channels in the ONNX model.
        reduced: see ``channel_scales``.
    """

    def __init__(self, shape: Sequence[int], *, transposed: bool, axis: int, reduced: bool) -> None:
        super().__init__()
        self._shape, self._transposed, self._axis, self._reduced = tuple(shape), transposed, axis, reduced
        self._known: tuple[object, Tensor] | None = None  # the scales of the last weight, which its bias needs again
        self._biases: list[tuple[LearnedScale, nn.Module, str]] = []

    def with_bias(self, scale: LearnedScale, layer: nn.Module, name: str) -> None:
        """Keep the scales large enough for a bias.

        Args:
            scale: of the layer's input.
            layer: has the bias.
            name: of the bias in the layer.
        """
        self._biases.append((scale, layer, name))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight as the file has it."""
        rows = self._rows(weight.detach())
        scales = self.scales(weight).reshape(-1, *(1,) * (rows.dim() - 1))
        rounded = (torch.round(rows / scales).clamp(-128, 127) * scales).movedim(0, self._axis)
        return _replaced(weight, rounded.T if self._transposed else rounded.reshape(weight.shape))

    def scales(self, weight: Tensor) -> Tensor:
        """Return the scale of each output channel, ``(channels,)``."""
        biases = [(float(scale().detach()), _unrounded(layer, name)) for scale, layer, name in self._biases]
        parts = [(step, id(bias), bias._version) for step, bias in biases]
        key = (id(weight), weight._version, weight.device, *parts)
        if self._known is None or self._known[0] != key:
            rows = self._rows(weight.detach()).cpu().numpy()
            bounds = [least_scales(bias.detach().cpu().numpy(), step) for step, bias in biases]
            least = np.maximum.reduce(bounds) if bounds else None
            scales = channel_scales(rows, reduced=self._reduced, least=least)
            self._known = key, torch.from_numpy(scales).to(weight.device)
        return self._known[1]

    def _rows(self, weight: Tensor) -> Tensor:
        return (weight.T if self._transposed else weight.reshape(self._shape)).movedim(self._axis, 0)


def _unrounded(layer: nn.Module, name: str) -> Tensor:
    """Return a parameter without its parametrization."""
    parts: Any = layer
    whole: Tensor = (
        parts.parametrizations[name].original if parametrize.is_parametrized(layer, name) else getattr(layer, name)
    )
    return whole


class RoundedBias(nn.Module):
    """Parametrization: a bias rounded to multiples of the scale of its input times that of its weight.

    Args:
        scale: of the input.
        layer: has the weight.
        weight: the name of the weight in the layer.
    """

    def __init__(self, scale: LearnedScale, layer: nn.Module, weight: str) -> None:
        super().__init__()
        self._parts = (scale, layer)  # a tuple hides them from the submodules
        self._weight = weight

    def forward(self, bias: Tensor) -> Tensor:
        """Return the bias as the file has it: 32-bit integers times the product of both scales."""
        scale, layer = self._parts
        parts: Any = layer.parametrizations
        rounding = parts[self._weight]
        steps = scale().detach() * rounding[0].scales(rounding.original)
        limits = torch.iinfo(torch.int32)
        integers = torch.round(bias.detach().double() / steps.double()).clamp(limits.min, limits.max)
        return _replaced(bias, (integers.float() * steps).reshape(bias.shape))


def learned_quantization(
    graph: fx.GraphModule, model: Path, quantized: Quantized, inputs: Sequence[Tensor]
) -> fx.GraphModule:
    """Return a copy of a graph to train, which rounds as an int8 model does and whose scales are parameters.

    Args:
        graph: see ``fake_quantized``.
        model: the float model.
        quantized: the int8 model made from it; its scales are the first ones.
        inputs: at least two samples, in the graph's order.

    Raises:
        UnmatchedError: the graph lacks a value or weight that the model rounds, or reads the weight float in the same
            place; the message names it.
    """
    found = roundings(graph, model, quantized, inputs)
    made = copy_weights(graph)
    if found.by_operator:
        traced = by_operator(made, inputs)
        made = fx.GraphModule(traced, traced.graph)  # without the ``train`` of torch.export, which raises
    floats, integers = onnx.load(model), onnx.load(quantized.path)
    weights = list(_weights(floats, integers))
    own, called = _read(made)
    places = [_place(weight, own) for weight in weights]
    _check_float_readers(floats, integers, {place.weight for place in places}, own, called)
    scales = _learned_scales(floats, integers, quantized)
    signed = quantized.form.symmetric
    insert(
        made,
        found.places,
        lambda tensor: LearnedFakeQuantize(tensor, scales[tensor], quantized.scales[tensor][1], signed),
    )
    for weight, place in zip(weights, places, strict=True):
        keep_lookups(made, place.weight)
        layer, name = parent_of(made, place.weight)
        if not parametrize.is_parametrized(layer, name):
            rounding = RoundedWeight(
                weight.values.shape, transposed=place.transposed, axis=weight.axis, reduced=quantized.form.reduced
            )
            parametrize.register_parametrization(layer, name, rounding)
    count = Counter(place.bias for place in places)
    for weight, place in zip(weights, places, strict=True):
        if place.bias and weight.input in scales and quantized.form.integer_bias:
            layer, name = parent_of(made, place.weight)
            parts: Any = layer.parametrizations
            parts[name][0].with_bias(scales[weight.input], *parent_of(made, place.bias))
        # a layer that is called on values of several scales has a bias for each: none of them is that of the layer
        if place.bias and weight.input in scales and count[place.bias] == 1:
            rounded = RoundedBias(scales[weight.input], *parent_of(made, place.weight))
            layer, name = parent_of(made, place.bias)
            parametrize.register_parametrization(layer, name, rounded)
    return made


def settled(trained: fx.GraphModule, graph: fx.GraphModule, floats: Mapping[str, str]) -> LearnedScales:
    """Load the weights of a trained graph into the graph that it was made from, and return its scales.

    Args:
        trained: from ``learned_quantization``; it is used up.
        graph: gets the float weights, which the file rounds.
        floats: see ``LearnedScales``.
    """
    parts = [part for part in trained.modules() if isinstance(part, LearnedFakeQuantize)]
    scales = {name: (float(part.scale.detach()), int(part.zero)) for part in parts for name in part.learned.tensors}
    for layer in list(trained.modules()):
        for name in list(getattr(layer, "parametrizations", ())):
            parametrize.remove_parametrizations(layer, name, leave_parametrized=False)
    known, values = graph.state_dict(), trained.state_dict()
    graph.load_state_dict({name: value for name, value in values.items() if name in known}, strict=False)
    return LearnedScales(scales, dict(floats), digest_of(graph))


class _Weight(NamedTuple):
    """A weight that the int8 model rounds, and the bias beside it, by one node that reads them."""

    module: str
    name: str
    values: Tensor
    axis: int
    input: str
    bias: tuple[str, Tensor] | None


class _Place(NamedTuple):
    """Where a graph has a weight and its bias: names of parameters."""

    weight: str
    transposed: bool
    bias: str | None


def _weights(floats: onnx.ModelProto, integers: onnx.ModelProto) -> Iterator[_Weight]:
    """Yield every weight that is rounded, once for each node that reads it."""
    before = {weight.name: weight for weight in floats.graph.initializer}
    stored = {weight.name for weight in integers.graph.initializer}
    makers = {node.output[0]: node for node in integers.graph.node if node.op_type == "DequantizeLinear"}
    readers = {node.name: node for node in integers.graph.node}
    for node in floats.graph.node:
        reader = readers.get(node.name)
        if reader is None or len(reader.input) < 2 or node.input[1] not in before or reader.input[1] not in makers:
            continue
        axis = next((a.i for a in makers[reader.input[1]].attribute if a.name == "axis"), 0)
        values = torch.from_numpy(numpy_helper.to_array(before[node.input[1]]).copy())
        bias = None
        if len(node.input) > 2 and node.input[2] in before:
            source = makers.get(reader.input[2])
            if source is not None and source.input[0] in stored:
                bias = node.input[2], torch.from_numpy(numpy_helper.to_array(before[node.input[2]]).copy())
        yield _Weight(module_of(node), node.input[1], values, axis, node.input[0], bias)


def _place(weight: _Weight, own: Mapping[str, Tensor]) -> _Place:
    """Find a weight and its bias among the parameters of a graph.

    Raises:
        UnmatchedError: no parameter has the values, or several have and none has the name.
    """
    name = _named(weight.name, weight.values, f"{weight.module}.weight", own)
    same = own[name].shape == weight.values.shape and torch.equal(own[name], weight.values)
    transposed = not same and own[name].dim() == 2 and own[name].T.shape == weight.values.shape
    bias = None if weight.bias is None else _named(*weight.bias, f"{weight.module}.bias", own)
    return _Place(name, transposed and torch.equal(own[name].T, weight.values), bias)


def _named(name: str, values: Tensor, likely: str, own: Mapping[str, Tensor]) -> str:
    fitting = equal_tensors(own, values)
    inside = [place for place in fitting if place.startswith(f"{likely.rpartition('.')[0]}.")]
    # Equal weights are stored once, under the name of one of them: a module's own weight goes before the name.
    found = next((each for each in ([p for p in fitting if p == likely], inside, fitting) if each), [])
    found = [place for place in found if place == name] or found
    if not found or len({id(own[place]) for place in found}) > 1:
        why = "is no parameter" if not found else "may be one of several parameters"
        raise UnmatchedError(f"the weight '{name}' of the int8 model {why} of the PyTorch graph")
    return found[0]


def _read(graph: fx.GraphModule) -> tuple[dict[str, Tensor], set[str]]:
    """Return the tensors that a graph reads, by name, and the names of those that modules which it calls read."""
    called = {f"{node.target}." for node in graph.graph.nodes if node.op == "call_module"}
    named = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr" and node.users}
    tensors = tensors_of(graph)
    inside = {name for name in tensors if any(name.startswith(module) for module in called)}
    return {name: value for name, value in tensors.items() if name in named or name in inside}, inside


def _check_float_readers(
    floats: onnx.ModelProto, integers: onnx.ModelProto, places: set[str], own: Mapping[str, Tensor], called: set[str]
) -> None:
    """Require that no operator of the int8 model reads a weight float at a place where the graph is to round it.

    Raises:
        UnmatchedError: one does; the message names the weight.
    """
    for use in weight_uses(floats, integers):
        if use.rounded is not None or not places:
            continue
        fitting = equal_tensors(own, use.values)
        found = use.among(fitting)
        # rows of a table are read under a name of their own, unless a module reads them
        found = [place for place in found if place in called] if use.operator == "Gather" else found or fitting
        if both := places & set(found):
            raise UnmatchedError(f"the weight '{min(both)}' is read float in '{use.module}' and rounded elsewhere")


def _learned_scales(
    floats: onnx.ModelProto, integers: onnx.ModelProto, quantized: Quantized
) -> dict[str, LearnedScale]:
    """Return the scale of each tensor: one for all that share it in the file, or whose rounding must change nothing."""
    owners = {name: name for name in quantized.scales}
    stored = {
        node.input[0].removesuffix("_QuantizeLinear_Input"): node.input[1]
        for node in integers.graph.node
        if node.op_type == "QuantizeLinear"
    }
    first: dict[str, str] = {}
    for name in quantized.scales:
        owners[name] = first.setdefault(stored[name], name)
    for name, others in equal_roundings(floats, quantized.scales).items():
        group = {owners[name], *(owners[other] for other in others)}
        owners = {each: min(group) if owner in group else owner for each, owner in owners.items()}
    most: dict[str, float] = {}
    for name, bound in _clip_bounds(floats, quantized).items():
        most[owners[name]] = min(bound, most.get(owners[name], math.inf))
    made = {}
    for owner in set(owners.values()):
        scale = quantized.scales[owner][0]
        sharing = [name for name in owners if owners[name] == owner]
        made[owner] = LearnedScale(scale, max(scale, most.get(owner, math.inf)), sharing)
    return {name: made[owner] for name, owner in owners.items()}


def _clip_bounds(floats: onnx.ModelProto, quantized: Quantized) -> dict[str, float]:
    """Return the largest scale of each clipped tensor: onnxruntime drops the Clip, so the integers have to clip."""
    stored = {weight.name: weight for weight in floats.graph.initializer}
    limit = 127 if quantized.form.symmetric else 255
    found = {}
    for node in floats.graph.node:
        if node.op_type != "Clip" or node.output[0] not in quantized.scales:
            continue
        scale, zero = quantized.scales[node.output[0]]
        given = [stored.get(name) for name in (*node.input[1:], "", "")[:2]]
        low, high = (None if one is None else float(numpy_helper.to_array(one)) for one in given)
        bounds = [math.inf if high is None or zero == limit else high / (limit - zero)]
        bounds += [-low / zero] if low is not None and zero > 0 else []
        found[node.output[0]] = max(scale, min(bounds))
    return found
