"""``Checkpoint``: what is saved between two passes comes back; what is damaged or another run's does not."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.artifact.checkpoint import Checkpoint, SaveCheckpoint
from tdcompile.core.hooks import Hook, RunRecord, StepTimer
from tdcompile.core.passes import Pass
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import Importances, RankPlan
from tdcompile.data.task import Task, Tensors
from tdcompile.errors import InputError, TdcompileError
from tdcompile.ir.facts import Fact, Facts
from tdcompile.ir.measurements import Calibration
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.program import Program
from tdcompile.numerics.covariance import LowRankPlusDiagonal

KEY = {"budget": '{"macs": 0.5}', "network": "0" * 64}


@pytest.fixture(scope="module")
def programs() -> tuple[Program, Program]:
    """Before and after some passes."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(576, 4)
    )
    program = tdcompile.trace(network.eval(), (torch.randn(2, 3, 8, 8),))
    program = program.with_(
        budget=tdcompile.Budget(macs=0.5),
        task=Task(Tensors(torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)))),
    )
    done = Pipeline.parse("calibrate,score,propose{decompose=svd+channel},choose,factorize").run(program)
    return program, done


def test_what_was_saved_comes_back(programs: tuple[Program, Program], tmp_path: Path) -> None:
    before, after = programs
    Checkpoint(tmp_path / "state", KEY).save(
        after, 5, RunRecord({"propose": 1.5}, 0.25, earlier=100.0, peak_memory_mb=1e9)
    )
    restored = Checkpoint(tmp_path / "state", KEY).restore(before)
    assert restored is not None
    program, done, record = restored
    assert (done, record.seconds, record.before_tuning) == (5, {"propose": 1.5}, 0.25)
    assert 100 <= record.earlier < 200
    assert record.peak_memory_mb == 1e9
    assert program.history == after.history
    assert {type(fact) for fact in program.facts} == {type(fact) for fact in after.facts}
    if RankPlan in after.facts:
        assert program.facts[RankPlan] == after.facts[RankPlan]
    got, expected = (outputs_of(p.graph, before.inputs)[0] for p in (program, after))
    assert torch.equal(got, expected)


def test_moments_come_back_bit_for_bit(programs: tuple[Program, Program], tmp_path: Path) -> None:
    before = Pipeline.parse("calibrate").run(programs[0])
    Checkpoint(tmp_path, KEY).save(before, 1, RunRecord())
    restored = Checkpoint(tmp_path, KEY).restore(programs[0])
    assert restored is not None
    assert restored[0].graph is programs[0].dense
    got, expected = restored[0].facts[Calibration], before.facts[Calibration]
    assert (got.samples, dict(got.skipped)) == (expected.samples, dict(expected.skipped))
    for name, moments in expected.covariances.items():
        assert torch.equal(got.covariances[name].dense(), moments.dense())
        assert got.covariances[name].samples == moments.samples


def test_a_covariance_that_layers_share_comes_back_as_one(programs: tuple[Program, Program], tmp_path: Path) -> None:
    calibration = Pipeline.parse("calibrate").run(programs[0]).facts[Calibration]
    first, *others = calibration.covariances
    shared = replace(calibration, covariances={**calibration.covariances, "twin": calibration.covariances[first]})
    Checkpoint(tmp_path, KEY).save(programs[0].with_(facts=Facts(shared)), 1, RunRecord())
    restored = Checkpoint(tmp_path, KEY).restore(programs[0])
    assert restored is not None
    got = restored[0].facts[Calibration].covariances
    assert got["twin"] is got[first]
    assert len({id(covariance) for covariance in got.values()}) == 1 + len(others)


