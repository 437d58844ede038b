"""The form in which a network is exported and timed: batch norm folded, nothing dead, a batch of the target's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, fx

from tdcompile.export import Exported, export_onnx
from tdcompile.pipeline import Pipeline
from tdcompile.program import Program

FOLDING = "fold-batchnorm,drop-dead"


def folded(program: Program, graph: fx.GraphModule) -> fx.GraphModule:
    """The graph as it is exported; the one given keeps its batch norm."""
    return Pipeline.parse(FOLDING).run(program.with_(graph=graph)).graph


def export_folded(
    program: Program,
    graph: fx.GraphModule,
    path: Path,
    *,
    dynamic_batch: bool = True,
    simplify: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Export a graph of the program, folded, with the program's example inputs."""
    return export_onnx(
        folded(program, graph),
        program.inputs,
        path,
        dynamic_batch=dynamic_batch,
        simplify=simplify,
        metadata=metadata,
    )


def timing_inputs(program: Program) -> list[Tensor]:
    """Inputs of ``target.batch`` samples, like the program's own."""
    batch = program.target.batch
    return [torch.cat([x] * -(-batch // len(x)))[:batch].contiguous() for x in program.inputs]
