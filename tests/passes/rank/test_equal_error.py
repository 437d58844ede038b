import pytest

from tdcompile.core.plan import within
from tdcompile.errors import BudgetError
from tdcompile.ir.target import Budget
from tdcompile.passes.rank.equal_error import EqualError


@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.8])
def test_the_bound_is_the_smallest_that_fits(table, share):
    candidates, budget = table([0.2, 0.5, 1.0, 2.0]), Budget(macs=share)
    plan = EqualError().select(candidates, {}, budget)
    bound = max(choice.error for choice in plan.choices.values())
    errors = sorted({o.error for options in candidates.layers.values() for o in options if o.error < bound})

    def cheapest(error):
        return {
            n: min((o for o in rows if o.error <= error), key=lambda o: o.cost.macs)
            for n, rows in candidates.layers.items()
        }

    limits = budget.limits(candidates.dense)
    assert within(plan.predicted, limits)
    assert not any(within(candidates.cost(cheapest(error)), limits) for error in errors)


def test_errors_are_near_each_other_and_ranks_are_not(table):
    plan = EqualError().select(table([0.2, 2.0]), {}, Budget(macs=0.5))
    easy, hard = plan.choices["layer1"], plan.choices["layer0"]
    assert hard.ranks > easy.ranks
    assert max(hard.error, easy.error) < 0.5


def test_a_loose_budget_takes_what_is_free_and_no_more(table):
    plan = EqualError().select(table([0.2, 0.5]), {}, Budget(macs=1.0))
    assert max(choice.error for choice in plan.choices.values()) == 0.0


def test_several_limits_hold_at_once(table):
    plan = EqualError().select(table([0.2, 0.5]), {}, Budget(macs=0.9, params=0.3, latency=0.8))
    assert plan.predicted.params <= 0.3 * plan.dense.params * (1 + 1e-9)


def test_an_impossible_budget_says_the_least_that_is_possible(table):
    with pytest.raises(BudgetError, match=r"no plan keeps params within 0\.05 of dense: the cheapest one keeps 0\.075"):
        EqualError().select(table([0.2, 0.5]), {}, Budget(params=0.05))
