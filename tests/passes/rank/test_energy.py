import pytest

from tdcompile.errors import BudgetError, InputError
from tdcompile.ir.target import Budget
from tdcompile.passes.rank.energy import Energy


def test_every_layer_keeps_the_energy_at_the_least_cost(table):
    candidates = table([0.3, 0.6, 1.2])
    plan = Energy(keep=0.9).select(candidates, {}, Budget(macs=1.0))
    for name, choice in plan.choices.items():
        assert 1 - choice.error**2 >= 0.9 - 1e-9
        cheaper = [o for o in candidates.layers[name] if o.cost.macs < choice.cost.macs]
        assert all(1 - o.error**2 < 0.9 for o in cheaper)


def test_an_error_exactly_at_the_bound_is_let_in(table):
    candidates = table([0.6])
    wanted = candidates.layers["layer0"][4]
    keep = 1 - wanted.error**2
    assert Energy(keep=keep).select(candidates, {}, Budget(macs=1.0)).choices["layer0"] == wanted


def test_a_layer_that_needs_more_than_dense_stays_dense(table):
    plan = Energy(keep=0.9999).select(table([0.01, 3.0]), {}, Budget(macs=1.0))
    assert plan.choices["layer0"].is_dense
    assert plan.reasons["layer0"].code == "dense_is_best"
    assert "saves" in plan.reasons["layer0"].text
    assert not plan.choices["layer1"].is_dense


def test_without_keep_the_most_that_the_budget_allows(table):
    candidates = table([0.3, 0.6, 1.2])
    plan = Energy().select(candidates, {}, Budget(macs=0.4))
    reached = min(1 - choice.error**2 for choice in plan.choices.values())
    assert plan.predicted.macs <= 0.4 * plan.dense.macs
    with pytest.raises(BudgetError):
        Energy(keep=reached + 0.001).select(candidates, {}, Budget(macs=0.4))


def test_a_given_keep_that_misses_the_budget_says_what_it_keeps(table):
    with pytest.raises(BudgetError, match=r"energy\{keep=0\.999\} gives no plan within macs=0\.2: .* keeps macs="):
        Energy(keep=0.999).select(table([0.3, 0.6]), {}, Budget(macs=0.2))


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.5])
def test_a_keep_that_is_no_share_is_refused(keep):
    with pytest.raises(InputError, match="keep"):
        Energy.from_options({"keep": str(keep)})
