"""The three kinds of pass, each held to its contract by its base class, and how a long pass tells its progress."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
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
        needs: facts that must be there before it runs.
        gives: facts that are there after it.
        touches: aspects of the program that it changes; facts read from them are dropped.
    """

    needs: ClassVar[tuple[type[Fact], ...]] = ()
    gives: ClassVar[tuple[type[Fact], ...]] = ()
    touches: ClassVar[frozenset[Aspect]] = frozenset()

    @abstractmethod
    def run(self, program: Program) -> Program:
        """The program after this step; the one given is not changed."""


@dataclass(frozen=True)
class Rewritten:
    """What a rewrite or tune pass made: the graph, what was done or refused, and facts that are true of it."""

    graph: fx.GraphModule
    history: Sequence[Change | Diagnostic] = ()
    facts: Sequence[Fact] = ()


class AnalysisPass(Pass):
    """Learns facts and touches nothing."""

    @abstractmethod
    def analyze(self, program: Program) -> Fact | Sequence[Fact]:
        """The facts, of the types in ``gives``."""

    def run(self, program: Program) -> Program:
        """Run ``analyze`` and keep its facts.

        Raises:
            TdcompileError: the pass gave other facts than it declares.
        """
        given = self.analyze(program)
        facts = [given] if isinstance(given, Fact) else list(given)
        _keep_promise(self, facts)
        return program.with_(facts=program.facts.having(*facts))


class RewritePass(Pass):
    """Changes the graph; the function it computes may change, its inputs and the shapes of its outputs may not."""

    touches: ClassVar[frozenset[Aspect]] = frozenset({Aspect.TOPOLOGY, Aspect.WEIGHTS, Aspect.STATISTICS})

    @abstractmethod
    def rewrite(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        """Edit the graph, a copy over the program's own tensors: replace parameters, never write into them."""

    def run(self, program: Program) -> Program:
        """Run ``rewrite``, then lint, recompile and check the outputs' shapes.

        Raises:
            TdcompileError: the graph is malformed or its outputs have other shapes.
        """
        rewritten = self.rewrite(copy_graph(program.graph), program)
        return _settle(self, program, rewritten)


class TunePass(Pass):
    """Changes weights or statistics, not topology.

    Attributes:
        trains: whether it trains weights; the accuracy before the first such pass goes into the report.
    """

    trains: ClassVar[bool] = False
    touches: ClassVar[frozenset[Aspect]] = frozenset({Aspect.WEIGHTS, Aspect.STATISTICS})

    @abstractmethod
    def tune(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        """Train the graph, a copy with tensors of its own: write into them as you like."""

    def run(self, program: Program) -> Program:
        """Run ``tune`` and check that the topology is the same.

        Raises:
            TdcompileError: the topology changed.
        """
        before = [(node.op, str(node.target)) for node in program.graph.graph.nodes]
        tuned = self.tune(copy_weights(program.graph), program)
        if [(node.op, str(node.target)) for node in tuned.graph.graph.nodes] != before:
            raise TdcompileError(f"the tune pass '{self.name}' changed the topology; only a RewritePass may")
        return _settle(self, program, tuned)


def _settle(step: Pass, program: Program, made: Rewritten) -> Program:
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
