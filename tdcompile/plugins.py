"""The stable imports for plug-in authors: everything that a pass, decomposition, selector, score or cost model needs.

The deprecation policy covers the names of ``__all__``. The modules that define them may change in any release.

A package registers its plug-ins through the entry-point group of the same name, ``tdcompile.plugins``: each entry
names a module to import.
"""

from __future__ import annotations

from tdcompile.core.cost_model import CostModel
from tdcompile.core.decomposition import Decomposition, Kernel, relative_error
from tdcompile.core.importance import Importance, normalised
from tdcompile.core.network import Network
from tdcompile.core.passes import AnalysisPass, Pass, RewritePass, Rewritten, TunePass
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import (
    Candidate,
    Candidates,
    Importances,
    RankPlan,
    Spectrum,
    decompositions_of,
    dense_of,
    within,
)
from tdcompile.core.plugin import Plugin
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.rank_space import grid
from tdcompile.core.registry import find, make
from tdcompile.data.task import Batch, Samples, Task, Tensors
from tdcompile.errors import BudgetError, InputError, TdcompileError
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode, Reason, ReasonCode
from tdcompile.ir.facts import Aspect, Fact, Facts
from tdcompile.ir.graph_edits import module_at, replace_module
from tdcompile.ir.layer import Layer, LayerKind, Ranks
from tdcompile.ir.measurements import Baseline, Calibration, input_covariance
from tdcompile.ir.program import Change, Program, Site, sites
from tdcompile.ir.target import Budget, Cost, Target
from tdcompile.numerics.covariance import Covariance, Identity
from tdcompile.planning.allocation import limits_of, load, settle
from tdcompile.support.progress import report_progress

__all__ = [
    "AnalysisPass",
    "Aspect",
    "Baseline",
    "Batch",
    "Budget",
    "BudgetError",
    "Calibration",
    "Candidate",
    "Candidates",
    "Change",
    "Cost",
    "CostModel",
    "Covariance",
    "Decomposition",
    "Diagnostic",
    "DiagnosticCode",
    "Fact",
    "Facts",
    "Identity",
    "Importance",
    "Importances",
    "InputError",
    "Kernel",
    "Layer",
    "LayerKind",
    "Network",
    "Pass",
    "Pipeline",
    "Plugin",
    "Program",
    "RankPlan",
    "RankSelector",
    "Ranks",
    "Reason",
    "ReasonCode",
    "RewritePass",
    "Rewritten",
    "Samples",
    "Site",
    "Spectrum",
    "Target",
    "Task",
    "TdcompileError",
    "Tensors",
    "TunePass",
    "decompositions_of",
    "dense_of",
    "find",
    "grid",
    "input_covariance",
    "limits_of",
    "load",
    "make",
    "module_at",
    "normalised",
    "relative_error",
    "replace_module",
    "report_progress",
    "settle",
    "sites",
    "within",
]
