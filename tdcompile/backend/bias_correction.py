"""Bias correction: rounding a weight moves the mean of its layer's output, and the bias takes the shift off again.

Nagel et al. 2019 (arXiv 1906.04721), section 4.2. A layer that computes W~ x + b in place of W x + b shifts the mean of
its output by (W~ - W) E[x]. Samples give E[x].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tdcompile.backend.onnx_nodes import make_model
from tdcompile.backend.quantize import float_inputs, module_of, save_model, stored_values
from tdcompile.backend.session import infer, open_session
from tdcompile.ir.onnx_format import WEIGHTED
from tdcompile.ir.target import Target

Array = NDArray[Any]
Means = Mapping[str, Array]  # mean over axis 0 of each value that a weighted operator reads, ``(1, ...)``, by its name

_AXES_AS_INPUT = 18  # the opset from which ReduceMean takes its axes as an input


@dataclass(frozen=True)
class _Rounded:
    """A convolution or product whose weight was rounded.

    Attributes:
        node: the operator in the float model.
        error: the rounded weight less the weight.
        weight: the rounded weight.
        bias: name of the stored bias, read by nothing else; None without one.
        ends: name of the value behind the bias.
        axis: of the output channels in the operator's result.
    """

    node: onnx.NodeProto
    error: Array
    weight: Array
    bias: str | None
    ends: str
    axis: int


def input_means(model: Path, batches: Iterable[Sequence[Array]]) -> Means:
    """Return the mean over samples of every value that a convolution or product with a stored weight reads.

    Args:
        model: the float model.
        batches: inputs in the graph's order, one tuple for each run; read one at a time.
    """
    proto = onnx.load(model)
    stored = {weight.name for weight in proto.graph.initializer}
    axes = _axes_of(onnx.shape_inference.infer_shapes(proto))
    read = [n.input[0] for n in proto.graph.node if n.op_type in WEIGHTED and len(n.input) > 1 and n.input[1] in stored]
    names = [name for name in dict.fromkeys(read) if axes.get(name, 0) > 1]
    if not names:
        return {}
    wanted = [f"mean_of/{name}" for name in names]
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    given = float_inputs(proto)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([0]), "mean_of"))
    for name, mean in zip(names, wanted, strict=True):
        node = helper.make_node("ReduceMean", [name, "mean_of"], [mean], name=mean, keepdims=1)
        if opset < _AXES_AS_INPUT:
            node.input.pop()
            node.attribute.append(helper.make_attribute("axes", [0]))
        proto.graph.node.append(node)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=mean) for mean in wanted)
    session = open_session(proto.SerializeToString(), Target())
    sums: dict[str, Array] = {}
    counts = dict.fromkeys(names, 0)
    for batch in batches:
        found = session.run(wanted, dict(zip(given, batch, strict=True)))
        for name, value in zip(names, found, strict=True):
            if name not in sums or sums[name].shape == value.shape:  # samples of another size have other places
                sums[name] = sums.get(name, 0.0) + value.astype(np.float64) * len(batch[0])
                counts[name] += len(batch[0])
    return {name: (total / counts[name]).astype(np.float32) for name, total in sums.items()}


def correct_biases(path: Path, model: Path, means: Means) -> list[str]:
    """Take the mean shift of every output channel off the biases of an int8 model, and return their names.

    A bias in int32 changes by a whole number of its steps. If a layer without a bias is read by another layer, as the
    first of two factors, the other layer's bias takes both shifts off. Layers without a bias anywhere keep their shift.

    Args:
        path: the int8 model; the file is written again.
        model: the float model that it was made from.
        means: see ``input_means``.
    """
    rounded, floats = onnx.load(path), onnx.load(model)
    parts = _parts(floats, rounded, means)
    shifts = _shifts(parts, means, floats)
    for name, shift in shifts.items():
        _take_off(rounded, name, shift)
    if shifts:
        save_model(rounded, path)
    return list(shifts)


def _axes_of(proto: onnx.ModelProto) -> dict[str, int]:
    """Return the number of axes of each value of known shape."""
    values = (*proto.graph.input, *proto.graph.value_info, *proto.graph.output)
    return {v.name: len(v.type.tensor_type.shape.dim) for v in values if v.type.tensor_type.HasField("shape")}


def _parts(floats: onnx.ModelProto, rounded: onnx.ModelProto, means: Means) -> list[_Rounded]:
    """Return the operators whose weight was rounded and whose mean input is known, in the order of the graph."""
    weights = _weights_read(rounded)
    stored = {weight.name: weight for weight in floats.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in floats.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in floats.graph.output}
    found = []
    for node in floats.graph.node:
        if node.op_type not in WEIGHTED or node.input[0] not in means or node.name not in weights:
            continue
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if given.get("transA", 0) or given.get("beta", 1.0) != 1.0:
            continue
        bias, ends = (node.input[2] if len(node.input) > 2 else ""), node.output[0]
        after = readers.get(ends, [])
        if node.op_type == "MatMul" and len(after) == 1 and ends not in outputs and _adds_bias(after[0], node):
            bias = next((name for name in after[0].input if name in stored and len(stored[name].dims) == 1), "")
            ends = after[0].output[0] if bias else ends
        weight = weights[node.name]
        error = weight - numpy_helper.to_array(stored[node.input[1]])
        axis = -1 if node.op_type == "MatMul" else 1
        own = bias if bias in stored and len(readers[bias]) == 1 else None
        found.append(_Rounded(node, error, weight, own, ends, axis))
    return found


def _weights_read(rounded: onnx.ModelProto) -> dict[str, Array]:
    """Return the rounded weight of each convolution or product of an int8 model, by the operator's name."""
    stored = {weight.name for weight in rounded.graph.initializer}
    values = {name: value for name, value in stored_values(rounded).items() if name not in stored}
    nodes = (node for node in rounded.graph.node if node.op_type in WEIGHTED)
    return {node.name: values[node.input[1]] for node in nodes if node.input[1] in values}


