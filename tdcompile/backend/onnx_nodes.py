"""Small ONNX graphs made by hand: the node of one layer, weights of random noise, and the model that probes a provider.

Exporting a network takes seconds; a layer with random weights takes as long to run and is made at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from tdcompile.ir.layer import Layer

OPSET, IR_VERSION = 18, 10  # what the exporter writes, and every supported onnxruntime reads
_NOISE = 8191  # numbers; a prime, so that rows of a power-of-two width differ


def layer_node(layer: Layer, inputs: Sequence[str], output: str, name: str) -> onnx.NodeProto:
    """Return the node that computes a layer.

    Args:
        layer: a linear layer becomes Gemm if it has a bias, which takes 2-D inputs only, and MatMul otherwise.
        inputs: names of the input, the weight in the shape of ``stored_shape``, and the bias if there is one.
        output: name of the value that the node writes.
        name: of the node.
    """
    if layer.kind == "linear":
        return helper.make_node("Gemm" if len(inputs) > 2 else "MatMul", inputs, [output], name=name)
    return helper.make_node(
        "ConvTranspose" if layer.transposed else "Conv",
        inputs,
        [output],
        name=name,
        kernel_shape=layer.kernel,
        strides=layer.stride,
        dilations=layer.dilation,
        pads=pads(layer),
        group=layer.groups,
        output_padding=layer.output_padding or None,  # an attribute that is None is left out
    )


def pads(layer: Layer) -> list[int]:
    """Return the ``pads`` attribute of a convolution: the starts of all axes, then their ends."""
    return [before for before, _ in layer.padding] + [after for _, after in layer.padding]


def stored_shape(layer: Layer) -> tuple[int, ...]:
    """Return the shape in which ONNX stores a layer's weight: ``(in, out)`` for Gemm and MatMul."""
    if layer.kind == "linear":
        return layer.weight_shape[::-1]
    if layer.transposed:
        return (layer.in_channels, layer.out_channels // layer.groups, *layer.kernel)
    return layer.weight_shape


def noise_weight(layer: Layer, name: str) -> NDArray[np.float32]:
    """Return a weight of normal noise in the layer's ``stored_shape``, another one for each name.

    A short piece of noise is repeated: run time depends on values only if they are zero or denormal, or if weights are
    equal. onnxruntime stores equal weights once, and what then fits into a cache runs faster: a MiniLM whose factors
    had one noise for each shape took 0.49 of dense, with any other weights 0.58.

    Args:
        layer: gives the shape.
        name: of the weight in its model.
    """
    piece = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(_NOISE, dtype=np.float32)
    return np.resize(piece, stored_shape(layer))


def probe_model(opset: int = OPSET, ir: int = IR_VERSION) -> bytes:
    """Return the smallest model, one ReLU: a session on it proves that a provider loads."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", values[:1], values[1:])
    model: bytes = make_model(graph, opset, ir).SerializeToString()
    return model


def make_model(graph: onnx.GraphProto, opset: int = OPSET, ir: int = IR_VERSION) -> onnx.ModelProto:
    """Return a model around a graph."""
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
