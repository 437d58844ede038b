"""``Budget``, ``Cost`` and ``Target``: shares are checked, written and read back, and limit what they name."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdcompile.errors import InputError
from tdcompile.ir.target import LIMITED, Budget, Cost, Target, total

SHARES = st.floats(0, 1, exclude_min=True).filter(lambda x: x > 1e-6)
BUDGETS = st.dictionaries(st.sampled_from(sorted(LIMITED)), SHARES, min_size=1)


@given(BUDGETS)
def test_a_budget_is_read_from_its_parts_in_any_form(shares: dict[str, float]) -> None:
    parts = [f"{name}={share!r}" for name, share in shares.items()]
    assert Budget.parse(parts) == Budget.parse([",".join(parts)]) == Budget(**shares)
    assert Budget(**shares).shares == {name: shares[name] for name in LIMITED if name in shares}


@given(BUDGETS, st.builds(Cost, *[st.floats(1, 1e9)] * 4))
def test_limits_are_shares_of_the_dense_cost(shares: dict[str, float], dense: Cost) -> None:
    limits = Budget(**shares).limits(dense)
    assert limits == {LIMITED[name]: share * getattr(dense, LIMITED[name]) for name, share in shares.items()}


@given(st.sampled_from(sorted(LIMITED)), st.one_of(st.floats(max_value=0), st.floats(1, exclude_min=True)))
def test_a_share_outside_its_range_is_refused(name: str, share: float) -> None:
    with pytest.raises(InputError, match="share in"):
        Budget(**{name: share})


@pytest.mark.parametrize("text", ["nan", "inf", "-0.5", "0"])
def test_odd_numbers_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="share in"):
        Budget.parse([f"macs={text}"])


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (["latncy=0.5"], "did you mean 'latency'"),
        (["macs"], "not of the form"),
        (["macs=half"], "not of the form"),
        (["macs=0.5", "macs=0.4"], "given twice"),
        ([""], "limits ''"),
    ],
)
def test_a_malformed_budget_is_refused(parts: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Budget.parse(parts)


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="limits nothing"):
        Budget().limits(Cost(macs=1.0))


@given(st.lists(st.builds(Cost, *[st.integers(0, 10**6).map(float)] * 4), max_size=5))
def test_costs_add_up_by_field(costs: list[Cost]) -> None:
    whole = total(costs)
    for name in ("params", "macs", "bytes", "seconds"):
        assert getattr(whole, name) == math.fsum(getattr(cost, name) for cost in costs)
    assert whole - whole == Cost()


def test_the_grain_is_the_device_s_own_unless_one_is_asked_for() -> None:
    assert (Target("cpu").rank_grain, Target("cuda").rank_grain, Target("cuda", grain=3).rank_grain) == (16, 8, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "gpu"}, "device=gpu must be one of cpu, cuda"),
        ({"precision": "fp61"}, "did you mean 'fp16'?"),
        ({"threads": 0}, "threads=0 must be a whole number in [1, 1024]"),
        ({"threads": 5000}, "threads=5000 must be a whole number in [1, 1024]"),
        ({"threads": True}, "threads=true must be a whole number in [1, 1024]"),
        ({"batch": 0}, "batch=0 must be a whole number of at least 1"),
        ({"grain": -1}, "grain=-1 must be a whole number of at least 1 or none"),
    ],
)
def test_a_target_that_cannot_be_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        Target(**options)  # type: ignore[arg-type]
