"""``baseline``: measure the latency of the dense network as an ONNX model with folded batch norm."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tdcompile.backend.deployment import write_deployed
from tdcompile.backend.lowering import export_lowered, timing_inputs
from tdcompile.backend.session import time_models
from tdcompile.backend.verified_export import DenseModel
from tdcompile.core.passes import AnalysisPass
from tdcompile.ir.facts import Fact
from tdcompile.ir.measurements import Baseline
from tdcompile.ir.program import Program
from tdcompile.support.options import NonNegative


@dataclass(frozen=True)
class MeasureBaseline(AnalysisPass):
    """Measure the dense network; export it first if ``export-dense`` has not.

    Attributes:
        seconds: duration of the measurement.
    """

    name: ClassVar[str] = "baseline"
    gives: ClassVar[tuple[type[Fact], ...]] = (Baseline,)
    seconds: NonNegative = 1.0

    def analyze(self, program: Program) -> Baseline:
        """Return the dense model and its median latency, in fp32 and in the target's precision.

        Raises:
            UnavailableError: the target's execution provider does not load.
        """
        known = program.facts.get(DenseModel)
        model = _exported(program) if known is None or not known.model.is_file() else known.model
        target = program.target
        if target.precision == "fp32":
            timing = time_models([model], timing_inputs(program), target, seconds=self.seconds)[0]
            return Baseline(model, timing.median)
        other = model.with_name(f"dense.{target.precision}.rehearsal.onnx")
        write_deployed(program, model, other, target.precision)
        timings = time_models([model, other], timing_inputs(program), target, seconds=self.seconds)
        return Baseline(model, timings[0].median, other, timings[0].median / timings[1].speedup.value)


def _exported(program: Program) -> Path:
    # Without a workspace the temporary folder stays: the fact that names the file outlives the pass.
    folder = program.workspace or Path(tempfile.mkdtemp(prefix="tdcompile-"))
    return export_lowered(program, program.dense, folder / "dense.onnx").path
