"""Candidates and plans: what stays on the Pareto front, and that a plan survives its text."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdcompile.core.decomposition import Decomposition
from tdcompile.core.plan import DENSE, Candidate, Candidates, RankPlan, decompositions_of, dense_of, pareto, within
from tdcompile.core.registry import make
from tdcompile.errors import InputError
from tdcompile.ir.diagnostics import Reason
from tdcompile.ir.layer import Layer
from tdcompile.ir.target import Cost
from tdcompile.numerics.covariance import Identity

SVD = make(Decomposition, "svd")
FIGURES = st.integers(0, 4).map(float)
COSTS = st.builds(Cost, FIGURES, FIGURES, FIGURES, FIGURES)
FORMS = st.sampled_from([SVD, make(Decomposition, "tucker2")])
OPTIONS = st.builds(
    Candidate,
    st.sampled_from([SVD, make(Decomposition, "tucker2")]),
    st.tuples(st.integers(1, 9)),
    FIGURES,
    COSTS,
    st.just(("out",)),
)
TABLES = st.lists(OPTIONS, max_size=12, unique_by=lambda option: (option.form, option.ranks)).map(
    lambda rest: [Candidate.dense(Cost(5, 5, 5, 5)), *rest]
)
FIELDS = st.lists(st.sampled_from(["params", "macs", "seconds"]), min_size=1, max_size=3, unique=True)


def figures(option: Candidate, fields: list[str]) -> tuple[float, ...]:
    return (option.error, *(getattr(option.cost, name) for name in fields))


def beats(one: Candidate, other: Candidate, fields: list[str]) -> bool:
    return all(a <= b for a, b in zip(figures(one, fields), figures(other, fields), strict=True))


@given(TABLES, FIELDS)
def test_on_the_front_nobody_is_beaten_and_who_is_left_out_is(options: list[Candidate], fields: list[str]) -> None:
    kept = pareto(options, fields)
    assert kept[0] is options[0]
    assert all(any(option is other for other in options) for option in kept)
    for option in options:
        if any(option is one for one in kept):
            assert not any(
                beats(other, option, fields) for other in kept if other is not option and option is not kept[0]
            )
        else:
            assert any(beats(other, option, fields) for other in kept)


@given(TABLES, FIELDS, st.randoms())
def test_the_front_does_not_depend_on_the_order(options: list[Candidate], fields: list[str], random: object) -> None:
    shuffled = options[1:]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert pareto([options[0], *shuffled], fields) == pareto(options, fields)


PLANS = st.builds(
    RankPlan,
    st.dictionaries(st.text(min_size=1, max_size=6), OPTIONS, max_size=4),
    COSTS,
    COSTS,
    st.sampled_from(["", "energy{keep=0.9}"]),
    st.none() | st.floats(0, 1),
    st.dictionaries(st.text(max_size=3), st.builds(Reason, st.text(max_size=3), st.text())),
)


@given(PLANS)
def test_a_plan_survives_its_text(plan: RankPlan) -> None:
    assert RankPlan.from_json(plan.to_json()) == plan


def test_a_gap_without_a_bound_reads_back() -> None:
    plan = RankPlan.from_json('{"layers": {}, "gap": Infinity}')
    assert plan.gap == math.inf
    assert RankPlan.from_json(plan.to_json()).gap == math.inf


def test_a_plan_written_by_hand_needs_only_form_and_ranks() -> None:
    plan = RankPlan.from_json(json.dumps({"layers": {"conv": {"decomposition": "svd", "ranks": [4]}}}))
    assert plan.choices == {"conv": Candidate(SVD, (4,), 0.0, Cost())}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"layers": []}',
        '{"layers": {"a": null}}',
        '{"layers": {"a": {"decomposition": "svd", "ranks": [4], "error": NaN}}}',
        "[" * 100_000,
        '{"layers": {"a": {}}}',
        '{"layers": {"a": {"decomposition": "svd", "ranks": ["x"]}}}',
        '{"layers": {"a": {"decomposition": "svd", "ranks": 3}}}',
        '{"layers": {}, "dense": {"watts": 3}}',
        '{"layers": {"a": {"decomposition": 3, "ranks": []}}}',
        '{"layers": {}, "reasons": {"a": {"code": "small"}}}',
    ],
)
def test_what_is_no_plan_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match=r"mine is not a plan.*expected"):
        RankPlan.from_json(text, "mine")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"format": 2, "layers": {}}', "mine is a plan of format 2: this version reads 1"),
        ("[]", "mine is not a plan: it has no table 'layers'; expected"),
        ('{"layers": {"a": [3]}}', "mine is not a plan: the layer 'a' is no table: [3]; expected"),
        ('{"layers": {"a": {}, "a": {}}}', "mine is not a plan: 'a' is given twice; expected"),
        ('{"layers": {}', "mine is not a plan: it is not JSON: Expecting ',' delimiter: line 1 column 14"),
        ('{"layers": {}, "resons": {}}', "mine has a key 'resons' that no plan has: did you mean 'reasons'"),
        (
            '{"layers": {"a": {"decomposition": "svd", "rank": [3]}}}',
            "mine, layer 'a', has a key 'rank' that no plan has: did you mean 'ranks'",
        ),
    ],
)
def test_a_misspelt_key_or_another_format_is_named(text: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        RankPlan.from_json(text, "mine")


@given(COSTS, st.dictionaries(st.sampled_from(["params", "macs"]), FIGURES))
def test_within_is_every_limit(cost: Cost, limits: dict[str, float]) -> None:
    assert within(cost, limits) == all(getattr(cost, name) <= limit for name, limit in limits.items())


def test_a_table_prices_choices_and_leaves_the_rest_dense() -> None:
    dense, small = Candidate.dense(Cost(macs=8)), Candidate(SVD, (1,), 0.5, Cost(macs=3))
    table = Candidates({"a": (dense, small), "b": (dense,)}, rest=Cost(macs=1))
    assert table.dense.macs == 17
    assert table.cost({"a": small}).macs == 12


def test_dense_is_a_decomposition_that_loses_nothing_and_that_no_option_names() -> None:
    layer, weight = Layer("linear", 3, 2), torch.randn(2, 3)
    factors = DENSE.factorize(layer, weight, DENSE.exact_ranks(layer), Identity.of(weight))
    assert DENSE.refuse(layer) is None
    assert DENSE.rank_space(layer, 1) == [()]
    assert DENSE.blueprint(layer, ()) == (layer,)
    assert DENSE.reconstruct(layer, factors) is weight
    with pytest.raises(InputError, match="there is no decomposition 'dense'"):
        make(Decomposition, "dense")


def test_a_file_holds_decompositions_as_texts_with_their_options() -> None:
    form = make(Decomposition, "cp{correct=1.5}")
    plan = RankPlan({"a": Candidate(form, (2,)), "b": Candidate.dense(Cost(macs=1.0))})
    layers = json.loads(plan.to_json())["layers"]
    assert [layers[name]["decomposition"] for name in "ab"] == ["cp{correct=1.5}", "dense"]
    assert plan.choices["a"].form == "cp{correct=1.5}"
    assert RankPlan.from_json(plan.to_json()).choices["a"].decomposition == form


def test_an_unknown_decomposition_in_a_file_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match="there is no decomposition 'tuckr2': did you mean 'tucker2'"):
        RankPlan.from_json('{"layers": {"a": {"decomposition": "tuckr2", "ranks": [3]}}}')


def test_dense_is_found_wherever_it_stands() -> None:
    dense, small = Candidate.dense(Cost(macs=8.0)), Candidate(SVD, (1,), 0.5, Cost(macs=3.0))
    assert dense_of([small, dense]) is dense
    assert decompositions_of([small, dense]) == [small]
    assert pareto([small, dense], ["macs"]) == [dense, small]
    assert Candidates({"a": (small, dense)}, rest=Cost()).dense.macs == 8.0
