"""Read onnxruntime's profile of a whole model as seconds for each node and each layer of the network."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import onnx
from torch import Tensor

from tdcompile.backend.session import WARM_UP, Model, bind_inputs, open_session
from tdcompile.ir.target import Target

_KERNEL_SUFFIX = "_kernel_time"  # of a profile event's name, behind the node's name
_BLOCKED_SUFFIX = "_nchwc"  # of a convolution that onnxruntime moved to its blocked memory layout


def layer_seconds(
    model: Path, layers: Iterable[str], inputs: Sequence[Tensor], target: Target, runs: int = 7
) -> dict[str, float]:
    """Return the median seconds of each layer's kernels in one run; 0.0 if no kernel is known to be the layer's.

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
    """Return the layer whose module, or a submodule of it, prefixes a node's name."""
    parts = node.rpartition("/")[0].split(".")
    return next((name for i in range(len(parts), 0, -1) if (name := ".".join(parts[:i])) in layers), None)


def node_seconds(model: Model, inputs: Sequence[Tensor], target: Target, runs: int = 10) -> dict[str, float]:
    """Return the median kernel seconds of each node, by its name in the model, from onnxruntime's profiler.

    A fused node has the name of the operator that gives its kind (Conv of Conv + Relu). Nodes that onnxruntime adds
    (``ReorderInput``, ``MemcpyToHost``) are summed under their kind. The profiler itself takes time, and on CUDA it
    sees launches only: use it to compare nodes, not for latency.
    """
    proto = onnx.load(model, load_external_data=False) if isinstance(model, Path) else onnx.load_from_string(model)
    warm_up = WARM_UP[target.device]
    with tempfile.TemporaryDirectory(prefix="tdcompile-") as folder:
        session = open_session(model, target, profile=Path(folder) / "profile")
        run = bind_inputs(session, inputs, target)
        for _ in range(warm_up - 1 + runs):  # ``bind_inputs`` has made the first run
            run()
        events = json.loads(Path(session.end_profiling()).read_bytes())
    taken: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL_SUFFIX):
            facts = event["args"]
            key = event["name"].removesuffix(_KERNEL_SUFFIX), facts["op_name"], facts.get("node_index", "")
            taken[key].append(event["dur"] * 1e-6)
    producers = {output: node for node in proto.graph.node for output in node.output}
    names = {node.name for node in proto.graph.node}
    seconds: dict[str, float] = defaultdict(float)
    for (name, kind, _), times in taken.items():
        skip = len(times) * warm_up // (warm_up + runs)
        seconds[_model_node_name(name, kind, names, producers)] += statistics.median(times[skip:])
    return dict(seconds)


def _model_node_name(name: str, kind: str, names: set[str], producers: dict[str, onnx.NodeProto]) -> str:
    """Return the model's name of a node that onnxruntime fused, blocked or added, or its kind if it has none.

    onnxruntime names a fusion ``fused <node>`` or ``<node>/<Fusion>``, and a blocked convolution after its output
    value, which is the output of the activation fused into it.
    """
    name = name.removeprefix("fused ")
    if name not in names and name.endswith(_BLOCKED_SUFFIX):
        behind = [name.removesuffix(_BLOCKED_SUFFIX)]
        while behind:
            node = producers.get(behind.pop(0))
            if node is not None and node.op_type == kind:
                return node.name
            behind += node.input if node is not None else ()
    while name not in names:
        name, slash, _ = name.rpartition("/")
        if not slash:
            return kind
    return name