def test_a_sketch_comes_back_beside_full_moments(programs: tuple[Program, Program], tmp_path: Path) -> None:
    before = Pipeline.parse("calibrate{largest=300,sketch=8}").run(programs[0])
    Checkpoint(tmp_path, KEY).save(before, 1, RunRecord())
    restored = Checkpoint(tmp_path, KEY).restore(programs[0])
    assert restored is not None
    got, expected = restored[0].facts[Calibration].covariances, before.facts[Calibration].covariances
    sketched = {name for name, moments in expected.items() if isinstance(moments, LowRankPlusDiagonal)}
    assert 0 < len(sketched) < len(expected)
    for name, moments in expected.items():
        weight = torch.eye(len(moments), dtype=torch.float64)
        assert torch.equal(weight @ got[name], weight @ moments)
        assert isinstance(got[name], LowRankPlusDiagonal) == (name in sketched)


def test_the_last_state_stands_and_can_be_dropped(programs: tuple[Program, Program], tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "state", KEY)
    assert checkpoint.restore(programs[0]) is None
    for done in (1, 2):
        checkpoint.save(programs[1], done, RunRecord())
    restored = checkpoint.restore(programs[0])
    assert restored is not None
    assert restored[1] == 2
    checkpoint.drop()
    assert checkpoint.restore(programs[0]) is None
    assert not checkpoint.folder.exists()


@pytest.mark.parametrize("harm", ["json", "weights", "facts"])
def test_a_state_that_cannot_be_used_is_told_and_left_aside(
    programs: tuple[Program, Program], tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    Checkpoint(tmp_path, KEY).save(programs[1], 5, RunRecord())
    state = tmp_path / "state"
    if harm == "json":
        (state / "state.json").write_text("{")
    elif harm == "weights":
        (state / "graph.safetensors").write_bytes(b"nothing of the kind")
    elif harm == "facts":
        text = (state / "state.json").read_text()
        (state / "state.json").write_text(text.replace("RankPlan", "Prank"))
    with caplog.at_level(logging.WARNING, "tdcompile"):
        assert Checkpoint(tmp_path, KEY).restore(programs[0]) is None
    assert "starting anew" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budget": '{"macs": 0.25}'}, r"with another budget \({\"macs\": 0.5}\): give"),
        ({"network": "1" * 64}, "with another network: give"),
        ({"budget": "{}", "network": "1" * 64}, r"with another budget \(.*\), another network: give"),
    ],
)
def test_the_state_of_another_compilation_is_refused_and_stays(
    programs: tuple[Program, Program], tmp_path: Path, change: dict[str, str], said: str
) -> None:
    Checkpoint(tmp_path, KEY).save(programs[1], 5, RunRecord())
    with pytest.raises(InputError, match=said):
        Checkpoint(tmp_path, {**KEY, **change}).restore(programs[0])
    assert Checkpoint(tmp_path, KEY).restore(programs[0]) is not None


def test_an_accuracy_that_was_taken_over_other_samples_is_not_taken_over(
    programs: tuple[Program, Program], tmp_path: Path
) -> None:
    fewer = programs[0].with_(task=replace(programs[0].task, evaluate=8))
    checkpoint = Checkpoint(tmp_path, KEY)
    checkpoint.save(programs[1], 5, RunRecord())
    assert checkpoint.restore(fewer) is not None
    checkpoint.save(programs[1], 5, RunRecord(before_tuning=0.25))
    with pytest.raises(InputError, match=r"another eval \(null\)"):
        checkpoint.restore(fewer)
    assert checkpoint.restore(programs[0]) is not None


def test_the_state_of_a_former_version_is_refused(programs: tuple[Program, Program], tmp_path: Path) -> None:
    Checkpoint(tmp_path, KEY).save(programs[1], 5, RunRecord())
    path = tmp_path / "state" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "key": "0" * 64}))
    with pytest.raises(InputError, match="another version of tdcompile"):
        Checkpoint(tmp_path, KEY).restore(programs[0])


