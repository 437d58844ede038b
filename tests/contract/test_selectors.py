"""What every registered rank selector promises."""

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tdcompile.core.decomposition import Decomposition
from tdcompile.core.plan import Candidate, Candidates, RankPlan, Spectrum, within
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.registry import find, make
from tdcompile.errors import BudgetError, InputError
from tdcompile.ir.diagnostics import Reason
from tdcompile.ir.target import Budget, Cost

SELECTORS = sorted(find(RankSelector))
EXPECTED = {"uniform", "energy", "equal-error", "vbmf", "knapsack", "lagrangian", "greedy", "lwiq"}
SLOW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def layer(decay: float, size: float, full: int = 12) -> tuple[tuple[Candidate, ...], dict[str, Spectrum]]:
    energies = [math.exp(-decay * i) for i in range(full)]
    rows = [Candidate.dense(Cost(size, size, size, size * 1e-9))]
    for name, price, modes in (("tucker2", 1.1, ("out", "in")), ("svd", 1.6, ("out",)), ("cp", 0.9, ("",))):
        form = make(Decomposition, name)
        for r in range(1, full + 1):
            macs, error = price * size * r / full, math.sqrt(sum(energies[r:]) / sum(energies))
            rows.append(Candidate(form, (r,) * len(modes), error, Cost(macs, macs, macs, macs * 1.1e-9), modes))
    spectrum = Spectrum(tuple(math.sqrt(e) for e in energies), full, 9 * full)
    return tuple(rows), {"out": spectrum, "in": spectrum}


def table(decays: list[float], sizes: list[float]) -> Candidates:
    made = {f"l{i}": layer(decay, size) for i, (decay, size) in enumerate(zip(decays, sizes, strict=False))}
    kept = Candidate.dense(Cost(50.0, 50.0, 50.0, 5e-8))
    return Candidates(
        {**{name: rows for name, (rows, _) in made.items()}, "stem": (kept,)},
        Cost(5.0, 5.0, 5.0, 5e-9),
        {name: spectra for name, (_, spectra) in made.items()},
        {"stem": Reason("grouped", "grouped layers are left alone")},
    )


tables = st.builds(
    table,
    st.lists(st.floats(0.05, 3.0), min_size=1, max_size=6),
    st.lists(st.floats(50.0, 5000.0), min_size=6, max_size=6),
)
shares = st.dictionaries(st.sampled_from(["latency", "macs", "params"]), st.floats(0.05, 1.0), min_size=1)


def test_all_are_registered():
    assert set(SELECTORS) >= EXPECTED


@pytest.mark.parametrize("name", SELECTORS)
@SLOW
@given(candidates=tables, shares=shares)
def test_a_plan_covers_every_layer_within_the_budget_or_there_is_none(name, candidates, shares):
    budget, selector = Budget(**shares), make(RankSelector, name)
    try:
        plan = selector.select(candidates, {}, budget)
    except BudgetError:  # what it says is another test's matter
        return
    assert list(plan.choices) == list(candidates.layers)
    assert all(choice in candidates.layers[layer] for layer, choice in plan.choices.items())
    assert plan.predicted == candidates.cost(plan.choices)
    assert plan.dense == candidates.dense
    assert within(plan.predicted, budget.limits(plan.dense))
    left = {layer for layer, choice in plan.choices.items() if choice.is_dense}
    assert set(plan.reasons) == left
    assert all(reason.code and reason.text for reason in plan.reasons.values())
    assert plan.reasons["stem"] is candidates.reasons["stem"]


def least(candidates: Candidates, field: str, *forms: str) -> float:
    """The share of dense that is left where each layer takes the cheapest of some forms, or of all."""
    rows = [[o for o in options if not forms or o.form in forms] for options in candidates.layers.values()]
    kept = sum(
        min(getattr(o.cost, field) for o in options or candidates.layers[name][:1])
        for name, options in zip(candidates.layers, rows, strict=True)
    )
    return (getattr(candidates.rest, field) + kept) / getattr(candidates.dense, field)


