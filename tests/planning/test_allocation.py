import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdcompile.core.decomposition import Decomposition
from tdcompile.core.plan import Candidate, Candidates, pareto
from tdcompile.core.registry import make
from tdcompile.errors import BudgetError
from tdcompile.ir.target import Budget, Cost
from tdcompile.passes.rank.knapsack import Knapsack
from tdcompile.planning.allocation import first_fit, ladder, settle, within_error

SVD = make(Decomposition, "svd")
DENSE = Candidate.dense(Cost(params=10.0, macs=10.0))
figures = st.integers(0, 12).map(float)
options = st.lists(st.builds(lambda r, e, p, m: Candidate(SVD, (r,), e / 12, Cost(p, m)), figures, *[figures] * 3))


def beats(a, b):
    return a.error <= b.error and a.cost.params <= b.cost.params and a.cost.macs <= b.cost.macs


@given(options)
def test_pareto_keeps_dense_and_what_nothing_beats(alternatives):
    kept = pareto([DENSE, *alternatives], ["params", "macs"])
    assert kept[0] is DENSE
    assert not any(beats(DENSE, option) for option in kept[1:])
    assert not any(beats(a, b) for a in kept[1:] for b in kept[1:] if a is not b)
    assert all(any(beats(better, option) for better in kept) for option in alternatives)


@given(options, st.floats(0.0, 1.0))
def test_the_ladder_finds_the_cheapest_candidate_within_an_error(alternatives, error):
    rows = [DENSE, *alternatives]
    chosen = within_error({"l": ladder(rows, {"macs": 5.0})}, error)["l"]
    assert chosen.cost.macs == min([o.cost.macs for o in alternatives if o.error <= error] + [10.0])
    assert chosen is DENSE or chosen.error <= error


def step(macs):
    return {"l": Candidate(SVD, (int(macs),), 0.1, Cost(macs=macs))}


def test_the_first_level_that_fits_is_found_and_else_the_last():
    table = Candidates({"l": (DENSE,)}, Cost())
    levels = [9.0, 7.0, 5.0, 3.0]
    assert first_fit(step, levels, table, {"macs": 6.0}) == step(5.0)
    assert first_fit(step, levels, table, {"macs": 10.0}) == step(9.0)
    assert first_fit(step, levels, table, {"macs": 1.0}) == step(3.0)


def test_under_two_limits_a_level_between_is_found_where_the_last_fails():
    def plan(level):
        return {"l": Candidate(SVD, (), 0.1, Cost(params=10.0 - level, macs=level))}

    table = Candidates({"l": (DENSE,)}, Cost())
    assert first_fit(plan, [9.0, 6.0, 5.0, 1.0], table, {"macs": 7.0, "params": 7.0}) == plan(6.0)


def test_reasons_name_the_cheapest_alternative_and_what_it_saves():
    saving = Candidate(SVD, (4,), 0.41, Cost(params=10.0, macs=9.7))
    dear = Candidate(make(Decomposition, "tucker2"), (8, 4), 0.1, Cost(params=10.0, macs=10.8))
    table = Candidates({"a": (DENSE, saving, dear), "b": (DENSE, dear), "c": (DENSE,), "d": (DENSE, saving)}, Cost())
    choices = {"a": DENSE, "b": DENSE, "c": DENSE, "d": saving}
    plan = settle(Knapsack(), table, Budget(macs=1.0), choices)
    assert {name: reason.code for name, reason in plan.reasons.items()} == {
        "a": "dense_is_best",
        "b": "not_cheaper",
        "c": "not_cheaper",
    }
    assert "svd{4} saves 0.03 of its macs at error 0.41" in plan.reasons["a"].text
    assert "tucker2{8,4} costs 1.08 times its macs" in plan.reasons["b"].text


def test_the_least_share_is_rounded_up_so_that_it_can_be_met():
    third = Candidate(SVD, (1,), 0.1, Cost(params=10 / 3, macs=10 / 3))
    table = Candidates({"l": (DENSE, third)}, Cost())
    with pytest.raises(BudgetError, match=r"keeps 0\.334 of macs"):
        settle(Knapsack(), table, Budget(macs=0.3), {"l": third})
    settle(Knapsack(), table, Budget(macs=0.334), {"l": third})
