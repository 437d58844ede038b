"""Read onnxruntime's profile of a whole model as seconds for each node and each layer of the network."""

from __future__ import annotations

import json
import re
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import Tensor

from tdcompile.backend.clock import Clock, Lap
from tdcompile.backend.session import WARM_UP, Model, bind_inputs, open_session
from tdcompile.core.plan import RankPlan
from tdcompile.ir.diagnostics import Reason, ReasonCode
from tdcompile.ir.target import Target

_RUN = "model_run"  # name of the profile event of a whole run
_KERNEL_SUFFIX = "_kernel_time"  # of a profile event's name, behind the node's name
_BLOCKED_SUFFIX = "_nchwc"  # of a convolution that onnxruntime moved to its blocked memory layout
_NUMBERED = re.compile(r"_token_\d+$")  # of a kernel in another memory layout, behind the node's name
_FEWEST_CLEAN = 3  # undisturbed runs whose median is a kernel's time
_MOST_RUNS = 3  # times the runs asked for, if fewer of them were undisturbed
_LOW = 0.25  # quantile over disturbed runs: another process lengthens a kernel in some runs and never shortens it


LayerTimes = tuple[Mapping[str, float], Mapping[str, float]]  # seconds in the dense graph, and in that of a plan


class Profile(NamedTuple):
    """Kernel seconds of each node, by its name in the model.

    Attributes:
        quiet: whether enough runs were undisturbed by other processes.
    """

    seconds: dict[str, float]
    quiet: bool


def layer_seconds(
    model: Path, layers: Iterable[str], inputs: Sequence[Tensor], target: Target, runs: int = 7
) -> dict[str, float]:
    """Return the seconds of each layer's kernels in one run; 0.0 if no kernel is known to be the layer's.

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


def slower_layers(plan: RankPlan, dense: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, Reason]:
    """Return the replaced layers that were not faster in a graph, with the reason.

    Args:
        plan: the plan of the graph.
        dense: seconds of each layer in the dense graph.
        measured: seconds of each layer in the graph of the plan.
    """
    return {
        name: Reason(
            ReasonCode.SLOWER_IN_GRAPH,
            f"{choice.form}{list(choice.ranks)} took {measured[name] * 1e3:.3f} ms inside the graph, "
            f"the dense layer {dense[name] * 1e3:.3f} ms",
        )
        for name, choice in plan.choices.items()
        if not choice.is_dense and 0.0 < dense[name] <= measured[name]
    }


def confirmed_slower(plan: RankPlan, times: LayerTimes, again: Callable[[], LayerTimes]) -> dict[str, Reason]:
    """Return the replaced layers that were not faster in a graph, neither in one profile nor in the next.

    Args:
        plan: the plan of the graph.
        times: seconds of each layer in the dense graph, and in the graph of the plan.
        again: measures both again; called only if a layer was not faster.
    """
    slower = slower_layers(plan, *times)
    if not slower:
        return {}
    second = slower_layers(plan, *again())
    return {name: reason for name, reason in slower.items() if name in second}


def _layer_of(node: str, layers: Mapping[str, float]) -> str | None:
    """Return the layer whose module, or a submodule of it, prefixes a node's name."""
    parts = node.rpartition("/")[0].split(".")
    return next((name for i in range(len(parts), 0, -1) if (name := ".".join(parts[:i])) in layers), None)


def node_seconds(model: Model, inputs: Sequence[Tensor], target: Target, runs: int = 10) -> dict[str, float]:
    """Return the kernel seconds of each node; see ``profile_nodes``."""
    return profile_nodes(model, inputs, target, runs).seconds


