"""Hooks about training: who decides, the accuracy before training, and training state that a saved result replaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import fx, nn

import tdcompile
from tdcompile.core.hooks import Hook, RunRecord, Work
from tdcompile.core.passes import AnalysisPass, Pass, Rewritten, TunePass
from tdcompile.core.pipeline import Pipeline
from tdcompile.data.task import Task, Tensors
from tdcompile.errors import InputError
from tdcompile.ir.diagnostics import Diagnostic
from tdcompile.ir.facts import Fact
from tdcompile.ir.program import Program
from tdcompile.training import hooks as hooks_file
from tdcompile.training.hooks import DeleteTrainingState, FirstProcessDecides, ScoreBeforeTraining
from tdcompile.training.run_state import Saved, state_folder


@dataclass(frozen=True)
class Found(Fact):
    """A fact."""

    value: int = 0

    def diagnostics(self) -> Sequence[Diagnostic]:
        return [Diagnostic("info", "found", f"found {self.value}")]


class Look(AnalysisPass):
    """Gives a fact."""

    gives = (Found,)

    def analyze(self, program: Program) -> Fact:
        return Found(3)


@dataclass(frozen=True)
class Told(Fact):
    """A fact with a message."""

    def diagnostics(self) -> list[Diagnostic]:
        return [Diagnostic("info", "few_samples", "few")]


class Warn(AnalysisPass):
    """Gives a fact with a message."""

    gives = (Told,)

    def analyze(self, program: Program) -> Fact:
        return Told()


class Train(TunePass):
    """Negates the weights, so that every prediction changes."""

    trains: ClassVar[bool] = True

    def tune(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        with torch.no_grad():
            for parameter in graph.parameters():
                parameter.neg_()
        Saved(state_folder(program.workspace, self), "key").write({"epoch": 1})
        return Rewritten(graph)


class Settle(TunePass):
    """Changes nothing and trains nothing."""

    def tune(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        return Rewritten(graph)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    network = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(2))
    x = torch.eye(2)
    task = Task(test=Tensors(x, torch.tensor([0, 1])))
    return tdcompile.trace(network.eval(), (x,)).with_(task=task, workspace=tmp_path)


@pytest.mark.parametrize(
    ("steps", "before"), [((Settle(), Train(), Train()), 1.0), ((Settle(), Look()), None), ((Train(),), 1.0)]
)
def test_the_accuracy_is_that_before_the_first_pass_that_trains(
    program: Program, steps: tuple[Pass, ...], before: float | None
) -> None:
    record = RunRecord()
    Pipeline(steps).run(program, [ScoreBeforeTraining(record)])
    assert record.before_tuning == before


def test_an_accuracy_that_a_checkpoint_had_is_not_taken_again(program: Program) -> None:
    record = RunRecord(before_tuning=0.25)
    Pipeline((Train(),)).run(program, [ScoreBeforeTraining(record)])
    assert record.before_tuning == 0.25


def test_only_passes_that_decide_go_through_the_first_process(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[object] = []
    from_first = hooks_file.from_first

    def spied(work: Work, cpu: bool) -> object:
        sent.append(from_first(work, cpu))
        return sent[-1]

    monkeypatch.setattr(hooks_file, "from_first", spied)
    after = Pipeline((Look(), Settle())).run(program, [FirstProcessDecides()])
    assert sent == [0, [Found(3)]]
    assert after.facts[Found] == Found(3)
    assert [entry.text for entry in after.history if isinstance(entry, Diagnostic)] == ["found 3"]


def test_the_messages_of_facts_that_a_pass_found_are_kept(program: Program) -> None:
    assert [entry.text for entry in Pipeline([Warn()]).run(program, [FirstProcessDecides()]).history] == ["few"]


def test_processes_that_start_at_different_steps_are_refused(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks_file, "from_first", lambda work, cpu: 2)
    with pytest.raises(InputError, match="to resume in several processes, all of them need the folder"):
        Pipeline((Look(),)).run(program, [FirstProcessDecides()])


def test_training_state_is_deleted_after_the_result_is_saved(program: Program, tmp_path: Path) -> None:
    seen: list[bool] = []
    folder = state_folder(tmp_path, Train())
    assert folder is not None

    class Save(Hook):
        def around(self, step: Pass, position: int, program: Program, work: Work) -> Program:
            after = work()
            seen.append((folder / "state.pt").exists())
            return after

    class Full(Hook):
        def around(self, step: Pass, position: int, program: Program, work: Work) -> Program:
            work()
            raise OSError("no space left")

    @dataclass(frozen=True)
    class Named(Train):
        """A pass with a folder of its own."""

        name: ClassVar[str] = "train-for-test-hooks"

    folder = state_folder(tmp_path, Named())
    assert folder is not None
    Pipeline((Named(),)).run(program, [DeleteTrainingState(fresh=True), Save()])
    assert seen == [True]
    assert not folder.exists()
    with pytest.raises(OSError, match="no space"):
        Pipeline((Named(),)).run(program, [DeleteTrainingState(fresh=True), Full()])
    assert (folder / "state.pt").exists()
    Pipeline((Look(), Named())).run(program, [DeleteTrainingState(fresh=False), _Present(folder, expected=True)])
    Saved(folder, "key").write({"epoch": 1})
    Pipeline((Look(), Named())).run(program, [DeleteTrainingState(fresh=True), _Present(folder, expected=False)])


class _Present(Hook):
    """Check before the first step whether the state of an earlier run is there."""

    def __init__(self, folder: Path, *, expected: bool) -> None:
        self._folder, self._expected = folder, expected

    def started(self, step: Pass, position: int, of: int) -> None:
        if position == 0:
            assert (self._folder / "state.pt").exists() == self._expected


def test_a_folder_of_a_pass_that_keeps_no_training_state_stays(program: Program, tmp_path: Path) -> None:
    class Plain(AnalysisPass):
        """Has no state."""

        name: ClassVar[str] = "plain-for-test-hooks"
        gives = (Found,)

        def analyze(self, program: Program) -> Fact:
            return Found()

    (tmp_path / "plain-for-test-hooks").mkdir()
    Pipeline((Plain(),)).run(program, [DeleteTrainingState(fresh=True)])
    assert (tmp_path / "plain-for-test-hooks").exists()