@pytest.mark.parametrize("name", sorted(EXPECTED - {"vbmf"}))  # which has ranks of its own, whatever the budget
@SLOW
@given(
    candidates=tables,
    limited=st.sampled_from(["latency", "macs", "params"]),
    room=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
)
def test_a_budget_that_can_be_met_is_met(name, candidates, limited, room):
    forms = ("svd",) if name == "lwiq" else ()  # of these forms the only one that it takes
    share = least(candidates, {"latency": "seconds"}.get(limited, limited), *forms)
    budget = Budget(**{limited: min(1.001 * share + room * (1 - share), 1.0)})
    plan = make(RankSelector, name).select(candidates, {}, budget)
    assert within(plan.predicted, budget.limits(plan.dense))


@pytest.mark.parametrize("name", SELECTORS)
@SLOW
@given(candidates=tables, limited=st.sampled_from(["latency", "macs", "params"]))
def test_a_budget_of_all_is_met_and_a_layer_costs_no_more_than_dense(name, candidates, limited):
    plan = make(RankSelector, name).select(candidates, {}, Budget(**{limited: 1.0}))
    field = {"latency": "seconds"}.get(limited, limited)
    for layer_name, choice in plan.choices.items():
        assert getattr(choice.cost, field) <= getattr(candidates.layers[layer_name][0].cost, field)


@pytest.mark.parametrize("name", SELECTORS)
def test_the_same_table_in_another_order_gives_the_same_plan(name):
    candidates = table([0.2, 0.5, 1.0, 0.4], [100.0, 900.0, 400.0, 2000.0])
    shuffled = Candidates(
        {layer: (rows[0], *reversed(rows[1:])) for layer, rows in reversed(candidates.layers.items())},
        candidates.rest,
        candidates.spectra,
        candidates.reasons,
    )
    selector = make(RankSelector, name)
    first, second, third = (selector.select(c, {}, Budget(macs=0.9)) for c in (candidates, candidates, shuffled))
    assert first == second
    assert dict(first.choices) == dict(third.choices)


@pytest.mark.parametrize("name", SELECTORS)
def test_the_plan_names_its_selector_and_survives_its_text(name):
    plan = make(RankSelector, name).select(table([0.3, 0.9], [100.0, 300.0]), {}, Budget(params=0.9))
    assert make(RankSelector, plan.selector) == make(RankSelector, name)
    assert RankPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("name", SELECTORS)
def test_an_impossible_budget_names_the_least_share(name):
    with pytest.raises(BudgetError, match=r"no plan keeps macs within 0\.01 of dense: the cheapest one keeps 0\."):
        make(RankSelector, name).select(table([0.3], [100.0]), {}, Budget(macs=0.01))


@pytest.mark.parametrize("name", SELECTORS)
def test_a_limit_on_what_has_no_price_is_refused(name):
    rows = tuple(Candidate(o.decomposition, o.ranks, o.error, Cost(macs=o.cost.macs)) for o in layer(0.3, 100.0)[0])
    with pytest.raises(InputError, match="latency"):
        make(RankSelector, name).select(Candidates({"l": rows}, Cost()), {}, Budget(latency=0.5))


@pytest.mark.parametrize("name", SELECTORS)
def test_a_network_without_layers_has_an_empty_plan(name):
    plan = make(RankSelector, name).select(Candidates({}, Cost(macs=10.0)), {}, Budget(macs=1.0))
    assert not plan.choices
    assert plan.predicted == plan.dense


@pytest.mark.parametrize("name", SELECTORS)
def test_an_error_that_is_not_finite_is_never_chosen(name):
    rows, spectra = layer(0.3, 100.0)
    broken = tuple(Candidate(o.decomposition, o.ranks, math.nan, o.cost, o.modes) for o in rows[13:])
    candidates = Candidates({"l": (*rows[:13], *broken)}, Cost(), {"l": spectra})
    assert math.isfinite(make(RankSelector, name).select(candidates, {}, Budget(macs=0.9)).choices["l"].error)
