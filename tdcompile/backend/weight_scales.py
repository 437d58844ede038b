"""Scales of weights, for each output channel; smaller ranges where kernels add two products of bytes in 16 bits."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]

# 255 · (|w₁| + |w₂|) ≤ 32,767 for two weights of one sign; two of opposite signs cannot leave 16 bits.
PAIR = 128
_LARGEST = 127
_TINY = np.finfo(np.float32).tiny
_GROWTH = 1.005  # of a scale whose rounded weights still break the bound


def weight_overrides(
    proto: onnx.ModelProto, nodes: Collection[str], *, reduced: bool
) -> dict[str, Sequence[dict[str, Any]]]:
    """Return ``TensorQuantOverrides`` that give weights the scales of ``channel_scales``.

    Args:
        proto: a float model.
        nodes: names of the nodes that are quantised.
        reduced: see ``channel_scales``.
    """
    stored = {weight.name: weight for weight in proto.graph.initializer}
    found: dict[str, Sequence[dict[str, Any]]] = {}
    for node in proto.graph.node:
        if node.name not in nodes or len(node.input) < 2 or node.input[1] not in stored:
            continue
        weight = numpy_helper.to_array(stored[node.input[1]])
        axis = _axis(node, weight.ndim)
        if axis is None:
            continue
        found[node.input[1]] = [
            {"axis": axis, "scale": np.array(scale, np.float32), "zero_point": np.array(0, np.int8)}
            for scale in channel_scales(np.moveaxis(weight, axis, 0), reduced=reduced)
        ]
    return found


def _axis(node: onnx.NodeProto, axes: int) -> int | None:
    """Return the axis of the output channels of a weight; None if the node has no integer kernel."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        return 0 if given.get("transB", 0) else 1
    return axes - 1 if node.op_type == "MatMul" and axes > 1 else None


def channel_scales(rows: Array, *, reduced: bool) -> Array:
    """Return the scale of each row, ``(rows,)``: by its largest weight, or the smallest found that keeps the bound.

    vpmaddubsw adds the products of neighbours along the summed axis. Convolutions sum over channels, then taps, or the
    other way round, by the kernel that onnxruntime takes; a row must keep the bound in both orders.

    Args:
        rows: weights, output channels first, in float32.
        reduced: keep the bound on pairs; rows that break it get a larger scale.
    """
    largest = np.abs(rows).reshape(len(rows), -1).max(1, initial=0.0) / np.float32(_LARGEST)
    scales = np.where(largest >= _TINY, largest, np.float32(1.0)).astype(np.float32)  # a dead channel has any scale
    while reduced:
        worst = _worst_pairs(rows, scales)
        broken = worst > PAIR
        if not broken.any():
            break
        scales[broken] *= np.maximum(worst[broken] / (PAIR + 1), _GROWTH)
    return scales


def _worst_pairs(rows: Array, scales: Array) -> Array:
    """Return the largest |w₁| + |w₂| over neighbours of one sign in each row, in steps of the row's scale."""
    worst = np.zeros(len(rows))
    for flat in _orders(np.rint(rows / scales.reshape(-1, *(1,) * (rows.ndim - 1)))):
        first, second = flat[:, :-1], flat[:, 1:]
        sums = np.where(first * second > 0, np.abs(first + second), 0)
        worst = np.maximum(worst, sums.max(1, initial=0.0))
    return worst


def _orders(rows: Array) -> Iterator[Array]:
    """Yield the weights of each row in both orders of summation: taps last, and channels last."""
    yield rows.reshape(len(rows), -1)
    if rows.ndim > 2:
        yield np.moveaxis(rows, 1, -1).reshape(len(rows), -1)
