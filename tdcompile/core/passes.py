"""The three kinds of pass; the base class of each checks that a pass keeps its contract."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from tdcompile.core.plugin import Plugin
from tdcompile.errors import TdcompileError
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode
from tdcompile.ir.facts import Aspect, Fact
from tdcompile.ir.graph_edits import copy_graph, copy_weights
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.program import Change, Program

log = logging.getLogger("tdcompile")
# Share of the largest output. Sums in another order differ by about 1e-6; a wrong padding or stride by over 1e-2.
_ROUNDING = 1e-4


class Pass(Plugin):
    """A step of a pipeline.

    Attributes:
        needs: facts that must be known before the pass runs.
        gives: facts that are known after the pass.
        touches: aspects of the program that the pass changes; facts read from them are dropped.
        decides: the pass changes only facts; of several processes the first runs it and sends the facts to the others.
        trains: the pass trains weights; the report shows the test accuracy before the first such pass.
        resumable: the pass may keep training state in a folder of its name in ``Program.workspace``. The folder is
            deleted once the result of the pass is saved.
        selects: the pass judges plans on ``Task.selection``, training samples that no other pass reads.
        fine_tunes: the option ``tune`` of recipes and studies sets the options of this pass. A pipeline works without
            the pass, only less accurately.
        fine_tunes_int8: the pass trains through the rounding of int8. A recipe that tunes for int8 ends with it, and
            gives it a part of the epochs.
        takes: options of a recipe that the pass applies, by name, and the pass's own option for each.
    """

    needs: ClassVar[tuple[type[Fact], ...]] = ()
    gives: ClassVar[tuple[type[Fact], ...]] = ()
    touches: ClassVar[frozenset[Aspect]] = frozenset()
    decides: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    resumable: ClassVar[bool] = False
    selects: ClassVar[bool] = False
    fine_tunes: ClassVar[bool] = False
    fine_tunes_int8: ClassVar[bool] = False
    takes: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def run(self, program: Program) -> Program:
        """Return the program after this step; do not change the given one."""


@dataclass(frozen=True)
class Rewritten:
    """The result of a rewrite or tune pass.

    Attributes:
        graph: the new graph.
        history: changes made, and layers left as they were with the reason.
        facts: facts about the new graph, of the types in ``Pass.gives``.
    """

    graph: fx.GraphModule
    history: Sequence[Change | Diagnostic] = ()
    facts: Sequence[Fact] = ()


class AnalysisPass(Pass):
    """Finds facts and changes nothing else."""

    decides: ClassVar[bool] = True

    @abstractmethod
    def analyze(self, program: Program) -> Fact | Sequence[Fact]:
        """Return the facts, of the types in ``gives``."""

    def run(self, program: Program) -> Program:
        """Run ``analyze`` and add its facts to the program, and their diagnostics to the history.

        Raises:
            TdcompileError: the types of the facts differ from ``gives``.
        """
        given = self.analyze(program)
        if not isinstance(given, Fact | Iterable):
            raise TdcompileError(f"'analyze' of the pass '{self.name}' must return facts, not {type(given).__name__}")
        facts = [given] if isinstance(given, Fact) else list(given)
        _keep_promise(self, facts)
        told = [diagnostic for fact in facts for diagnostic in fact.diagnostics()]
        return program.with_(facts=program.facts.having(*facts), history=(*program.history, *told))


class RewritePass(Pass):
    """Changes the graph and possibly its function, but neither its inputs nor the shapes of its outputs.

    Attributes:
        lowering: place in the lowering of every graph that is exported or timed, the lowest first; 0 if the pass
            has no part in it. Such a pass keeps the function that the graph computes.
        exact: the pass keeps the function up to rounding. As long as the graph is the dense network, the pass rewrites
            the dense network with it, so that the comparison shows the same gain on both sides. A pipeline that begins
            with such passes runs them before the dense network is exported.
    """

    lowering: ClassVar[int] = 0
    exact: ClassVar[bool] = False
    touches: ClassVar[frozenset[Aspect]] = frozenset({Aspect.TOPOLOGY, Aspect.WEIGHTS, Aspect.STATISTICS})

    @abstractmethod
    def rewrite(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        """Edit the graph, a copy that shares the program's tensors: replace parameters, never write into them."""

    def run(self, program: Program) -> Program:
        """Run ``rewrite``, then lint and recompile the graph and check the shapes of its outputs.

        Raises:
            RuntimeError: the graph is malformed.
            TdcompileError: the shapes of the outputs changed.
        """
        rewritten = _rewritten(self, self.rewrite(copy_graph(program.graph), program))
        if self.exact and not any(isinstance(entry, Change) for entry in rewritten.history):
            return program.with_(history=(*program.history, *rewritten.history))  # the graph is the program's still
        settled = _settle(self, program, rewritten)
        return _checked(self, program, settled) if self.exact else settled


