"""Seconds of each layer inside a whole model: onnxruntime's profile, brought back to the names of the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from tdcompile.backend.runtime import node_seconds
from tdcompile.target import Target


def layer_seconds(
    model: Path, layers: Iterable[str], inputs: Sequence[Tensor], target: Target, runs: int = 7
) -> dict[str, float]:
    """Median seconds of the kernels of each layer in one run; 0.0 where no kernel is known to be its.

    Args:
        model: written by ``export_onnx``, which names nodes ``<module>/<operator>``.
        layers: module names; a layer that became ``name.0``, ``name.1``, ... is counted under ``name``.
    """
    seconds = dict.fromkeys(layers, 0.0)
    for kernel, value in node_seconds(model, inputs, target, runs=runs).items():
        layer = _layer_of(kernel, seconds)
        if layer is not None:
            seconds[layer] += value
    return seconds


def _layer_of(node: str, layers: Mapping[str, float]) -> str | None:
    """The layer whose module, or a part of it, a node's name begins with."""
    parts = node.rpartition("/")[0].split(".")
    return next((name for i in range(len(parts), 0, -1) if (name := ".".join(parts[:i])) in layers), None)
