"""The form in which a network is exported and timed: batch norm folded, nothing dead, a batch of the target's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, fx

from tdcompile.backend.export import Exported, export_onnx
from tdcompile.core.pipeline import Pipeline
from tdcompile.ir.dynamic_shapes import batch_of
from tdcompile.ir.program import Program

LOWERING = "fold-batchnorm,drop-dead"


def lower(program: Program, graph: fx.GraphModule) -> fx.GraphModule:
    """The graph as it is exported; the one given keeps its batch norm."""
    return Pipeline.parse(LOWERING).run(program.with_(graph=graph)).graph


def export_lowered(
    program: Program,
    graph: fx.GraphModule,
    path: Path,
    *,
    simplify: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Export a graph of the program, folded, with the program's example inputs."""
    return export_onnx(
        lower(program, graph),
        program.inputs,
        path,
        dynamic_batch=program.dynamic_batch,
        axes=program.axes,
        simplify=simplify,
        metadata=metadata,
    )


def timing_inputs(program: Program) -> list[Tensor]:
    """Inputs of ``target.batch`` samples, like the program's own; these themselves where the batch is fixed."""
    return list(batch_of(program.inputs, program.target.batch) if program.dynamic_batch else program.inputs)
