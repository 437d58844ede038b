"""The next share of a search: within the bracket, at the loss that is expected, and found in few trials."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdcompile.planning.share_search import Trial, expected_loss, next_share

LOSSES = st.floats(1e-6, 1e3)
DROPS = st.floats(0.0, 100.0)


@given(LOSSES, LOSSES, DROPS, DROPS, st.floats(0.1, 10.0))
def test_the_expected_loss_lies_between_the_trials(good, more, drop, beyond, limit):
    one, other = Trial(good, min(drop, limit)), Trial(good + more, limit + 0.01 + beyond)
    assert one.loss <= expected_loss(one, other, limit) * (1 + 1e-9)
    assert expected_loss(one, other, limit) <= other.loss * (1 + 1e-9)
    assert 0 < expected_loss(Trial(0.0, 0.0), other, limit) < other.loss
    assert expected_loss(one, None, limit) > one.loss
    assert expected_loss(Trial(0.0, 0.0), None, limit) is None
    assert one.loss < expected_loss(one, Trial(other.loss, math.inf), limit) < other.loss


@given(st.floats(0.05, 0.5), st.floats(0.55, 1.0), st.none() | LOSSES)
def test_the_next_share_removes_part_of_the_bracket_whatever_is_expected(low, high, loss):
    share = next_share(low, high, loss, lambda at: 1 / at - 1)
    assert low + 0.09 * (high - low) <= share <= high - 0.09 * (high - low)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("limit", [0.3, 1.0, 5.0])
def test_the_share_at_the_limit_is_found_in_few_trials(power, limit):
    """Drops grow by a power of the predicted loss that the search does not know."""

    def loss_at(share):
        return (1 / share - 1) ** 3 + 0.01 * (1 - share)

    def drop_at(share):
        return 4.0 * loss_at(share) ** power

    low, high, good, bad = 0.1, 1.0, Trial(0.0, 0.0), None
    for _ in range(6):
        share = next_share(low, high, expected_loss(good, bad, limit), loss_at)
        trial = Trial(loss_at(share), drop_at(share))
        if trial.drop <= limit:
            good, high = trial, share
        else:
            bad, low = trial, share
    assert drop_at(high) <= limit
    assert drop_at(0.93 * high) > limit  # nothing much cheaper is within the limit