def test_a_place_that_cannot_be_written_is_one_sentence(programs: tuple[Program, Program], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be saved in"):
        Checkpoint(tmp_path / "file" / "state", KEY).save(programs[1], 1, RunRecord())


def test_a_state_is_there_at_every_moment_of_a_save(
    programs: tuple[Program, Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, rename, removed = Checkpoint(tmp_path, KEY), Path.rename, []
    checkpoint.save(programs[0], 1, RunRecord())

    def renamed(self: Path, to: Path) -> Path:
        found = checkpoint.restore(programs[0])
        assert found is not None
        removed.append(found[1])
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", renamed)
    checkpoint.save(programs[0], 2, RunRecord())
    assert removed == [1, 1]
    restored = checkpoint.restore(programs[0])
    assert restored is not None
    assert restored[1] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@dataclass(frozen=True)
class Weights(Fact):
    """A fact that holds a tensor."""

    value: torch.Tensor


def test_a_fact_that_has_no_text_form_is_named(programs: tuple[Program, Program], tmp_path: Path) -> None:
    program = programs[0].with_(facts=programs[0].facts.having(Weights(torch.zeros(2))))
    with pytest.raises(
        TdcompileError, match="the fact Weights cannot be saved between passes: let it hold only numbers"
    ):
        Checkpoint(tmp_path, KEY).save(program, 1, RunRecord())


class Plugin:
    """Holds a fact with the name of one of tdcompile's."""

    @dataclass(frozen=True)
    class Importances(Fact):
        """A fact of a plug-in."""

        value: int = 0


@dataclass(frozen=True)
class Finer(Plugin.Importances):
    """A fact that extends another one."""

    more: int = 0


def test_facts_of_one_name_and_facts_that_extend_others_come_back(
    programs: tuple[Program, Program], tmp_path: Path
) -> None:
    before = programs[0].with_(facts=Facts(Importances({"0": 0.5}), Plugin.Importances(2), Finer(3, 4)))
    Checkpoint(tmp_path, KEY).save(before, 1, RunRecord())
    restored = Checkpoint(tmp_path, KEY).restore(programs[0])
    assert restored is not None
    facts = restored.program.facts
    assert (facts[Plugin.Importances], facts[Finer]) == (Plugin.Importances(2), Finer(3, 4))
    assert facts[Importances].scores == {"0": 0.5}


class Interrupt(Hook):
    """Raise before the step of a name; record the steps that start."""

    def __init__(self, name: str = "") -> None:
        self.name, self.started_steps = name, list[tuple[str, int, int]]()

    def started(self, step: Pass, position: int, of: int) -> None:
        if step.name == self.name:
            raise KeyboardInterrupt
        self.started_steps.append((step.name, position, of))


@pytest.mark.parametrize("resume", [True, False])
def test_the_hook_starts_at_the_saved_step_only_if_asked(
    programs: tuple[Program, Program], tmp_path: Path, resume: bool
) -> None:
    pipeline, checkpoint = (
        Pipeline.parse("score{by=none},propose{decompose=svd+channel},choose"),
        Checkpoint(tmp_path, KEY),
    )
    record = RunRecord({"trace": 2.0}, before_tuning=0.25)
    saving = SaveCheckpoint(checkpoint, record, resume=False)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(programs[0], [saving, StepTimer(record), Interrupt("choose")])
    again, watch = RunRecord({"trace": 3.0}), Interrupt()
    after = pipeline.run(programs[0], [SaveCheckpoint(checkpoint, again, resume=resume), StepTimer(again), watch])
    names = ["score", "propose", "choose"]
    assert watch.started_steps == [(name, place, 3) for place, name in enumerate(names)][2 if resume else 0 :]
    assert again.seconds.keys() == {"trace", *names}
    assert again.seconds["trace"] == (5.0 if resume else 3.0)
    assert again.total > (record.earlier + record.seconds["score"] if resume else 0.0)
    assert again.before_tuning == (0.25 if resume else None)
    assert RankPlan in after.facts
    restored = checkpoint.restore(programs[0])
    assert restored is not None
    assert restored.done == 3
