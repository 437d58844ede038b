"""The learning rate: a linear rise to the highest rate, then a cosine to zero."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdcompile.training.schedule import warmup_cosine


@settings(deadline=None)
@given(total=st.integers(2, 300), share=st.floats(0.0, 0.9))
def test_the_rate_rises_along_a_line_to_its_peak_and_falls_along_a_cosine_to_nothing(total: int, share: float) -> None:
    warm = min(round(share * total), total - 1)
    rates = [warmup_cosine(step, warm, total) for step in range(total + 1)]
    assert rates[0] == pytest.approx(1 / (warm + 1))
    assert rates[warm] == 1.0 == max(rates)
    assert rates[total] == pytest.approx(0.0, abs=1e-12)
    assert rates[:warm] == pytest.approx([(step + 1) / (warm + 1) for step in range(warm)])
    assert all(one > other for one, other in zip(rates[warm:], rates[warm + 1 :], strict=False))
    if (total - warm) % 2 == 0:
        assert rates[(total + warm) // 2] == pytest.approx(0.5)


@given(share=st.floats(0, 1), steps=st.integers(1, 300))
def test_the_rate_is_a_positive_share_at_every_step_that_is_made(share: float, steps: int) -> None:
    peak = round(share * steps)
    rates = [warmup_cosine(step, peak, steps) for step in range(steps)]
    assert all(0.0 < rate <= 1.0 for rate in rates)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
