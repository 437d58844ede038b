"""``rehearse``: a layer that is slower in the graph is put back, and what was measured becomes the prediction."""

from pathlib import Path

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.backend.session import Timing
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.plan import Candidate, Candidates, Importances, RankPlan
from tdcompile.core.registry import make
from tdcompile.ir.measurements import Baseline, Rehearsal
from tdcompile.ir.target import Cost
from tdcompile.passes.analyze import _plan_graph, rehearse


def table():
    """Two layers of 10 s, each with channel{8} at 4 s and channel{4} at 2 s."""
    row = (
        Candidate.dense(Cost(10, 10, 10, 10.0)),
        Candidate(make(Decomposition, "channel"), (8,), 0.2, Cost(5, 5, 5, 4.0)),
        Candidate(make(Decomposition, "channel"), (4,), 0.5, Cost(3, 3, 3, 2.0)),
    )
    return Candidates({"0": row, "2": row}, Cost(seconds=2.0))


@pytest.fixture
def program():
    network = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)).eval()
    program = tdcompile.trace(network, (torch.randn(2, 16, 6, 6),)).with_(budget=tdcompile.Budget(latency=0.5))
    candidates = table()
    choices = {name: rows[1] for name, rows in candidates.layers.items()}
    plan = RankPlan(choices, candidates.cost(choices), candidates.dense, selector="knapsack")
    facts = program.facts.having(candidates, Importances({}), plan, Baseline(Path("dense.onnx"), 22.0))
    return program.with_(facts=facts)


def pretend(monkeypatch, in_graph):
    """Timing as if each layer took so many times its price where it is replaced and 10 s where it is not."""
    now = {}

    def export(program, graph, file, **options):
        parts = {name: graph.get_submodule(name) for name in ("0", "2")}
        now["ranks"] = {name: part[0].out_channels for name, part in parts.items() if isinstance(part, nn.Sequential)}

    def layers(model, names, *rest):
        ranks = {} if model == Path("dense.onnx") else now["ranks"]
        return {name: in_graph[name] * ranks[name] / 2 if name in ranks else 10.0 for name in names}

    def times(models, *rest, **options):
        totals = [2.0 + sum(layers(model, ("0", "2")).values()) for model in models]
        return [Timing.of([t], [totals[0]]) for t in totals]

    monkeypatch.setattr(_plan_graph, "graft_layers", lambda *rest: False)
    monkeypatch.setattr(_plan_graph, "export_lowered", export)
    monkeypatch.setattr(rehearse, "layer_seconds", layers)
    monkeypatch.setattr(rehearse, "time_models", times)


def test_a_plan_that_keeps_its_word_stands_after_one_round(program, monkeypatch):
    pretend(monkeypatch, {"0": 1.0, "2": 1.0})
    facts = rehearse.Rehearse().run(program).facts
    assert len(facts[Rehearsal].rounds) == 1
    assert {c.form for c in facts[RankPlan].choices.values()} == {"channel"}


def test_a_layer_that_is_slower_in_the_graph_is_put_back_with_the_reason(program, monkeypatch):
    pretend(monkeypatch, {"0": 1.0, "2": 6.0})
    facts = program.facts.having(Importances({"0": 2.0, "2": 1.0}))  # it would rather replace the second one
    program = program.with_(budget=tdcompile.Budget(latency=0.8), facts=facts)
    facts = rehearse.Rehearse().run(program).facts
    plan = facts[RankPlan]
    assert facts[Rehearsal].rounds[0].put_back == ("2",)
    assert plan.choices["0"].form == "channel"
    assert plan.choices["2"].is_dense
    assert plan.reasons["2"].code == "slower_in_graph"
    assert plan.predicted.seconds / plan.dense.seconds == pytest.approx(16 / 22)
    assert [one.form for one in facts[Candidates].layers["2"] if one.cost.seconds > 10.0] == []  # another budget knows