def _adds_bias(node: onnx.NodeProto, product: onnx.NodeProto) -> bool:
    """Return whether a node may add the bias of a linear layer: other constants are no parameters of the layer."""
    return node.op_type == "Add" and module_of(node) == module_of(product)


def _shifts(parts: Sequence[_Rounded], means: Means, floats: onnx.ModelProto) -> dict[str, Array]:
    """Return for each bias the mean shift of the channels behind it.

    onnxruntime computes the shifts at once: each operator runs on its mean input with the error of its weight, and on
    the shift of its input with the rounded weight.
    """
    nodes: list[onnx.NodeProto] = []
    stored: list[TensorProto] = []
    carried: dict[str, str] = {}  # values that are shifted because no bias is there to correct them
    for place, part in enumerate(parts):
        given, shift = part.node.input[0], f"shift_{place}"
        stored.append(numpy_helper.from_array(part.error, f"error_{place}"))
        nodes.append(_copied(part.node, [given, f"error_{place}"], shift))
        if given in carried:
            stored.append(numpy_helper.from_array(part.weight, f"weight_{place}"))
            nodes.append(_copied(part.node, [carried[given], f"weight_{place}"], f"inner_{place}"))
            nodes.append(helper.make_node("Add", [shift, f"inner_{place}"], [f"sum_{place}"], name=f"sum_{place}"))
            shift = f"sum_{place}"
        if part.bias is None:
            carried[part.ends] = shift
        else:
            nodes.append(helper.make_node("Identity", [shift], [f"found_{place}"], name=f"found_{place}"))
    corrected = {place: part for place, part in enumerate(parts) if part.bias is not None}
    if not corrected:
        return {}
    read = list(dict.fromkeys(part.node.input[0] for part in parts))
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, means[name].shape) for name in read]
    outputs = [helper.make_tensor_value_info(f"found_{place}", TensorProto.FLOAT, None) for place in corrected]
    opset = next(entry.version for entry in floats.opset_import if entry.domain in ("", "ai.onnx"))
    made = make_model(helper.make_graph(nodes, "shifts", inputs, outputs, stored), opset, floats.ir_version)
    session = open_session(made.SerializeToString(), Target(), optimised=False)
    values = infer(session, [torch.from_numpy(means[name]) for name in read])
    return {
        str(part.bias): np.moveaxis(value, part.axis, 0).reshape(value.shape[part.axis], -1).mean(1, dtype=np.float64)
        for part, value in zip(corrected.values(), values, strict=True)
    }


def _copied(node: onnx.NodeProto, inputs: Sequence[str], output: str) -> onnx.NodeProto:
    """Return the operator without its bias, on other inputs."""
    made = onnx.NodeProto()
    made.CopyFrom(node)
    made.name = output
    del made.input[:], made.output[:]
    made.input.extend(inputs)
    made.output.append(output)
    return made


def _take_off(proto: onnx.ModelProto, bias: str, shift: Array) -> None:
    """Subtract a shift from a bias of an int8 model, in whole steps if it is stored in int32."""
    stored = {weight.name: weight for weight in proto.graph.initializer}
    if bias in stored:
        value = numpy_helper.to_array(stored[bias])
        if value.size == shift.size:
            made = (value.reshape(-1) - shift).astype(value.dtype).reshape(value.shape)
            stored[bias].CopyFrom(numpy_helper.from_array(made, bias))
        return
    node = next(n for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == f"{bias}_quantized")
    steps, scale = (numpy_helper.to_array(stored[name]) for name in node.input[:2])
    limits = np.iinfo(steps.dtype)
    made = np.clip(steps - np.rint(shift / scale.astype(np.float64)), limits.min, limits.max).astype(steps.dtype)
    stored[node.input[0]].CopyFrom(numpy_helper.from_array(made, node.input[0]))
