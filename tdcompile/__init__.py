"""tdcompile: a PyTorch network in, a smaller, faster, verified ONNX model out.

Call ``compile`` to compile a network. ``Pipeline``, ``trace``, ``Hook`` and the kinds of pass are for your own
pipelines and passes. A name is imported at its first use, so ``tdcompile --help`` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tdcompile.artifact.folder import load
    from tdcompile.artifact.front import Sweep
    from tdcompile.budget_sweep import sweep
    from tdcompile.compiler import Compiled, compile  # the field's word, as in torch.compile
    from tdcompile.core.hooks import Hook
    from tdcompile.core.passes import AnalysisPass, RewritePass, Rewritten, TunePass
    from tdcompile.core.pipeline import Pipeline
    from tdcompile.data.task import Batch, Samples, Task, Tensors
    from tdcompile.errors import TdcompileError
    from tdcompile.frontend.load_network import load_weights
    from tdcompile.frontend.tracing import trace
    from tdcompile.ir.program import Program, sites
    from tdcompile.ir.target import Budget, Target
    from tdcompile.studies.experiment import study

_HOMES = {
    "artifact.folder": ("load",),
    "artifact.front": ("Sweep",),
    "budget_sweep": ("sweep",),
    "compiler": ("Compiled", "compile"),
    "errors": ("TdcompileError",),
    "studies.experiment": ("study",),
    "core.hooks": ("Hook",),
    "core.passes": ("AnalysisPass", "RewritePass", "Rewritten", "TunePass"),
    "core.pipeline": ("Pipeline",),
    "ir.program": ("Program", "sites"),
    "ir.target": ("Budget", "Target"),
    "data.task": ("Batch", "Samples", "Task", "Tensors"),
    "frontend.load_network": ("load_weights",),
    "frontend.tracing": ("trace",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AnalysisPass",
    "Batch",
    "Budget",
    "Compiled",
    "Hook",
    "Pipeline",
    "Program",
    "RewritePass",
    "Rewritten",
    "Samples",
    "Sweep",
    "Target",
    "Task",
    "TdcompileError",
    "Tensors",
    "TunePass",
    "compile",
    "load",
    "load_weights",
    "sites",
    "study",
    "sweep",
    "trace",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'tdcompile' has no attribute '{name}'")
    return getattr(importlib.import_module(f"tdcompile.{_HOME_OF[name]}"), name)
