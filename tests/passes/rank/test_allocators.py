"""``lagrangian``, ``greedy`` and ``lwiq``: near the exact plan, for many layers, and led by importance."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdcompile.core.decomposition import Decomposition
from tdcompile.core.plan import Candidate, Candidates, RankPlan
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.registry import make
from tdcompile.errors import InputError
from tdcompile.ir.target import Budget, Cost
from tdcompile.planning.allocation import LOSSES


def table(layers: int, ranks: int, seed: int, form: str = "tt") -> Candidates:
    """Layers of random size whose singular values fall at random rates."""
    random, decomposition = np.random.default_rng(seed), make(Decomposition, form)
    made = {}
    for i in range(layers):
        size, decay = random.uniform(50, 500), random.uniform(0.05, 1.0)
        energies = np.exp(-decay * np.arange(ranks))
        tails = np.sqrt((1 - np.cumsum(energies) / energies.sum()).clip(0))
        rows = [
            Candidate(
                decomposition,
                (r,),
                float(tails[r - 1]),
                Cost(macs=1.2 * size * r / ranks, params=size * r / ranks),
            )
            for r in range(1, ranks + 1)
        ]
        made[f"l{i}"] = (Candidate.dense(Cost(macs=size, params=size)), *rows)
    return Candidates(made, Cost(macs=10.0, params=10.0))


def loss(plan: RankPlan) -> float:
    return sum(LOSSES["noise"](choice.error) for choice in plan.choices.values())


@pytest.mark.parametrize(("name", "gap"), [("lagrangian", 0.02), ("greedy", 0.02)])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), share=st.sampled_from([0.3, 0.5, 0.7]))
def test_plans_are_near_the_exact_ones(name: str, gap: float, seed: int, share: float) -> None:
    candidates, budget = table(30, 12, seed), Budget(macs=share)
    exact = loss(make(RankSelector, "knapsack").select(candidates, {}, budget))
    assert exact - 1e-9 <= loss(make(RankSelector, name).select(candidates, {}, budget)) <= exact * (1 + gap) + 1e-3


@pytest.mark.parametrize("name", ["lagrangian", "greedy", "lwiq"])
def test_thousands_of_layers_are_allocated(name: str) -> None:
    candidates = table(3000, 16, 0)
    plan = make(RankSelector, name).select(candidates, {}, Budget(macs=0.4))
    assert len(plan.choices) == 3000
    assert 0.399 < plan.predicted.macs / plan.dense.macs <= 0.4


@pytest.mark.parametrize("name", ["lagrangian", "greedy", "lwiq"])
def test_an_important_layer_keeps_more(name: str) -> None:
    candidates = table(8, 16, 1)
    same = {f"l{i}": candidates.layers["l0"] for i in range(8)}
    candidates = Candidates(same, candidates.rest)
    plan = make(RankSelector, name).select(candidates, {"l3": 25.0}, Budget(macs=0.4))
    others = [choice.error for layer, choice in plan.choices.items() if layer != "l3"]
    assert plan.choices["l3"].error < min(others)


@pytest.mark.parametrize("name", ["lagrangian", "greedy"])
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_an_importance_that_is_none_is_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match="at least 0"):
        make(RankSelector, name).select(table(3, 4, 0), {"l0": value}, Budget(macs=0.5))


def test_lwiq_scales_base_ranks_by_importance_to_the_power() -> None:
    same = {f"l{i}": table(1, 64, 3).layers["l0"] for i in range(4)}
    candidates = Candidates(same, Cost(macs=1.0, params=1.0))
    plan = make(RankSelector, "lwiq{fill=false}").select(
        candidates, {"l0": 4.0, "l1": 1.0, "l2": 1.0, "l3": 1.0}, Budget(macs=0.3)
    )
    ranks = {name: choice.ranks[0] for name, choice in plan.choices.items()}
    assert ranks["l0"] == pytest.approx(2 * ranks["l1"], abs=2)  # 4 ** 0.5
    assert ranks["l1"] == ranks["l2"] == ranks["l3"]


def test_lwiq_of_power_zero_treats_layers_alike_whatever_their_importance() -> None:
    same = {f"l{i}": table(1, 64, 3).layers["l0"] for i in range(4)}
    candidates, budget = Candidates(same, Cost(macs=1.0, params=1.0)), Budget(macs=0.3)
    scores = {"l0": 9.0, "l1": 4.0, "l2": 1.0, "l3": 0.1}
    alike = make(RankSelector, "lwiq{fill=false,power=0}")
    assert len({choice.ranks for choice in alike.select(candidates, scores, budget).choices.values()}) == 1
    ranks = [
        choice.ranks[0]
        for choice in make(RankSelector, "lwiq{fill=false}").select(candidates, scores, budget).choices.values()
    ]
    assert ranks == sorted(set(ranks), reverse=True)


@pytest.mark.parametrize(("error", "ranks"), [(0.3, (2, 10)), (0.05, (4, 8))])
def test_lwiq_takes_as_base_the_smallest_ranks_of_an_error(error: float, ranks: tuple[int, int]) -> None:
    falling = (0.5, 0.2, 0.1, 0.04, *(0.03 - 0.001 * i for i in range(12)))  # 0.3 at rank 2, 0.05 at rank 4
    late = (*(0.9 - 0.01 * i for i in range(7)), *(0.03 - 0.001 * i for i in range(9)))  # either at rank 8
    dense, train = Candidate.dense(Cost(macs=20.0)), make(Decomposition, "tt")
    layers = {
        name: (
            dense,
            *(Candidate(train, (r,), e, Cost(macs=r)) for r, e in enumerate(errors, start=1)),
        )
        for name, errors in (("falling", falling), ("late", late))
    }
    selector = make(RankSelector, f"lwiq{{fill=false,error={error}}}")
    plan = selector.select(Candidates(layers, Cost()), {}, Budget(macs=12 / 40))
    assert (plan.choices["falling"].ranks, plan.choices["late"].ranks) == ((ranks[0],), (ranks[1],))


def test_lwiq_prefers_the_tensor_train_and_takes_what_there_is() -> None:
    train, other = table(2, 8, 5), table(2, 8, 5, form="svd")
    both = Candidates({"a": (*train.layers["l0"], *other.layers["l0"][1:]), "b": other.layers["l1"]}, train.rest)
    plan = make(RankSelector, "lwiq{fill=false}").select(both, {}, Budget(macs=0.4))
    assert (plan.choices["a"].form, plan.choices["b"].form) == ("tt", "svd")


def test_the_reserve_of_lwiq_mends_a_small_layer_of_no_importance() -> None:
    layers = {f"l{i}": table(1, 64, 3).layers["l0"] for i in range(4)}
    (dense, *rest) = (
        Candidate(o.decomposition, o.ranks, o.error, Cost(macs=o.cost.macs / 500, params=o.cost.params / 500))
        for o in layers["l0"]
    )
    candidates = Candidates({**layers, "classifier": (dense, *rest)}, Cost(macs=1.0, params=1.0))
    scores, budget = {**dict.fromkeys(layers, 1.0), "classifier": 0.001}, Budget(macs=0.3)
    without, with_it = (
        make(RankSelector, text).select(candidates, scores, budget) for text in ("lwiq{fill=false}", "lwiq{power=1}")
    )
    assert without.choices["classifier"].error > 4 * with_it.choices["classifier"].error
    for plan in (without, with_it):
        assert 0.27 * plan.dense.macs < plan.predicted.macs <= 0.3 * plan.dense.macs


@pytest.mark.parametrize("text", ["lwiq{error=0}", "lwiq{error=1}", "lwiq{power=-1}", "lwiq{reserve=1}"])
def test_lwiq_options_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"lwiq: .* must be a (number in|finite number of at least 0|share in)"):
        make(RankSelector, text)
