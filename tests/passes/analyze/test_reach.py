"""``reach``: an impossible budget is refused by one measured number before calibration; a possible one passes."""

import contextlib
from pathlib import Path

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.backend.session import Timing
from tdcompile.core.passes import Pass
from tdcompile.core.plan import Importances, RankPlan
from tdcompile.core.registry import make
from tdcompile.errors import BudgetError
from tdcompile.ir.measurements import Baseline, Reachable
from tdcompile.ir.target import Budget, Cost, Target
from tdcompile.passes.analyze import reach
from tdcompile.passes.analyze.choose import Choose
from tests.passes.analyze.test_rehearse import table


@pytest.fixture
def program():
    network = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)).eval()
    program = tdcompile.trace(network, (torch.randn(2, 16, 6, 6),))
    return program.with_(facts=program.facts.having(Baseline(Path("dense.onnx"), 22.0)))


@pytest.fixture
def graph(monkeypatch):
    """Layers of 10 s each and 2 s beside them; forms take what ``prices`` says, or another time inside the graph."""
    prices, inside, plans = {"channel": 4.0, "svd": 3.0}, {}, []

    def priced(program, found, spaces, models, precision):
        parts = {call: Cost(10, 10, 10, 10.0) for site in found.values() for call in site.calls}
        for name, forms in spaces.items():
            for form, space in forms.items():
                chain = reach.chain_of(found[name], form, space[0])
                parts |= {part: Cost(1, 1, 1, prices.get(form.name, 50.0) / len(chain)) for part in chain}
        return dict.fromkeys(found, parts)

    def took(choices):
        return {n: 10.0 if c.is_dense else inside.get(c.form, c.cost.seconds) for n, c in choices.items()}

    @contextlib.contextmanager
    def written(program, choices, dense, precision):
        plans.append(choices)
        yield Path("plan.onnx")

    def layers(model, names, *rest):
        return took(plans[-1]) if model == Path("plan.onnx") else dict.fromkeys(names, 10.0)

    def times(models, *rest, **options):
        return [Timing.of([22.0]), Timing.of([2.0 + sum(took(plans[-1]).values())], [22.0])]

    monkeypatch.setattr(reach, "prices_of", priced)
    monkeypatch.setattr(reach, "written", written)
    monkeypatch.setattr(reach, "layer_seconds", layers)
    monkeypatch.setattr(reach, "time_models", times)
    return prices, inside, plans


def run(program, share, **options):
    options = {"decompose": ("channel", "spatial"), **options}
    return reach.Reach(**options).run(program.with_(budget=Budget(latency=share))).facts[Reachable]


def test_a_budget_far_above_the_prices_is_not_measured(program, graph):
    _, _, plans = graph
    assert run(program, 0.95) == Reachable()  # channel: (2 + 4 + 4) / 22 = 0.45
    assert not plans


def test_prices_of_another_hour_do_not_pass_a_budget_that_is_out_of_reach(program, graph):
    prices, inside, _ = graph
    facts = program.facts.having(Baseline(Path("dense.onnx"), 3.0))  # layers cost more than the whole: a busy machine
    prices["channel"], inside["channel"] = 1.0, 4.0
    with pytest.raises(BudgetError, match=r"keeps 0\.455"):
        run(program.with_(facts=facts), 0.15)


def test_a_budget_near_the_prices_is_measured(program, graph):
    assert run(program, 0.5).latency == pytest.approx(10 / 22)
    assert run(program, 10 / 22 / 1.03).latency == pytest.approx(10 / 22)  # up to 4 % above a budget is kept


@pytest.mark.parametrize("share", [0.05, 0.2, 0.43])
def test_what_can_be_reached_is_one_number_whatever_was_asked_for(program, graph, share):
    _, _, plans = graph
    with pytest.raises(BudgetError, match=r"the cheapest one keeps 0\.455, .* by 4 %: ask for latency=0\.438 or more"):
        run(program, share)
    assert len(plans) == 1  # the measurement changes no choice
    assert run(program, 0.438).latency == pytest.approx(10 / 22)


def test_prices_that_the_graph_denies_are_corrected_before_a_budget_is_refused(program, graph):
    prices, inside, plans = graph
    prices["spatial"], inside["spatial"] = 3.5, 9.0
    assert run(program, 0.45).latency == pytest.approx(10 / 22)
    assert [{c.form for c in choices.values()} for choices in plans] == [{"spatial"}, {"channel"}]
    with pytest.raises(BudgetError, match=r"keeps 0\.91"):
        run(program, 0.3, rounds=1)


def test_int8_alone_is_within_reach_although_every_form_is_slower_there(program, graph):
    prices, inside, _ = graph
    prices["channel"], inside["channel"] = 8.0, 20.0
    facts = program.facts.having(Baseline(Path("dense.onnx"), 22.0, Path("int8.onnx"), 11.0))
    in_int8 = program.with_(facts=facts, target=Target(precision="int8"))
    assert run(in_int8, 0.5, decompose=("channel",)) == Reachable(0.5)
    with pytest.raises(BudgetError, match=r"the cheapest one keeps 0\.5,"):
        run(in_int8, 0.4, decompose=("channel",))


def test_a_precision_that_makes_the_network_slower_is_the_reason(program, graph):
    prices, inside, _ = graph
    prices["channel"], inside["channel"] = 8.0, 12.0
    facts = program.facts.having(Baseline(Path("dense.onnx"), 22.0, Path("int8.onnx"), 28.6))
    with pytest.raises(BudgetError, match=r"keeps 1, because int8 makes this network slower here: take --precision"):
        run(program.with_(facts=facts, target=Target(precision="int8")), 0.9, decompose=("channel",))


def test_a_network_without_a_faster_form_is_told_so(program, graph):
    prices, _, plans = graph
    prices["channel"] = 30.0
    with pytest.raises(BudgetError, match="keeps 1, because no layer has a faster form"):
        run(program, 0.5)
    assert not plans
    assert run(program, 1.0) == Reachable()


def test_counted_budgets_are_exact_and_agree_with_what_a_selector_says(program):
    with pytest.raises(BudgetError, match=r"no plan keeps macs within 0\.01 of dense") as early:
        make(Pass, "reach").run(program.with_(budget=Budget(macs=0.01)))
    with pytest.raises(BudgetError) as late:
        tdcompile.Pipeline.parse("calibrate,score,propose,choose").run(program.with_(budget=Budget(macs=0.01)))
    assert str(early.value) == str(late.value)
    assert make(Pass, "reach").run(program.with_(budget=Budget(macs=0.5))).facts[Reachable] == Reachable()


def test_a_measured_latency_within_reach_is_chosen_although_the_prices_deny_it(program):
    facts = program.facts.having(table(), Importances({}))  # the cheapest: (2 + 2 + 2) / 22 = 0.273
    program = program.with_(budget=Budget(latency=0.25), facts=facts)
    with pytest.raises(BudgetError, match=r"keeps 0\.273"):
        Choose().run(program)
    program = program.with_(facts=facts.having(Reachable(0.24)))
    plan = Choose().run(program).facts[RankPlan]
    assert {choice.ranks for choice in plan.choices.values()} == {(4,)}
