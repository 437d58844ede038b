"""Scales of weights, for each output channel; larger ones where kernels or biases would leave their integers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
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
# Largest bias in steps of its 32-bit integer; the other half of the range is for the sum of products and corrections.
_BIAS_STEPS = 2.0**30


def weight_overrides(
    proto: onnx.ModelProto, nodes: Collection[str], *, reduced: bool, steps: Mapping[str, float]
) -> dict[str, Sequence[dict[str, Any]]]:
    """Return ``TensorQuantOverrides`` that give weights the scales of ``channel_scales``.

    Args:
        proto: a float model.
        nodes: names of the nodes that are quantised.
        reduced: see ``channel_scales``.
        steps: scale of each activation whose layers have integer biases, by its name.
    """
    stored = {weight.name: weight for weight in proto.graph.initializer}
    axes: dict[str, int] = {}
    least: dict[str, Array] = {}  # of a weight that several nodes read, the largest of each row
    for node in proto.graph.node:
        if node.name not in nodes or len(node.input) < 2 or node.input[1] not in stored:
            continue
        name = node.input[1]
        axis = _axis(node, len(stored[name].dims))
        if axis is None:
            continue
        axes[name] = axis
        if len(node.input) > 2 and node.input[2] in stored and node.input[0] in steps:
            found = least_scales(numpy_helper.to_array(stored[node.input[2]]), steps[node.input[0]])
            least[name] = np.maximum(least.get(name, found), found)
    overrides: dict[str, Sequence[dict[str, Any]]] = {}
    for name, axis in axes.items():
        rows = np.moveaxis(numpy_helper.to_array(stored[name]), axis, 0)
        overrides[name] = [
            {"axis": axis, "scale": np.array(scale, np.float32), "zero_point": np.array(0, np.int8)}
            for scale in channel_scales(rows, reduced=reduced, least=least.get(name))
        ]
    return overrides


def least_scales(bias: Array, step: float) -> Array:
    """Return the least scale of each row whose bias, in multiples of both scales, fits 32 bits: ``(rows,)``, float32.

    A row of weights far below its bias, as batch norm folds a channel that it has switched off, would else clip it.

    Args:
        bias: float32, ``(rows,)`` or ``(1, rows)``.
        step: scale of the layer's input.
    """
    return (np.abs(bias).reshape(-1) / (np.float64(step) * _BIAS_STEPS)).astype(np.float32)


def _axis(node: onnx.NodeProto, axes: int) -> int | None:
    """Return the axis of the output channels of a weight; None if the node has no integer kernel."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        return 0 if given.get("transB", 0) else 1
    return axes - 1 if node.op_type == "MatMul" and axes > 1 else None


def channel_scales(rows: Array, *, reduced: bool, least: Array | None = None) -> Array:
    """Return the scale of each row, ``(rows,)``: by its largest weight, or the smallest found that keeps the bounds.

    vpmaddubsw adds the products of neighbours along the summed axis. Convolutions sum over channels, then taps, or the
    other way round, by the kernel that onnxruntime takes; a row must keep the bound in both orders.

    Args:
        rows: weights, output channels first, in float32.
        reduced: keep the bound on pairs; rows that break it get a larger scale.
        least: lower bound of each row's scale, see ``least_scales``.
    """
    wanted = np.abs(rows).reshape(len(rows), -1).max(1, initial=0.0) / np.float32(_LARGEST)
    if least is not None:
        wanted = np.maximum(wanted, least)
    scales = np.where(wanted >= _TINY, wanted, np.float32(1.0)).astype(np.float32)  # a row of zeros has any scale
    left = np.arange(len(rows) if reduced else 0)
    while len(left):
        worst = _worst_pairs(rows[left], scales[left])
        broken = worst > PAIR
        left, worst = left[broken], worst[broken]
        scales[left] *= np.maximum(worst / (PAIR + 1), _GROWTH)
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
