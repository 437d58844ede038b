"""The graph of a plan with random factors as an ONNX model: latency does not depend on the values of weights."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import fx

from tdcompile.backend.deployment import deployed
from tdcompile.backend.graft import Graft, graft_layers
from tdcompile.backend.lowering import export_lowered
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.plan import Candidate
from tdcompile.data.task import Task
from tdcompile.ir.graph_edits import copy_graph, replace_module
from tdcompile.ir.program import Program, sites
from tdcompile.ir.target import Precision

Choices = Mapping[str, Candidate]


@contextlib.contextmanager
def written(program: Program, choices: Choices, dense: Path, precision: Precision = "fp32") -> Iterator[Path]:
    """Write the plan's graph to an ONNX file that exists within the context.

    Args:
        program: the dense network.
        choices: the plan.
        dense: the dense network as an ONNX model in fp32.
        precision: number format of the file.
    """
    with tempfile.TemporaryDirectory(prefix="tdcompile-") as folder:
        file = Path(folder) / "rehearsal.onnx"
        _write(program, choices, dense, file)
        with deployed(program, file, precision) as made:
            yield made


def _write(program: Program, choices: Choices, dense: Path, file: Path) -> None:
    """Write the plan's graph as ONNX: replace layers in the dense model if possible, otherwise export the graph."""
    grafts = {}
    for name, site in sites(program).items():
        choice = choices[name]
        if not choice.is_dense:
            form = choice.decomposition
            plain = type(form).build is Decomposition.build  # only then is it a chain of the blueprint's layers
            chain = form.blueprint(site.layer, choice.ranks) if plain else ()
            grafts[name] = Graft(site.layer, len(site.calls), chain)
    if not all(graft.chain for graft in grafts.values()) or not graft_layers(dense, grafts, file):
        unseen = program.with_(task=Task())  # samples would only fit the random factors
        export_lowered(unseen, _shapes_of(program, choices), file, simplify=False)


def _shapes_of(program: Program, choices: Choices) -> fx.GraphModule:
    """Return the graph of a plan with random factors."""
    graph, generator = copy_graph(program.graph), torch.Generator().manual_seed(0)
    for name, site in sites(program).items():
        choice = choices[name]
        if choice.is_dense:
            continue
        form = choice.decomposition
        shapes = [part.weight_shape for part in form.blueprint(site.layer, choice.ranks)]
        factors = [torch.randn(shape, generator=generator, dtype=site.weight.dtype) for shape in shapes]
        bias = torch.zeros(site.layer.out_channels, dtype=site.weight.dtype) if site.layer.bias else None
        replace_module(graph, name, form.build(site.layer, choice.ranks, factors, bias))
    graph.recompile()
    return graph
