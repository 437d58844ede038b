"""Passes keep the contracts of their base classes; a pipeline runs its hooks around the steps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn

import tdcompile
from tdcompile.cli.main import _failure
from tdcompile.core import registry
from tdcompile.core.hooks import Hook, RunRecord, StepTimer, Work
from tdcompile.core.importance import Importance
from tdcompile.core.passes import AnalysisPass, Pass, RewritePass, Rewritten, TunePass
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import Candidates, RankPlan
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.registry import make
from tdcompile.errors import InputError, TdcompileError
from tdcompile.ir.facts import Aspect, Fact, Facts
from tdcompile.ir.program import Change, Program
from tdcompile.ir.target import Budget, Cost
from tdcompile.passes.analyze import choose as choose_pass
from tdcompile.passes.analyze import score as score_pass
from tdcompile.support.progress import report_progress


@dataclass(frozen=True)
class Count(Fact):
    """Read from the weights."""

    reads: ClassVar[frozenset[Aspect]] = frozenset({Aspect.WEIGHTS})
    value: int = 0


@dataclass(frozen=True)
class Shape(Fact):
    """Read from the topology."""

    reads: ClassVar[frozenset[Aspect]] = frozenset({Aspect.TOPOLOGY})


@pytest.fixture
def program() -> Program:
    return tdcompile.trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), (torch.randn(2, 4),))


class Learn(AnalysisPass):
    """Gives a count."""

    gives = (Count,)

    def analyze(self, program: Program) -> Fact | Sequence[Fact]:
        report_progress(1, 2, "half")
        return Count(3)


class Silently(Learn):
    """Promises a count and gives nothing."""

    def analyze(self, program: Program) -> Fact | Sequence[Fact]:
        return []


class Scale(TunePass):
    """Doubles every weight."""

    needs = (Count,)

    def tune(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        with torch.no_grad():
            for parameter in graph.parameters():
                parameter.mul_(2)
        return Rewritten(graph, [Change("", "scale", "doubled")])


class Sneak(TunePass):
    """Adds an operation, which a tune pass must not."""

    def tune(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        output = next(node for node in graph.graph.nodes if node.op == "output")
        with graph.graph.inserting_before(output):
            output.args = (graph.graph.call_function(torch.neg, output.args[:1]),)
        return Rewritten(graph)


class Halve(RewritePass):
    """Drops a column of the output."""

    def rewrite(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        output = next(node for node in graph.graph.nodes if node.op == "output")
        with graph.graph.inserting_before(output):
            output.args = (graph.graph.call_function(torch.narrow, (output.args[0], 1, 0, 2)),)
        return Rewritten(graph)


class Dangle(RewritePass):
    """Leaves a node without its argument."""

    def rewrite(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        other = fx.Graph()
        stranger = other.placeholder("x")
        next(node for node in graph.graph.nodes if node.op == "output").args = (stranger,)
        return Rewritten(graph)


class Forgetful(AnalysisPass):
    """Returns nothing."""

    def analyze(self, program: Program) -> Fact | Sequence[Fact]:
        return None  # type: ignore[return-value]


class Bare(RewritePass):
    """Returns the graph alone."""

    def rewrite(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        return graph  # type: ignore[return-value]


class Lost(TunePass):
    """Returns a result without its graph."""

    def tune(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        return Rewritten(None)  # type: ignore[arg-type]


class Mute(Pass):
    """Returns no program."""

    def run(self, program: Program) -> Program:
        return None  # type: ignore[return-value]


class Swallow(Hook):
    """Forgets to return what the step returned."""

    def around(self, step: Pass, position: int, program: Program, work: Work) -> Program:
        work()
        return None  # type: ignore[return-value]


class Nowhere(Hook):
    """Begins with what it is told to."""

    def __init__(self, begun: object) -> None:
        self._begun = begun

    def begin(self, program: Program, steps: Sequence[Pass], done: int) -> tuple[Program, int]:
        return self._begun  # type: ignore[return-value]


def test_facts_are_one_of_a_type_and_fall_with_what_they_were_read_from() -> None:
    facts = Facts(Count(1)).having(Count(2), Shape())
    assert len(facts) == 2
    assert facts[Count].value == 2
    assert Shape in facts.after(frozenset({Aspect.WEIGHTS}))
    assert Count not in facts.after(frozenset({Aspect.WEIGHTS}))
    with pytest.raises(TdcompileError, match=r"no pass has given Shape yet \(known facts: Count\)"):
        Facts(Count(1))[Shape]


def test_an_analysis_pass_changes_nothing_but_the_facts(program: Program) -> None:
    after = Learn().run(program)
    assert after.facts[Count].value == 3
    assert after.graph is program.graph
    with pytest.raises(TdcompileError, match=r"gave the facts \[\] where it declares \['Count'\]"):
        Silently().run(program)


def test_a_tune_pass_works_on_a_copy_and_drops_what_it_made_untrue(program: Program) -> None:
    before = {name: value.clone() for name, value in program.graph.state_dict().items()}
    after = Pipeline((Learn(), Scale())).run(program)
    assert Count not in after.facts
    assert after.history[-1] == Change("", "scale", "doubled")
    for name, value in before.items():
        assert torch.equal(program.graph.state_dict()[name], value)
        assert torch.equal(after.graph.state_dict()[name], 2 * value)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (Sneak(), "changed the topology"),
        (Halve(), "changed the shapes of the outputs from .*3.* to .*2"),
        (Forgetful(), "'analyze' of the pass '' must return facts, not NoneType"),
        (Bare(), "must return a Rewritten of a graph; it returned GraphModule"),
        (Lost(), "must return a Rewritten of a graph; it returned Rewritten of NoneType"),
    ],
)
def test_a_pass_is_held_to_its_contract(program: Program, step: Pass, said: str) -> None:
    with pytest.raises(TdcompileError, match=said):
        step.run(program)


def test_a_malformed_graph_never_leaves_a_pass(program: Program) -> None:
    with pytest.raises(RuntimeError):
        Dangle().run(program)


def test_a_need_is_met_by_what_is_known_beforehand_or_not_at_all() -> None:
    Pipeline((Scale(),)).check(Facts(Count(1)))
    with pytest.raises(InputError, match="needs Count, which no step before it leaves"):
        Pipeline((Scale(),)).check()
    with pytest.raises(InputError, match="step 3"):
        Pipeline((Learn(), Scale(), Scale())).check()


def test_a_hook_observes_every_step_and_can_start_after_the_first(program: Program) -> None:
    told: list[tuple[object, ...]] = []

    class Watch(Hook):
        def started(self, step: Pass, position: int, of: int) -> None:
            told.append(("started", type(step).__name__, position, of))

        def advanced(self, step: Pass, done: int, of: int, note: str) -> None:
            told.append(("advanced", done, of, note))

        def finished(self, step: Pass, program: Program, seconds: float) -> None:
            told.append(("finished", type(step).__name__))

    pipeline = Pipeline((Learn(), Scale()))
    pipeline.run(program, [Watch()])
    assert told == [
        ("started", "Learn", 0, 2),
        ("advanced", 1, 2, "half"),
        ("finished", "Learn"),
        ("started", "Scale", 1, 2),
        ("finished", "Scale"),
    ]
    told.clear()

    class Restore(Hook):
        def begin(self, program: Program, steps: Sequence[Pass], done: int) -> tuple[Program, int]:
            return Learn().run(program), 1

    after = pipeline.run(program, [Restore(), Watch()])
    assert told == [("started", "Scale", 1, 2), ("finished", "Scale")]
    assert after.history[-1] == Change("", "scale", "doubled")


def test_the_first_hook_is_the_outermost_and_a_hook_can_replace_a_step(program: Program) -> None:
    told: list[str] = []

    class Told(Hook):
        def __init__(self, name: str) -> None:
            self.name = name

        def around(self, step: Pass, position: int, program: Program, work: Work) -> Program:
            told.append(f"{self.name} before {position}")
            after = work()
            told.append(f"{self.name} after {position}")
            return after

        def started(self, step: Pass, position: int, of: int) -> None:
            told.append(f"{self.name} started")

    class Instead(Hook):
        def around(self, step: Pass, position: int, program: Program, work: Work) -> Program:
            return program

    Pipeline((Learn(),)).run(program, [Told("a"), Told("b")])
    assert told == ["a before 0", "b before 0", "a started", "b started", "b after 0", "a after 0"]
    told.clear()
    assert Pipeline((Learn(),)).run(program, [Told("a"), Instead(), Told("b")]) is program
    assert told == ["a before 0", "a after 0"]


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        (Swallow(), "'around' of the hook Swallow must return a Program; it returned NoneType"),
        (
            Nowhere(None),
            "'begin' of the hook Nowhere must return the program and the number of steps done, from 0 to 1",
        ),
        (Nowhere((None, 0)), "'begin' of the hook Nowhere"),
    ],
)
def test_a_hook_or_a_pass_without_a_program_is_named(program: Program, hook: Hook, said: str) -> None:
    with pytest.raises(TdcompileError, match=said):
        Pipeline((Learn(),)).run(program, [hook])
    with pytest.raises(TdcompileError, match="must return a Program; it returned NoneType"):
        Pipeline((Mute(),)).run(program)
    assert Pipeline((Learn(),)).run(program, [Nowhere((program, 1))]) is program


@pytest.mark.parametrize(
    ("hooks", "said"),
    [
        ([Hook], "Hook is a class of hooks: give the object Hook()"),
        ([print], "a hook is an object of a subclass of tdcompile.Hook, not <built-in function print>"),
        (Hook(), "hooks are a list of Hook objects"),
    ],
)
def test_what_is_no_hook_is_refused_before_any_step(program: Program, hooks: Any, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        Pipeline((Learn(),)).run(program, hooks)


def test_the_timer_sums_the_passes_of_one_name(program: Program) -> None:
    record = RunRecord({"trace": 1.0})
    Pipeline((Learn(), Learn())).run(program, [StepTimer(record)])
    once = dict(record.seconds)
    assert once.keys() == {"trace", ""}
    Pipeline((Learn(),)).run(program, [StepTimer(record)])
    assert record.seconds[""] > once[""] > 0
    assert record.seconds["trace"] == 1.0


def test_passes_declare_what_hooks_must_know() -> None:
    assert Learn.decides
    assert not Learn.trains
    assert not Learn.resumable
    assert Scale.resumable
    assert not Scale.decides
    assert not Halve.decides
    assert not Halve.resumable
    assert Pipeline.parse("calibrate,recalibrate,finetune,anneal").trainer == "finetune"
    assert Pipeline.parse("calibrate,recalibrate").trainer is None


def test_a_failure_inside_a_plugin_names_it_and_where_it_was(monkeypatch: pytest.MonkeyPatch, program: Program) -> None:
    class Faulty(Importance):
        """Raises."""

        def score(self, program: Program) -> Mapping[str, float]:
            raise ValueError("too bad")

    class Lost(Importance):
        """Of another network."""

        def score(self, program: Program) -> Mapping[str, float]:
            return {"elsewhere": 1.0}

    class Empty(RankSelector):
        """Gives nothing."""

        def select(self, candidates: Candidates, importances: Mapping[str, float], budget: Budget) -> RankPlan:
            return None  # type: ignore[return-value]

    made = {"faulty": Faulty(), "lost": Lost(), "empty": Empty()}
    for home in (score_pass, choose_pass, registry):
        monkeypatch.setattr(home, "make", lambda kind, text: made.get(text) or make(kind, text))
    program = program.with_(budget=Budget(macs=0.9))
    with pytest.raises(ValueError, match="too bad") as failure:
        Pipeline.parse("score{by=faulty}").run(program)
    assert failure.value.__notes__ == [f"in the score '' of {__name__}", "in the pass 'score'"]
    assert _failure(failure.value)[1].startswith(
        f"error: ValueError: too bad, in the score '' of {__name__}, in the pass"
    )
    with pytest.raises(TdcompileError, match="names none of the network's layers: elsewhere"):
        Pipeline.parse("score{by=lost}").run(program)
    with pytest.raises(TdcompileError, match="gave NoneType, expected a RankPlan"):
        Pipeline.parse("score{by=none},propose{decompose=svd},choose{by=empty}").run(program)


@pytest.mark.parametrize(("text", "said"), [("choose{by=knapsak}", "'knapsack'"), ("score{by=fischer}", "'fisher'")])
def test_a_plug_in_inside_a_pipeline_is_looked_up_before_any_work(text: str, said: str) -> None:
    with pytest.raises(InputError, match=f"did you mean {said}"):
        Pipeline.parse(f"calibrate,{text}")


def test_a_pipeline_that_is_to_make_a_plan_and_makes_none_is_refused() -> None:
    plan = RankPlan({}, Cost(), Cost())
    for text in ("score", "finetune{epochs=2.0}"):
        Pipeline.parse(text).check()
        Pipeline.parse(text).check(Facts(plan), planned=True)
        with pytest.raises(InputError, match=rf"^the pipeline '{re.escape(text)}' makes no plan: .*choose"):
            Pipeline.parse(text).check(planned=True)
    Pipeline.parse("rene,factorize").check(planned=True)
