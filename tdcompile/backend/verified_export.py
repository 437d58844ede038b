"""Export a network and verify the model; use the unsimplified model where the simplified one is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, fx

from tdcompile.backend.export import Exported
from tdcompile.backend.lowering import export_graph
from tdcompile.backend.parity import Parity, check_parity
from tdcompile.errors import InputError, ParityError, first_line
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode
from tdcompile.ir.facts import Fact
from tdcompile.ir.program import Program

_SAMPLES = 256  # samples of the data whose integers the comparison draws from


@dataclass(frozen=True)
class DenseModel(Fact):
    """The dense network as an ONNX model, batch norm folded, and its agreement with the network.

    Attributes:
        model: the ONNX file.
        parity: the result of the comparison in onnxruntime.
        simplified: whether the model is simplified.
        notes: deviations from the usual export.
    """

    model: Path
    parity: Parity
    simplified: bool
    notes: tuple[Diagnostic, ...] = ()


def export_verified(
    program: Program, graph: fx.GraphModule, path: Path, metadata: Mapping[str, str] | None = None
) -> tuple[Exported, Parity]:
    """Export a lowered graph and compare the model with it in onnxruntime.

    If the simplified model does not load, does not run, or computes something else, the unsimplified one is written and
    compared, and the notes of the export say so.

    Raises:
        ParityError: the outputs of the unsimplified model differ from the graph's too.
        InputError: the export is refused, or onnxruntime cannot run the unsimplified model either.
        TdcompileError: torch cannot export the graph.
    """
    exported = export_graph(program, graph, path, metadata=metadata)
    try:
        return exported, _parity(program, graph, path)
    except (InputError, ParityError) as error:
        if not exported.simplified:
            raise
        plain = export_graph(program, graph, path, simplify=False, metadata=metadata)
        try:
            parity = _parity(program, graph, path)
        except (InputError, ParityError):
            raise error from None
        why = f"the simplified model is wrong ({first_line(error)}), and the model is not simplified"
        note = Diagnostic("warning", DiagnosticCode.NOT_SIMPLIFIED, why)
        return replace(plain, notes=(*plain.notes, note)), parity


def _parity(program: Program, graph: fx.GraphModule, model: Path) -> Parity:
    return check_parity(
        model,
        graph,
        program.inputs,
        replace(program.target, precision="fp32"),  # other precisions are written from this model
        axes=program.axes,
        batch_axes=program.batch_axes,
        seed=program.seed,
        values=_data_values(program),
    )


def _data_values(program: Program) -> list[Tensor | None]:
    """Return the values of each integer input in the data; None for other inputs, nothing without data."""
    samples = program.task.test or program.task.train
    if samples is None or not len(samples):
        return []
    given = next(samples.batches(_SAMPLES, limit=_SAMPLES)).inputs
    whole = [x.numel() > 0 and not x.is_floating_point() and x.dtype is not torch.bool for x in given]
    known = [not x.is_floating_point() and x.dtype is not torch.bool for x in program.inputs]
    return [x if a and b else None for x, a, b in zip(given, whole, known, strict=True)]
