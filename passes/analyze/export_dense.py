"""``export-dense``: export the dense network and verify the model, so that a refusal comes before any other work."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tdcompile.backend.lowering import lower
from tdcompile.backend.verified_export import DenseModel, export_verified
from tdcompile.core.passes import AnalysisPass
from tdcompile.ir.facts import Fact
from tdcompile.ir.program import Program


@dataclass(frozen=True)
class ExportDense(AnalysisPass):
    """Export the dense network and compare the model with it; ``compile`` runs this pass first in every pipeline."""

    name: ClassVar[str] = "export-dense"
    gives: ClassVar[tuple[type[Fact], ...]] = (DenseModel,)

    def analyze(self, program: Program) -> DenseModel:
        """Return the dense model.

        Raises:
            InputError: the export is refused.
            ParityError: the model and the network differ.
            TdcompileError: torch cannot export the network.
            UnavailableError: the target's execution provider does not load.
        """
        # Without a workspace the temporary folder stays: the fact that names the file outlives the pass.
        folder = program.workspace or Path(tempfile.mkdtemp(prefix="tdcompile-"))
        exported, parity = export_verified(program, lower(program, program.dense), folder / "dense.onnx")
        return DenseModel(exported.path, parity, exported.simplified, exported.notes)
