"""Hooks for training: decisions of the first process, score before training, deletion of training state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tdcompile.core.hooks import Hook, RunRecord, Work
from tdcompile.core.passes import Pass
from tdcompile.errors import InputError
from tdcompile.ir.facts import Fact
from tdcompile.ir.program import Program
from tdcompile.ir.scoring import network_score
from tdcompile.training.distributed import from_first, no_gpu
from tdcompile.training.run_state import delete_state


class FirstProcessDecides(Hook):
    """Run a pass that decides in the first process only, and send its facts to the others.

    Latency measured in two processes differs, so each process would choose other ranks. Rewrites and training run in
    all processes.
    """

    def begin(self, program: Program, steps: Sequence[Pass], done: int) -> tuple[Program, int]:
        """Check that all processes start at one step.

        Raises:
            InputError: the first process restored a state that this one does not have.
        """
        if from_first(lambda: done, no_gpu(program.target.device)) != done:
            raise InputError("to resume in several processes, all of them need the folder with the state: share it")
        return program, done

    def around(self, step: Pass, position: int, program: Program, work: Work) -> Program:
        """Run the step here, or take its facts, and what they tell the report, from the first process."""
        if not step.decides:
            return work()
        facts = from_first(partial(_given, step, work), no_gpu(program.target.device))
        told = [diagnostic for fact in facts for diagnostic in fact.diagnostics()]
        return program.with_(facts=program.facts.having(*facts), history=(*program.history, *told))


class ScoreBeforeTraining(Hook):
    """Record the metric of the network on the test samples before the first pass that trains."""

    def __init__(self, record: RunRecord) -> None:
        self._record = record

    def around(self, step: Pass, position: int, program: Program, work: Work) -> Program:
        """Test the network first if the step trains and the score is not known."""
        if step.trains and self._record.before_tuning is None:
            self._record.before_tuning = from_first(partial(_tested, program), no_gpu(program.target.device))
        return work()


class DeleteTrainingState(Hook):
    """Delete the training state of a pass once the hooks inside this one have saved its result.

    Args:
        fresh: also delete, before the first step, the state that an earlier run left.
    """

    def __init__(self, *, fresh: bool) -> None:
        self._fresh = fresh

    def begin(self, program: Program, steps: Sequence[Pass], done: int) -> tuple[Program, int]:
        """Delete the state of an earlier run if this run must not resume from it."""
        for step in steps if self._fresh else ():
            _delete(step, program)
        return program, done

    def around(self, step: Pass, position: int, program: Program, work: Work) -> Program:
        """Run the step and save its result; a full disk raises there, and the training state stays."""
        after = work()
        _delete(step, program)
        return after


def _given(step: Pass, work: Work) -> list[Fact]:
    """Return only the facts that the step gives: the other processes have the earlier ones."""
    facts = work().facts
    return [facts[kind] for kind in step.gives]


def _tested(program: Program) -> float | None:
    return network_score(program, program.graph)


def _delete(step: Pass, program: Program) -> None:
    if step.resumable:
        delete_state(program.workspace, step)
