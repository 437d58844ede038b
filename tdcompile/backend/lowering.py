"""Lower a graph to the form that is exported and timed: batch norm folded, dead nodes removed, the target's batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, fx

from tdcompile.backend.export import Exported, export_onnx
from tdcompile.core.passes import RewritePass
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.registry import declaring
from tdcompile.ir.dynamic_shapes import batch_of
from tdcompile.ir.program import Program


def lowering() -> Pipeline:
    """Return the passes that declare a place in the lowering, in its order."""
    kinds = sorted(declaring(RewritePass, "lowering"), key=lambda kind: kind.lowering)
    return Pipeline(tuple(kind() for kind in kinds))


def lower(program: Program, graph: fx.GraphModule) -> fx.GraphModule:
    """Return the graph in the exported form; the given graph keeps its batch norm."""
    return lowering().run(program.with_(graph=graph)).graph


def export_lowered(
    program: Program,
    graph: fx.GraphModule,
    path: Path,
    *,
    simplify: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Lower a graph of the program and export it: see ``export_graph``."""
    return export_graph(program, lower(program, graph), path, simplify=simplify, metadata=metadata)


def export_graph(
    program: Program,
    graph: fx.GraphModule,
    path: Path,
    *,
    simplify: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Export a graph that is lowered already, with the program's example inputs and dynamic axes."""
    return export_onnx(
        graph,
        program.inputs,
        path,
        dynamic_batch=program.dynamic_batch,
        batch_axes=program.batch_axes,
        axes=program.axes,
        form=program.onnx,
        simplify=simplify,
        metadata=metadata,
    )


def timing_inputs(program: Program) -> list[Tensor]:
    """Return example inputs of ``target.batch`` samples, or the program's own if its batch is fixed."""
    return list(batch_of(program.inputs, program.target.batch, program.batch_axes))