def test_prices_that_one_budget_corrected_hold_for_the_next(program, monkeypatch):
    pretend(monkeypatch, {"0": 1.7, "2": 1.0})
    first = rehearse.Rehearse().run(program.with_(budget=tdcompile.Budget(latency=0.7)))
    assert len(first.facts[Rehearsal].rounds) > 1
    plan = RankPlan(
        dict(first.facts[RankPlan].choices), first.facts[RankPlan].predicted, table().dense, selector="knapsack"
    )
    again = rehearse.Rehearse().run(first.with_(facts=first.facts.having(plan)))
    assert len(again.facts[Rehearsal].rounds) == 1


def test_a_price_that_was_wrong_is_corrected(program, monkeypatch):
    pretend(monkeypatch, {"0": 1.75, "2": 1.75})
    facts = rehearse.Rehearse().run(program).facts
    rounds = facts[Rehearsal].rounds
    assert rounds[0].predicted == pytest.approx(10.0)
    assert rounds[-1].predicted == pytest.approx(rounds[-1].measured, rel=0.02)
    plan = facts[RankPlan]
    assert plan.predicted.seconds / plan.dense.seconds == pytest.approx(rounds[-1].measured / 22)


def test_what_is_seen_of_a_form_in_one_layer_counts_for_it_in_the_others(program, monkeypatch):
    pretend(monkeypatch, {"0": 1.75, "2": 1.75})
    facts = program.facts.having(Importances({"0": 1.0, "2": 3.0}))  # it would rather keep the second one
    program = program.with_(budget=tdcompile.Budget(latency=0.75), facts=facts)
    rounds = rehearse.Rehearse().run(program).facts[Rehearsal].rounds
    assert rounds[0].predicted == pytest.approx(16.0, rel=1e-6)  # channel{8} for the first alone
    assert rounds[1].predicted == pytest.approx(rounds[1].measured, rel=1e-6)


def measured(monkeypatch, *shares):
    """The whole graph takes these shares of dense, one measurement after the other."""
    coming = iter(shares)

    def times(models, *rest, **options):
        return [Timing.of([t], [22.0]) for t in (22.0, 22.0 * next(coming))]

    monkeypatch.setattr(rehearse, "time_models", times)


def test_where_no_plan_keeps_to_the_budget_the_one_that_is_fastest_again_is_taken(program, monkeypatch):
    pretend(monkeypatch, {"0": 1.0, "2": 1.0})
    measured(monkeypatch, 0.7, 0.6, 0.65, 0.66, 0.64, 0.71)  # in order of the first time: 0.6, 0.65, 0.7
    facts = rehearse.Rehearse(rounds=3).run(program).facts
    assert facts[RankPlan].predicted.seconds == pytest.approx(0.64 * 22)


def test_a_plan_that_fitted_by_chance_is_found_out(program, monkeypatch):
    pretend(monkeypatch, {"0": 1.0, "2": 1.0})
    measured(monkeypatch, 0.7, 0.42, 0.45, 0.53, 0.49)  # far from what was predicted: none stands at once
    plan = rehearse.Rehearse(rounds=3).run(program).facts[RankPlan]
    assert plan.predicted.seconds == pytest.approx(0.49 * 22)


def test_without_a_latency_budget_nothing_is_measured(program):
    facts = rehearse.Rehearse().run(program.with_(budget=tdcompile.Budget(macs=0.5))).facts
    assert facts[Rehearsal].rounds == ()


def test_all_of_the_dense_latency_is_kept_by_the_dense_network_itself(program, monkeypatch):
    pretend(monkeypatch, {"0": 1.0, "2": 1.0})
    facts = rehearse.Rehearse().run(program.with_(budget=tdcompile.Budget(latency=1.0))).facts
    assert all(c.is_dense for c in facts[RankPlan].choices.values())
    assert facts[Rehearsal].rounds == ()


