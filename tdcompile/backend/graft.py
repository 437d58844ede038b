"""Replace layers of an ONNX model by chains of small layers with random weights, without an export."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from tdcompile.backend.export import unique_node_names
from tdcompile.backend.onnx_nodes import layer_node, noise_weight, pads
from tdcompile.ir.layer import Layer

_KINDS = {"conv": ("Conv",), "linear": ("Gemm", "MatMul")}


@dataclass(frozen=True)
class Graft:
    """Replacement of one layer.

    Attributes:
        layer: the layer to replace.
        calls: how often the network calls it.
        chain: the layers that replace it, in order.
    """

    layer: Layer
    calls: int
    chain: tuple[Layer, ...]


def graft_layers(model: Path, grafts: Mapping[str, Graft], path: Path) -> bool:
    """Write the model with each layer's nodes replaced by its chain; return False and write nothing if impossible.

    It is impossible if the weights are external data, or if a node cannot be identified as its layer by name and
    padding: a node of its own pads its input by reflection, or onnxsim merged it with another node. Zeros around the
    input that onnxsim merged into a convolution go to the first layer of the chain, as in an export.

    Args:
        model: written by ``export_onnx``, which names nodes ``<module>/<operator>``.
        grafts: replacements by module name.
        path: the file to write.
    """
    proto = onnx.load(model, load_external_data=False)
    stored = {weight.name: weight for weight in proto.graph.initializer}
    if any(weight.external_data for weight in stored.values()):
        return False
    found: dict[str, list[onnx.NodeProto]] = {name: [] for name in grafts}
    for node in proto.graph.node:
        name = node.name.rpartition("/")[0]
        if name in found and _is_layer(node, grafts[name].layer, stored):
            found[name].append(node)
    if any(len(nodes) != grafts[name].calls for name, nodes in found.items()):
        return False
    names = {node.name: name for name, nodes in found.items() for node in nodes}
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        if node.name in names:
            nodes += _chain(node, names[node.name], grafts[names[node.name]], stored)
        else:
            nodes.append(node)
    used = {value for node in nodes for value in node.input}
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(nodes)
    unique_node_names(proto.graph)
    proto.graph.initializer.extend(weight for name, weight in stored.items() if name in used)
    path.write_bytes(proto.SerializeToString())
    return True


def _is_layer(node: onnx.NodeProto, layer: Layer, stored: Mapping[str, onnx.TensorProto]) -> bool:
    """Return whether the node computes the layer, padding included; it may pad its input by more zeros."""
    if node.op_type not in _KINDS[layer.kind] or node.input[1] not in stored or layer.padding_mode != "zeros":
        return False
    if layer.kind == "linear":
        return True
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    automatic = given.get("auto_pad", b"NOTSET") != b"NOTSET"
    return not automatic and all(min(pair) >= 0 for pair in _more_padding(node, layer))


def _more_padding(node: onnx.NodeProto, layer: Layer) -> list[tuple[int, int]]:
    """Return how many more zeros the node of a convolution pads than the layer, before and after each spatial axis."""
    given = next((list(a.ints) for a in node.attribute if a.name == "pads"), [0] * (2 * len(layer.kernel)))
    more = [own - known for own, known in zip(given, pads(layer), strict=True)]
    return list(zip(more[: len(layer.kernel)], more[len(layer.kernel) :], strict=True))


def _padded(chain: tuple[Layer, ...], more: Sequence[tuple[int, int]]) -> tuple[Layer, ...]:
    """Return the chain, whose first layer pads its input by so many more zeros."""
    first, *rest = chain
    padding = [(a + b, c + d) for (a, c), (b, d) in zip(first.padding, more, strict=True)]
    return (replace(first, padding=tuple(padding)), *rest)


def _chain(node: onnx.NodeProto, name: str, graft: Graft, stored: dict[str, onnx.TensorProto]) -> list[onnx.NodeProto]:
    """Return the chain's nodes, from the node's input to its output, and add their weights to ``stored``.

    The last node takes the bias of the node that is replaced.
    """
    kind = numpy_helper.to_array(stored[node.input[1]]).dtype
    layer, chain = graft.layer, graft.chain
    chain = _padded(chain, _more_padding(node, layer)) if layer.kind == "conv" else chain
    made, source = [], node.input[0]
    for i, part in enumerate(chain):
        last = i == len(chain) - 1
        weight, out = f"{name}.{i}.weight", node.output[0] if last else f"{node.output[0]}.{i}"
        stored[weight] = numpy_helper.from_array(_weight(part, weight).astype(kind), weight)
        inputs = [source, weight, *(node.input[2:] if last else ())]
        made.append(layer_node(part, inputs, out, f"{name}.{i}/{node.name.rpartition('/')[2]}"))
        source = out
    return made


def _weight(part: Layer, name: str) -> NDArray[np.float32]:
    """Return noise divided by the root of its fan-in, which neither amplifies nor damps a signal."""
    return noise_weight(part, name) / np.float32(math.sqrt(math.prod(part.weight_shape[1:])))
