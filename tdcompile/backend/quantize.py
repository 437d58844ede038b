"""Quantise an ONNX model to int8 by onnxruntime.quantization, in the form that a target's kernels take."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from tdcompile.backend.quantized_form import QuantizedForm
from tdcompile.backend.weight_scales import weight_overrides
from tdcompile.errors import InputError
from tdcompile.ir.onnx_format import WEIGHTED, check_int8_opset
from tdcompile.support.quiet import captured_output

Ranges = Mapping[str, tuple[float, float]]  # least and largest value of each activation, by its name
Overrides = Mapping[str, Sequence[Mapping[str, Any]]]  # ``TensorQuantOverrides`` of onnxruntime.quantization
Scales = Mapping[str, tuple[float, int]]  # scale and zero point of each activation, by its name

# Operators with an integer kernel that keep a region of integers together. They join a region only if all their inputs
# come from one: between float operators they would only add conversions.
_CARRIED = ("Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Add", "Concat", "Mul", "Sigmoid")
_NEVER_NEGATIVE = ("Relu", "Sigmoid", "Softmax")
_MOVED = ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")  # they move values and round none
# Operators that give no negative value if they read none: those that copy all values of their first input, and others.
_COPIED = (*_MOVED, "DepthToSpace", "SpaceToDepth", "Expand", "Tile")
_SIGN_KEPT = ("MaxPool", "AveragePool", "GlobalAveragePool", "Add", "Concat", "Mul")
# Layers without an integer kernel, by the operator that tells them, with the reason.
_NO_KERNEL = {
    "ConvTranspose": "onnxruntime has no integer kernel for transposed convolutions",
    **dict.fromkeys(("LayerNormalization", "GroupNormalization", "InstanceNormalization"), "normalisations stay float"),
    **dict.fromkeys(("Gelu", "Erf"), "onnxruntime has no integer kernel for GELU"),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), "recurrent layers stay float"),
}
_LEAST = "tdcompile_least_float"  # a stored value
_APART = "_float"  # ends the name of a weight's copy for operators that stay float
_SPATIAL = 4  # axes of an image batch


@dataclass(frozen=True)
class Quantized:
    """A quantised model that was written.

    Attributes:
        path: the file, with QuantizeLinear and DequantizeLinear nodes (QDQ).
        bytes: size of the file.
        form: the target family that it is made for.
        scales: scale and zero point of each quantised activation, by its name in the float model.
        floats: the module of each convolution, matrix product and linear layer that stays float, with the reason.
    """

    path: Path
    bytes: int
    form: QuantizedForm
    scales: Scales
    floats: Mapping[str, str] = field(default_factory=dict)


def write_quantized(
    model: Path,
    path: Path,
    ranges: Ranges | None,
    form: QuantizedForm,
    *,
    keep: Collection[str] = (),
    overrides: Overrides | None = None,
) -> Quantized:
    """Write a model in int8: weights per output channel, activations per tensor.

    Args:
        model: written by ``export_onnx``, which names nodes ``<module>/<operator>``.
        path: the file to write.
        ranges: see ``activation_ranges``; None takes ranges that are enough to measure latency.
        form: the target family.
        keep: modules that stay float, with all modules in them.
        overrides: scales and zero points of one's own, by tensor; see ``exact_overrides``.

    Raises:
        InputError: the model is quantised already, its opset is too low, its weights exceed one file, or a range is
            not finite.
    """
    made, floats = quantized_model(_readable(model), ranges, form, keep=keep, overrides=overrides)
    save_model(made, path)
    return Quantized(path, path.stat().st_size, form, _scales(made), floats)


def save_model(proto: onnx.ModelProto, path: Path) -> None:
    """Write a model in one file, atomically; its folder is created if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        draft.write_bytes(proto.SerializeToString(deterministic=True))
        os.replace(draft, path)