class TunePass(Pass):
    """Changes weights or statistics, not topology."""

    resumable: ClassVar[bool] = True
    touches: ClassVar[frozenset[Aspect]] = frozenset({Aspect.WEIGHTS, Aspect.STATISTICS})

    @abstractmethod
    def tune(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        """Train the graph, a copy that owns its tensors: writing into them is allowed."""

    def run(self, program: Program) -> Program:
        """Run ``tune`` and check that the topology did not change.

        Raises:
            TdcompileError: the topology changed.
        """
        before = [(node.op, str(node.target)) for node in program.graph.graph.nodes]
        tuned = _rewritten(self, self.tune(copy_weights(program.graph), program))
        if [(node.op, str(node.target)) for node in tuned.graph.graph.nodes] != before:
            raise TdcompileError(f"the tune pass '{self.name}' changed the topology; only a RewritePass may")
        return _settle(self, program, tuned)


def _rewritten(step: Pass, made: object) -> Rewritten:
    """Require the result of a rewrite or tune pass.

    Raises:
        TdcompileError: it is no ``Rewritten`` with a graph.
    """
    if not isinstance(made, Rewritten) or not isinstance(made.graph, fx.GraphModule):
        held = f" of {type(made.graph).__name__}" if isinstance(made, Rewritten) else ""
        raise TdcompileError(
            f"the pass '{step.name}' must return a Rewritten of a graph; it returned {type(made).__name__}{held}"
        )
    return made


def _settle(step: Pass, program: Program, made: Rewritten) -> Program:
    """Check the result of a rewrite or tune pass, and return the program with it.

    Raises:
        TdcompileError: the shapes of the outputs changed, or the facts differ from ``gives``.
    """
    made.graph.graph.lint()
    made.graph.recompile()
    made.graph.eval()
    _same_shapes(step, program, made.graph)
    _keep_promise(step, made.facts)
    for entry in made.history:
        log.debug("%s: %s", step.name, entry)
    facts = program.facts.after(step.touches).having(*made.facts)
    return program.with_(graph=made.graph, facts=facts, history=(*program.history, *made.history))


def _checked(step: Pass, program: Program, after: Program) -> Program:
    """Return the program after an exact pass, or the one before it, with a message, if the outputs differ."""
    difference = _difference(*(outputs_of(p.graph, p.inputs) for p in (program, after)))
    if difference > _ROUNDING:
        text = f"'{step.name}' is not used: the outputs after it differ by {difference:.1e} of the largest"
        return program.with_(history=(*program.history, Diagnostic("warning", DiagnosticCode.NOT_EXACT, text)))
    return after.with_(dense=after.graph if program.graph is program.dense else program.dense)


def _difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest difference of outputs of the same shapes, over the largest value of its output."""
    worst = 0.0
    for one, other in zip(before, after, strict=True):
        seen = torch.isfinite(one) if one.is_floating_point() else torch.ones_like(one, dtype=torch.bool)
        gap = (one[seen].double() - other[seen].double()).abs()
        if gap.numel():
            most = float(gap.max()) / max(float(one[seen].double().abs().max()), torch.finfo(torch.float32).tiny)
            worst = worst if most <= worst else most  # ``max`` would lose NaN
    return math.inf if math.isnan(worst) else worst


@torch.no_grad()
def _same_shapes(step: Pass, program: Program, graph: fx.GraphModule) -> None:
    before, after = (_shapes(outputs_of(g, program.inputs)) for g in (program.graph, graph))
    if before != after:
        raise TdcompileError(f"the pass '{step.name}' changed the shapes of the outputs from {before} to {after}")


def _shapes(outputs: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(output.shape) for output in outputs]


def _keep_promise(step: Pass, facts: Sequence[Fact]) -> None:
    if {type(fact) for fact in facts} != set(step.gives):
        promised, given = (sorted(k.__name__ for k in kinds) for kinds in (step.gives, map(type, facts)))
        raise TdcompileError(f"the pass '{step.name}' gave the facts {given} where it declares {promised}")
