"""Errors of a rank space from bounds and a few factorisations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdcompile.passes.decompose._error_estimates import anchored, spread


@given(st.lists(st.floats(0.1, 10), max_size=30), st.floats(0, 100), st.integers(1, 6))
def test_anchors_keep_to_the_budget_or_to_the_least_number(costs: list[float], budget: float, least: int) -> None:
    chosen = spread(costs, budget, least)
    assert chosen == sorted(set(chosen))
    assert len(chosen) >= min(least, len(costs))
    assert len(chosen) <= max(least, 0) or sum(costs[i] for i in chosen) <= budget
    if least > 1 and costs:
        assert {chosen[0], chosen[-1]} == {0, len(costs) - 1}


def test_a_large_budget_takes_them_all() -> None:
    assert spread([1.0, 2.0, 3.0], 6.0, 1) == [0, 1, 2]
    assert spread([1.0, 2.0, 3.0], 5.9, 2) == [0, 2]


def test_errors_meet_the_truth_at_the_anchors_and_follow_the_bound_between() -> None:
    bounds = [0.9, 0.7, 0.5, 0.3, 0.1]
    asked: list[int] = []

    def truth(index: int) -> float:
        asked.append(index)
        return {0: 0.9, 2: 0.4}[index]

    found = anchored([10, 20, 30, 40, 50], bounds, [0, 2], truth)
    assert asked == [0, 2]
    assert found == pytest.approx([0.9, 0.7 * 0.9, 0.4, 0.3 * 0.8, 0.1 * 0.8])


def test_without_anchors_the_bounds_stand_and_a_bound_of_zero_is_true() -> None:
    assert anchored([1, 2], [0.5, 0.0], [], lambda _: 1.0) == [0.5, 0.0]
    assert anchored([1, 2], [0.5, 0.0], [0, 1], lambda _: 0.25) == [0.25, 0.0]
    assert anchored([], [], [], lambda _: 0.0) == []