def confuse(monkeypatch, factor):
    """Profiles of plans, and of those alone, are off by a factor."""
    honest = rehearse.layer_seconds

    def confused(model, names, *rest):
        times = honest(model, names, *rest)
        return times if model == Path("dense.onnx") else {name: factor * value for name, value in times.items()}

    monkeypatch.setattr(rehearse, "layer_seconds", confused)


@pytest.mark.parametrize(("factor", "put_back"), [(0.001, ()), (0.5, ()), (30.0, ("0", "2"))])
def test_where_a_busy_machine_confuses_profiles_the_run_of_the_whole_graph_leads_to_the_budget(
    program, monkeypatch, factor, put_back
):
    pretend(monkeypatch, {"0": 1.5, "2": 1.5})
    confuse(monkeypatch, factor)
    facts = rehearse.Rehearse().run(program).facts
    plan, rounds = facts[RankPlan], facts[Rehearsal].rounds
    assert [(one.measured, one.put_back) for one in rounds] == [(14.0, put_back), (8.0, put_back)]
    assert {name: choice.ranks for name, choice in plan.choices.items()} == {"0": (4,), "2": (4,)}
    assert plan.predicted.seconds / plan.dense.seconds == pytest.approx(8 / 22)  # half was asked for


def glitches(monkeypatch, *slow):
    """Profiles of plans, counted from 1, in which the layer "2" takes ten times as long."""
    honest, profiles = rehearse.layer_seconds, []

    def glitched(model, names, *rest):
        times = honest(model, names, *rest)
        if model != Path("dense.onnx"):
            profiles.append(model)
            times["2"] *= 10.0 if len(profiles) in slow else 1.0
        return times

    monkeypatch.setattr(rehearse, "layer_seconds", glitched)


def test_a_layer_that_is_slower_in_one_profile_of_two_is_not_put_back(program, monkeypatch):
    pretend(monkeypatch, {"0": 1.0, "2": 1.0})
    glitches(monkeypatch, 1)
    facts = rehearse.Rehearse().run(program).facts
    assert [one.put_back for one in facts[Rehearsal].rounds] == [()]
    assert not any(choice.is_dense for choice in facts[RankPlan].choices.values())


@pytest.mark.parametrize("kept", [True, False])
def test_a_slower_layer_that_the_first_profile_missed_is_put_back_if_other_limits_allow(program, monkeypatch, kept):
    pretend(monkeypatch, {"0": 1.0, "2": 2.5})
    budget = tdcompile.Budget(latency=0.9, macs=0.95 if kept else 0.55)
    program = program.with_(budget=budget)
    honest = rehearse.confirmed_slower
    calls = []

    def missed(plan, times, again):
        calls.append(plan)
        return {} if len(calls) == 1 else honest(plan, times, again)

    monkeypatch.setattr(rehearse, "confirmed_slower", missed)
    monkeypatch.setattr(rehearse.Rehearse, "_again", lambda self, program, candidates, plan, aim: plan)
    facts = rehearse.Rehearse(rounds=1).run(program).facts
    first, *more = facts[Rehearsal].rounds
    assert (first.measured, first.put_back) == (16.0, ())
    if not kept:
        assert not more
        assert not facts[RankPlan].choices["2"].is_dense
        return
    (last,) = more
    assert (last.measured, last.put_back) == (16.0, ("2",))
    assert facts[RankPlan].choices["2"].is_dense
    assert facts[RankPlan].reasons["2"].code == "slower_in_graph"
    assert facts[RankPlan].predicted.seconds / facts[RankPlan].dense.seconds == pytest.approx(16 / 22)


def test_a_budget_below_all_prices_ends_at_the_fastest_plan(program, monkeypatch):
    pretend(monkeypatch, {"0": 1.0, "2": 1.0})
    program = program.with_(budget=tdcompile.Budget(latency=0.1))  # (2 + 2 + 2) / 22 = 0.273 is the least
    facts = rehearse.Rehearse().run(program).facts
    assert {choice.ranks for choice in facts[RankPlan].choices.values()} == {(4,)}
    assert [one.measured for one in facts[Rehearsal].rounds] == [6.0]