def quantized_model(
    proto: onnx.ModelProto,
    ranges: Ranges | None,
    form: QuantizedForm,
    *,
    keep: Collection[str] = (),
    overrides: Overrides | None = None,
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Return a model in int8, and the modules that stay float with the reason; see ``write_quantized``."""
    proto = averages_pooled(proto)
    nodes, floats = _chosen(proto, keep)
    if not nodes:
        return proto, floats
    _separate_floats(proto, nodes)
    quantizer = QDQQuantizer(
        proto,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8 if form.symmetric else QuantType.QUInt8,
        tensors_range=_checked(ranges, proto),
        nodes_to_quantize=nodes,
        nodes_to_exclude=[],
        op_types_to_quantize=[*WEIGHTED, *_CARRIED, *_MOVED],
        extra_options=form.options({**_own_scales(proto, nodes, form, ranges), **(overrides or {})}),
    )
    with captured_output():
        quantizer.quantize_model()
    _keep_floats(quantizer.model.model)
    return quantizer.model.model, floats


def exact_overrides(model: Path, scales: Scales, form: QuantizedForm) -> Overrides:
    """Return overrides that give activations these scales, and weights those of ``channel_scales``.

    Args:
        model: the float model.
        scales: of the activations.
        form: the target family.
    """
    proto, kind = onnx.load(model), np.int8 if form.symmetric else np.uint8
    nodes = [node.name for node in proto.graph.node if node.op_type in WEIGHTED]
    steps = {name: scale for name, (scale, _) in scales.items()} if form.integer_bias else {}
    activations = {
        name: [{"scale": np.array(scale, np.float32), "zero_point": np.array(zero, kind)}]
        for name, (scale, zero) in scales.items()
    }
    return {**weight_overrides(proto, nodes, reduced=form.reduced, steps=steps), **activations}


def _own_scales(
    proto: onnx.ModelProto, nodes: Collection[str], form: QuantizedForm, ranges: Ranges | None
) -> Overrides:
    """Return the scales of weights that onnxruntime would not choose itself: no pair of products and no bias saturates.

    onnxruntime may give an activation the scale of a wider one. Its steps are larger, so a bias still fits its integer.
    Without ranges only latency counts, which no scale changes.
    """
    if ranges is None:
        return {}
    steps = {name: form.step(low, high) for name, (low, high) in ranges.items()} if form.integer_bias else {}
    plain = weight_overrides(proto, nodes, reduced=False, steps={})
    bound = weight_overrides(proto, nodes, reduced=form.reduced, steps=steps)
    return {name: bound[name] for name in bound if bound[name] != plain[name]}


def activation_ranges(model: Path, batches: Iterable[Sequence[NDArray[Any]]]) -> Ranges:
    """Return the least and largest value of every activation over the inputs (MinMax).

    Args:
        model: the float model.
        batches: inputs in the graph's order, one tuple for each run; read one at a time.

    Raises:
        InputError: there is no input, or an activation is NaN or infinite; the message names the node.
    """
    proto = averages_pooled(_readable(model))
    names = float_inputs(proto)
    with tempfile.TemporaryDirectory(prefix="tdcompile-") as folder, captured_output():
        given = Path(folder) / "model.onnx"
        given.write_bytes(proto.SerializeToString())
        calibrator = create_calibrator(
            given,
            op_types_to_calibrate=[*WEIGHTED, *_CARRIED, *_MOVED],
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
        )
        given_batches = iter(batches)
        first = next(given_batches, None)
        if first is None:
            raise InputError("int8 needs calibration samples: there are none")
        calibrator.collect_data(_Reader(names, itertools.chain([first], given_batches)))
        data = calibrator.compute_data()
    found: dict[str, tuple[float, float]] = {}
    for name in data:
        low, high = (float(np.asarray(value).reshape(-1)[0]) for value in data[name].range_value)
        found[name] = (low, high)
    for name, (low, high) in found.items():
        if not (np.isfinite(low) and np.isfinite(high)):
            node = next((n.name for n in proto.graph.node if name in n.output), name)
            raise InputError(
                f"int8 needs finite activations: the value of '{node}' is {low:g} to {high:g} on the samples"
            )
    return found


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Give inputs to onnxruntime's calibrator."""

    def __init__(self, names: Sequence[str], batches: Iterable[Sequence[NDArray[Any]]]) -> None:
        self._names, self._batches = names, iter(batches)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """Return the next inputs by name, or None at the end."""
        batch = next(self._batches, None)
        return None if batch is None else dict(zip(self._names, batch, strict=True))


def averages_pooled(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the shapes of its values, and with means over all spatial axes as GlobalAveragePool.

    The exporter writes ``AdaptiveAvgPool2d(1)`` as ReduceMean, which has no integer kernel. Only means that keep their
    axes are rewritten, so that no shape changes.
    """
    made = onnx.shape_inference.infer_shapes(proto)
    stored = {weight.name: weight for weight in made.graph.initializer}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in made.graph.value_info}
    unread: set[str] = set()
    for node in made.graph.node:
        if node.op_type != "ReduceMean" or ranks.get(node.output[0]) != _SPATIAL:
            continue
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        axes = given.get("axes")
        if len(node.input) > 1 and node.input[1] in stored:
            axes = numpy_helper.to_array(stored[node.input[1]]).tolist()
        if given.get("keepdims", 1) and axes is not None and sorted(axis % _SPATIAL for axis in axes) == [2, 3]:
            node.op_type = "GlobalAveragePool"
            unread |= set(node.input[1:])
            del node.input[1:]
            del node.attribute[:]
    unread -= {name for node in made.graph.node for name in node.input}
    for name in unread & stored.keys():
        made.graph.initializer.remove(stored[name])
    return made


def _readable(model: Path) -> onnx.ModelProto:
    """Load a float model that can be quantised.

    Raises:
        InputError: it is quantised already, its opset is too low, or its weights are outside the file.
    """
    proto = onnx.load(model, load_external_data=False)
    if any(node.op_type in ("QuantizeLinear", "QLinearConv", "QLinearMatMul") for node in proto.graph.node):
        raise InputError(f"{model.name} is quantised already: give the float model")
    check_int8_opset(next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")))
    if any(weight.external_data for weight in proto.graph.initializer):
        raise InputError(f"int8 needs a model in one file, and the weights of {model.name} exceed 2 GB")
    return proto


def _chosen(proto: onnx.ModelProto, keep: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """Return the nodes to quantise, and for each weighted or normalising node that stays float the reason, by module.

    Nodes without weights are quantised if all their inputs are integers already.
    """
    stored = {weight.name for weight in proto.graph.initializer}
    weighted = {
        module_of(node)
        for node in proto.graph.node
        if node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1] in stored
    }
    keep = {*keep, *_around(keep, weighted, {node.name for node in proto.graph.node if "/" not in node.name})}
    produced: set[str] = set()  # values that a region of integers gives
    chosen, floats = [], {}
    for node in proto.graph.node:
        module = module_of(node)
        if node.op_type in _NO_KERNEL:
            floats[module] = _NO_KERNEL[node.op_type]
        elif node.op_type in WEIGHTED:
            if _is_kept(module, keep):
                floats[module] = "kept in float"
            elif len(node.input) < 2 or node.input[1] not in stored:  # a product of two activations
                floats[module] = "both factors are activations, whose product stays float"
            else:
                chosen.append(node.name)
                if node.op_type == "Conv":
                    produced |= set(node.output)
        elif node.op_type in (*_CARRIED, *_MOVED) and not _is_kept(module, keep):
            activations = [name for name in node.input[: 1 if node.op_type in (*_MOVED, "Clip") else None] if name]
            if activations and all(name in produced for name in activations):
                chosen.append(node.name)
                produced |= set(node.output)
    return chosen, floats


def _separate_floats(proto: onnx.ModelProto, chosen: Collection[str]) -> None:
    """Give operators that stay float a copy of each weight that they share with one to quantise.

    onnxruntime rounds a weight for all operators that read it. The exporter stores equal weights once.
    """
    stored = {w.name: w for w in proto.graph.initializer if w.data_type == onnx.TensorProto.FLOAT}
    quantised = [node for node in proto.graph.node if node.name in chosen and node.op_type in WEIGHTED]
    shared = {name for node in quantised for name in node.input[1:] if name in stored}
    for node in proto.graph.node:
        for place, name in enumerate(node.input if node.name not in chosen else ()):
            if name in shared:
                node.input[place] = f"{name}{_APART}"
                if node.input[place] not in stored:
                    copied = onnx.TensorProto()
                    copied.CopyFrom(stored[name])
                    copied.name = node.input[place]
                    stored[copied.name] = copied
                    proto.graph.initializer.append(copied)


def _keep_floats(proto: onnx.ModelProto) -> None:
    """Put a Max behind each float layer that reads an integer value, so that onnxruntime leaves it float.

    Between DequantizeLinear and QuantizeLinear onnxruntime quantises float weights per tensor when it loads the
    model: the layer that was kept in float would be rounded more than in int8. It does not look through a Max.
    """
    graph = proto.graph
    stored = {weight.name for weight in graph.initializer if weight.data_type == onnx.TensorProto.FLOAT}
    rounded = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    kept = [
        node
        for node in graph.node
        if node.op_type in (*WEIGHTED, "ConvTranspose") and node.input[0] in rounded and node.input[1] in stored
    ]
    for node in kept:
        name = node.output[0]
        node.output[0] = f"{name}_float"
        least = helper.make_node("Max", [f"{name}_float", _LEAST], [name], name=f"{module_of(node)}/keep_float")
        graph.node.insert(list(graph.node).index(node) + 1, least)
    if kept:
        lowest = np.array(np.finfo(np.float32).min, np.float32)
        graph.initializer.append(numpy_helper.from_array(lowest, _LEAST))


def _around(keep: Collection[str], modules: Collection[str], top: Collection[str]) -> Iterator[str]:
    """Yield, for each kept layer that has no node of its name, the module around it, whose nodes read its weights.

    Args:
        keep: names of layers.
        modules: the modules that nodes with weights are named by.
        top: the names of nodes that belong to no module but the network itself.
    """
    for name in keep:
        if not any(_is_kept(module, [name]) for module in modules):
            parts = name.split(".")
            outer = (".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1))
            found = next((module for module in outer if module in modules), None)
            yield from [found] if found else (module for module in modules if module in top)


def _is_kept(module: str, keep: Collection[str]) -> bool:
    parts = module.split(".")
    return any(".".join(parts[:i]) in keep for i in range(1, len(parts) + 1))


def _checked(ranges: Ranges | None, proto: onnx.ModelProto) -> TensorsData:
    """Return the ranges in onnxruntime's form; those for latency if none are given."""
    if ranges is None:
        ranges = _ranges_for_latency(proto)
    entries = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()
    }
    return TensorsData(CalibrationMethod.MinMax, entries)


def _ranges_for_latency(proto: onnx.ModelProto) -> Ranges:
    """Return 0 to 1 for values that are never negative, and -1 to 1 for all others.

    onnxruntime drops a ReLU whose output has the least integer as its zero point, and then takes an integer kernel for
    the addition before it: with -1 to 1 for all values ResNet-56 takes 7 % more time than with its own ranges. It
    copies integers only where the copy has the range of the original.
    """
    stored = {weight.name: weight for weight in proto.graph.initializer}
    sizes = {
        value.name: [each.dim_value or each.dim_param for each in value.type.tensor_type.shape.dim]
        for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)
    }
    positive: set[str] = set()
    for node in proto.graph.node:
        copied = _copies(node) or (node.op_type == "Slice" and sizes.get(node.input[0]) == sizes.get(node.output[0]))
        read = [name for name in node.input[: 1 if copied else None] if name]
        kept = (copied or node.op_type in _SIGN_KEPT) and all(name in positive for name in read)
        if node.op_type in _NEVER_NEGATIVE or kept or (node.op_type == "Clip" and _clips_below(node, stored)):
            positive |= set(node.output)
    values = [*proto.graph.input, *proto.graph.output]
    names = {value.name for value in values} | {name for node in proto.graph.node for name in node.output}
    return {name: (0.0 if name in positive else -1.0, 1.0) for name in names}


