"""``measure``: export, verify and time the compiled and the dense network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import fx, nn

from tdcompile.backend.evaluation import Evaluation, evaluate
from tdcompile.backend.export import Exported, rewrite_metadata
from tdcompile.backend.lowering import lower, timing_inputs
from tdcompile.backend.parity import Parity
from tdcompile.backend.profile import LayerTimes, confirmed_slower, layer_seconds
from tdcompile.backend.session import Timing, time_models
from tdcompile.backend.verified_export import DenseModel, export_verified
from tdcompile.core.plan import RankPlan
from tdcompile.ir.diagnostics import Reason
from tdcompile.ir.layer import Layer
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.program import Program, Site, parameters_of, sites_of


class Part(NamedTuple):
    """One module: the layer of each call, and the number of parameters."""

    calls: Sequence[Layer]
    params: int


@dataclass(frozen=True)
class MeasuredNetwork:
    """One of the two networks, measured.

    Attributes:
        parts: the convolutions and linear layers that compute it, by the names of their modules.
        macs: multiply-accumulates of ``parts`` for one sample.
        layer_seconds: seconds of each layer of the dense network, measured inside this model's graph.
        accuracy: accuracy on the test samples; None without labels.
    """

    module: fx.GraphModule
    exported: Exported
    params: int
    parts: Mapping[str, Part]
    macs: int
    parity: Parity
    timing: Timing
    layer_seconds: Mapping[str, float]
    accuracy: float | None


@dataclass(frozen=True)
class Outcome:
    """Both networks, and how far apart their outputs are.

    Attributes:
        approximation: largest difference of the outputs, and the same relative to the largest dense output.
        evaluation: accuracy and agreement on test samples, else on samples held out of training; None without samples.
        slower: under a latency budget, the replaced layers that are not faster in the compiled model, with the reason.
    """

    dense: MeasuredNetwork
    compiled: MeasuredNetwork
    approximation: tuple[float, float]
    evaluation: Evaluation | None = None
    slower: Mapping[str, Reason] = field(default_factory=dict)


def measure(program: Program, folder: Path, *, stamp: Mapping[str, str], seconds: float = 3.0) -> Outcome:
    """Export both networks, verify each in onnxruntime against its PyTorch graph, then time and test them.

    Args:
        folder: the folder for the models.
        seconds: duration of the interleaved timing of both models.
        stamp: metadata for the models.

    Raises:
        ParityError: the outputs of a model differ from its PyTorch graph.
    """
    dense_graph, compiled_graph = lower(program, program.dense), lower(program, program.graph)
    plan = program.facts.get(RankPlan)
    stamps = [{**stamp, "model": role} for role in ("dense", "compiled")]
    verified = [
        _known(program, folder / "dense.onnx", stamps[0])
        or export_verified(program, dense_graph, folder / "dense.onnx", stamps[0]),
        export_verified(program, compiled_graph, folder / "model.onnx", stamps[1]),
    ]
    paths, inputs = [exported.path for exported, _ in verified], timing_inputs(program)
    timings = time_models(paths, inputs, program.target, seconds=seconds)
    times, slower = _layer_times(program, paths, plan) if plan else (({}, {}), {})
    evaluation = _evaluation(program, *paths)
    accuracies = (evaluation.dense_accuracy, evaluation.compiled_accuracy) if evaluation else (None, None)
    dense_parts = _parts(sites_of(dense_graph, program.inputs))
    parts = _compiled_parts(program, compiled_graph, dense_parts)
    networks = [
        MeasuredNetwork(
            module=graph,
            exported=exported,
            params=sum(p.numel() for p in graph.parameters()),
            parts=layers,
            macs=sum(call.macs for part in layers.values() for call in part.calls),
            parity=parity,
            timing=timing,
            layer_seconds=by_layer,
            accuracy=accuracy,
        )
        for graph, layers, (exported, parity), timing, by_layer, accuracy in zip(
            (dense_graph, compiled_graph), (dense_parts, parts), verified, timings, times, accuracies, strict=True
        )
    ]
    approximation = _approximation(dense_graph, compiled_graph, program)
    return Outcome(networks[0], networks[1], approximation, evaluation, slower)


def _layer_times(program: Program, paths: Sequence[Path], plan: RankPlan) -> tuple[LayerTimes, dict[str, Reason]]:
    """Return the seconds of each layer in both models, and under a latency budget the layers that are not faster."""

    def profile() -> LayerTimes:
        names, inputs = list(plan.choices), timing_inputs(program)
        dense, compiled = (layer_seconds(path, names, inputs, program.target) for path in paths)
        return dense, compiled

    times = profile()
    return times, confirmed_slower(plan, times, profile) if program.budget.latency is not None else {}


def _evaluation(program: Program, dense: Path, compiled: Path) -> Evaluation | None:
    """Compare both models on the test samples, else on held-out training samples, whose labels say nothing."""
    task = program.task
    found = evaluate(dense, compiled, task.judges, program, task.evaluate if task.tested else None)
    if task.tested:
        return found
    return None if found is None else replace(found, dense_accuracy=None, compiled_accuracy=None)


def parts_of(parts: Mapping[str, Part], name: str) -> list[Part]:
    """Return the parts of one layer of the dense network: the layer, or the modules that replace it."""
    return [part for own, part in parts.items() if _is_of(own, name)]


def _is_of(own: str, name: str) -> bool:
    return own == name or own.startswith(f"{name}.")


def _at_rows_of(dense: Part, part: Part) -> Part:
    if len(part.calls) != len(dense.calls) or any(call.kind != "linear" for call in (*part.calls, *dense.calls)):
        return part
    return part._replace(
        calls=[replace(call, extent=known.extent) for call, known in zip(part.calls, dense.calls, strict=True)]
    )


def _parts(found: Mapping[str, Site]) -> dict[str, Part]:
    return {name: Part(site.calls, site.layer.params) for name, site in found.items()}


def _compiled_parts(program: Program, graph: fx.GraphModule, before: Mapping[str, Part]) -> dict[str, Part]:
    """Return all parts; a form with a custom module, such as ``tt-linear``, counts as its blueprint.

    A network that routes rows by value, such as a mixture of experts, routes other rows once it is compressed. Linear
    layers therefore count the rows that they have in the dense network.
    """
    known, plan = _parts(sites_of(graph, program.inputs)), program.facts.get(RankPlan)
    for name, dense in before.items():
        known |= {own: _at_rows_of(dense, part) for own, part in known.items() if _is_of(own, name)}
    found: dict[str, Part] = {}
    for name, choice in (plan.choices if plan else {}).items():
        if not choice.is_dense and not parts_of(known, name):
            blueprint = choice.decomposition.blueprint
            calls = [part for call in before[name].calls for part in blueprint(call, choice.ranks)]
            found[name] = Part(calls, parameters_of(graph.get_submodule(name)))
    return {**known, **found}


def _known(program: Program, path: Path, stamp: Mapping[str, str]) -> tuple[Exported, Parity] | None:
    """Return the dense model that was exported first, with the metadata of this compilation; None without one."""
    known = program.facts.get(DenseModel)
    if known is None or not known.model.is_file():
        return None
    return rewrite_metadata(known.model, path, stamp, known.notes, simplified=known.simplified), known.parity


@torch.no_grad()
def _approximation(dense: nn.Module, compiled: nn.Module, program: Program) -> tuple[float, float]:
    """Return the largest output difference, absolute and relative to the largest dense output; use data if any."""
    samples = program.task.test or program.task.train
    inputs = next(samples.batches(64)).inputs if samples is not None else program.inputs
    pairs = list(zip(outputs_of(dense, inputs), outputs_of(compiled, inputs), strict=True))
    pairs = [(a.double(), b.double()) for a, b in pairs if a.numel() and not a.is_complex()]
    worst = max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
    largest = max((float(a.abs().max()) for a, _ in pairs), default=0.0)
    return worst, worst / max(largest, torch.finfo(torch.float32).tiny)
