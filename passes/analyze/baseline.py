"""``baseline``: export the dense network as an ONNX model with folded batch norm, and measure its latency."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tdcompile.backend.lowering import export_lowered, timing_inputs
from tdcompile.backend.session import time_models
from tdcompile.core.passes import AnalysisPass
from tdcompile.ir.facts import Fact
from tdcompile.ir.measurements import Baseline
from tdcompile.ir.program import Program


@dataclass(frozen=True)
class MeasureBaseline(AnalysisPass):
    """Export the dense network and measure it.

    Attributes:
        seconds: duration of the measurement.
    """

    name: ClassVar[str] = "baseline"
    gives: ClassVar[tuple[type[Fact], ...]] = (Baseline,)
    seconds: float = 1.0

    def analyze(self, program: Program) -> Baseline:
        """Return the dense model and its median latency.

        Raises:
            UnavailableError: the target's execution provider does not load.
        """
        # Without a workspace the temporary folder stays: the fact that names the file outlives the pass.
        folder = program.workspace or Path(tempfile.mkdtemp(prefix="tdcompile-"))
        exported = export_lowered(program, program.dense, folder / "dense.onnx")
        timing = time_models([exported.path], timing_inputs(program), program.target, seconds=self.seconds)[0]
        return Baseline(exported.path, timing.median, program.dynamic_batch, exported.notes)