def _copies(node: onnx.NodeProto) -> bool:
    """Return whether the values of a node are those of its first input."""
    if node.op_type == "Resize":
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        return bool(given.get("mode", b"nearest") == b"nearest")
    return node.op_type in _COPIED


def _clips_below(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> bool:
    """Return whether a Clip keeps no negative value."""
    least = node.input[1] if len(node.input) > 1 else ""
    return least in stored and bool((numpy_helper.to_array(stored[least]) >= 0).all())


def _scales(proto: onnx.ModelProto) -> dict[str, tuple[float, int]]:
    """Return scale and zero point of each activation that a QuantizeLinear node rounds."""
    stored = {weight.name: weight for weight in proto.graph.initializer}
    found = {}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in stored:  # TensorRT's form rounds weights too
            scale, zero = (numpy_helper.to_array(stored[name]) for name in node.input[1:3])
            found[node.input[0].removesuffix("_QuantizeLinear_Input")] = (float(scale), int(zero))
    return found


def stored_values(proto: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Return all stored floats of a model by the name under which its operators read them, rounded as it rounds them.

    Two operators may read one weight of a float model under two names in its int8 model, of which one is rounded.
    """
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    found = {w.name: numpy_helper.to_array(w) for w in proto.graph.initializer if w.data_type in floats}
    behind = {node.input[0]: node.output[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    for node, values in _rounded(proto):
        found[node.output[0] if node.op_type == "DequantizeLinear" else behind[node.output[0]]] = values
    return found


def _rounded(proto: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, NDArray[Any]]]:
    """Yield the first node behind every stored tensor that is rounded, and the rounded values.

    TensorRT's form stores weights in floats and rounds them in the graph.
    """
    stored = {weight.name: weight for weight in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type not in ("DequantizeLinear", "QuantizeLinear") or node.input[0] not in stored:
            continue
        values, scale, zero = (numpy_helper.to_array(stored[name]) for name in node.input[:3])
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        shape = [-1 if place == axis and scale.size > 1 else 1 for place in range(values.ndim)]
        scale, zero = scale.astype(np.float32).reshape(shape), zero.astype(np.int64).reshape(shape)
        if node.op_type == "DequantizeLinear":
            steps = (values.astype(np.int64) - zero).astype(np.float32)
        else:  # weights have 8 bits and the zero point 0
            steps = np.rint(values / scale).clip(-128, 127)
        yield node, steps * scale


def described_value(proto: onnx.ModelProto, tensor: str) -> str:
    """Return the module that makes a value of a model, and the value's name: ``'layer1.conv' (conv2d_3)``."""
    names = {tensor, f"{tensor}_QuantizeLinear_Input"}  # the second is the float value in an int8 model
    node = next((node for node in proto.graph.node if names & set(node.output)), None)
    return f"'{tensor if node is None else module_of(node)}' ({tensor})"


def float_inputs(proto: onnx.ModelProto) -> list[str]:
    """Return the names of a model's inputs without its stored weights, in the graph's order."""
    stored = {weight.name for weight in proto.graph.initializer}
    return [value.name for value in proto.graph.input if value.name not in stored]


def module_of(node: onnx.NodeProto) -> str:
    """Return the module that a node of an exported model belongs to; ``export_onnx`` names nodes ``<module>/<op>``."""
    return node.name.rpartition("/")[0] or node.name
