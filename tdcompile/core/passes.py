"""The three kinds of pass; the base class of each checks that a pass keeps its contract."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from tdcompile.core.plugin import Plugin
from tdcompile.errors import TdcompileError
from tdcompile.ir.diagnostics import Diagnostic
from tdcompile.ir.facts import Aspect, Fact
from tdcompile.ir.graph_edits import copy_graph, copy_weights
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.program import Change, Program

log = logging.getLogger("tdcompile")


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
        fine_tunes: the option ``tune`` of recipes and studies sets the options of this pass. A pipeline works without
            the pass, only less accurately.
        takes: options of a recipe that the pass applies, by name, and the pass's own option for each.
    """

    needs: ClassVar[tuple[type[Fact], ...]] = ()
    gives: ClassVar[tuple[type[Fact], ...]] = ()
    touches: ClassVar[frozenset[Aspect]] = frozenset()
    decides: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    resumable: ClassVar[bool] = False
    fine_tunes: ClassVar[bool] = False
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
    """

    lowering: ClassVar[int] = 0
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
        return _settle(self, program, rewritten)


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