def profile_nodes(
    model: Model, inputs: Sequence[Tensor], target: Target, runs: int = 10, clock: Clock | None = None
) -> Profile:
    """Return the median kernel seconds of each node in undisturbed runs, from onnxruntime's profiler.

    The profiler reads the wall clock. If other processes disturb most runs, more are made. If still fewer than
    three are undisturbed, the lower quartiles of the kernels are scaled so that they sum to a run's processor time.

    A fused node has the name of the operator that gives its kind (Conv of Conv + Relu). Nodes that onnxruntime adds
    (``ReorderInput``, ``MemcpyToHost``) are summed under their kind. The profiler itself takes time, and on CUDA it
    sees launches only: use it to compare nodes, not for latency.
    """
    proto = onnx.load(model, load_external_data=False) if isinstance(model, Path) else onnx.load_from_string(model)
    clock, warm_up = clock or Clock.of(target), WARM_UP[target.device]
    with tempfile.TemporaryDirectory(prefix="tdcompile-") as folder:
        session = open_session(model, target, profile=Path(folder) / "profile")
        run = bind_inputs(session, inputs, target)
        for _ in range(warm_up - 1):  # ``bind_inputs`` has made the first run
            run()
        laps = [clock.time(run) for _ in range(runs)]
        hope = any(clock.clean(laps))  # if none was, runs are longer than the turns of the processor
        while hope and len(laps) < _MOST_RUNS * runs and sum(clock.clean(laps)) < min(_FEWEST_CLEAN, runs):
            laps.append(clock.time(run))
        events = json.loads(Path(session.end_profiling()).read_bytes())
    kernels, walls = _by_run(events)
    table = np.array([times[warm_up:] for times in kernels.values()]).reshape(len(kernels), len(laps))
    taken, quiet = _typical(table, walls[warm_up:], laps, clock)
    producers = {output: node for node in proto.graph.node for output in node.output}
    names = {node.name for node in proto.graph.node}
    seconds: dict[str, float] = defaultdict(float)
    for (name, kind, _), value in zip(kernels, taken, strict=True):
        seconds[_model_node_name(name, kind, names, producers)] += float(value)
    return Profile(dict(seconds), quiet)


def _by_run(events: Sequence[Mapping[str, Any]]) -> tuple[dict[tuple[str, str, str], list[float]], NDArray[np.float64]]:
    """Return the seconds of each kernel in each run, and the wall seconds of the runs."""
    whole = sorted((event["ts"], event["dur"]) for event in events if event["name"] == _RUN)
    starts = [start for start, _ in whole]
    kernels: dict[tuple[str, str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL_SUFFIX):
            facts = event["args"]
            key = event["name"].removesuffix(_KERNEL_SUFFIX), facts["op_name"], facts.get("node_index", "")
            times = kernels.setdefault(key, [0.0] * len(starts))
            times[max(bisect_right(starts, event["ts"]) - 1, 0)] += event["dur"] * 1e-6
    return kernels, np.array([duration * 1e-6 for _, duration in whole])


def _typical(
    kernels: NDArray[np.float64], walls: NDArray[np.float64], laps: Sequence[Lap], clock: Clock
) -> tuple[NDArray[np.float64], bool]:
    """Return the seconds of each kernel, and whether enough runs were undisturbed.

    Args:
        kernels: seconds, kernels x runs.
        walls: wall seconds of the runs.
        laps: the same runs by the clock of the target.
        clock: that clock.
    """
    clean = np.array(clock.clean(laps))
    if clean.sum() >= min(_FEWEST_CLEAN, len(laps)):
        return np.median(kernels[:, clean], axis=1), True
    low = np.quantile(kernels, _LOW, axis=1)
    if not clock.by_cpu:
        return low, False
    outside = np.quantile(walls - kernels.sum(axis=0), _LOW)  # the executor between kernels
    inside = float(np.median([lap.seconds for lap in laps]) - outside)
    return low * (inside / low.sum() if inside > 0 and low.sum() > 0 else 1.0), False


def _model_node_name(name: str, kind: str, names: set[str], producers: dict[str, onnx.NodeProto]) -> str:
    """Return the model's name of a node that onnxruntime fused, blocked or added, or its kind if it has none.

    onnxruntime names a fusion ``fused <node>`` or ``<node>/<Fusion>``, and a blocked convolution after its output
    value, which is the output of the activation fused into it. An integer kernel has the node's name and a number.
    """
    name = _NUMBERED.sub("", name.removeprefix("fused "))
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
