"""The next budget to try in a search for the least cost within a loss of quality: see the pass ``search``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

# Bounds on what one trial may say about the next: by its drop a predicted loss grows at most by _GROWTH and at least by
# _STEP, and of two trials' losses neither weighs more than _NEAR.
_GROWTH, _STEP, _NEAR = 8.0, 1.5, 0.8
_MARGIN = 0.1  # share of the bracket that each trial removes at least
_HALVINGS = 5  # each costs a choice of ranks; the bracket is known to 3 % then


class Trial(NamedTuple):
    """A plan that was built: its predicted loss, and the loss of quality that was measured."""

    loss: float
    drop: float


def expected_loss(good: Trial, bad: Trial | None, limit: float) -> float | None:
    """Return the predicted loss at which the drop is expected to reach its limit; None if the trials do not tell.

    The drop is taken as linear in the logarithm of the predicted loss.

    Args:
        good: the trial of most loss within the limit; a loss of 0 is the dense network's.
        bad: the trial of least loss beyond it, if there is one.
        limit: of the drop.
    """
    if bad is None:
        return good.loss * _within(_ratio(limit, good.drop), _STEP, _GROWTH) if good.loss > 0 else None
    if good.loss <= 0:
        return bad.loss * _within(_ratio(limit, bad.drop), 1 / _GROWTH, 1 / _STEP)
    place = _within((limit - good.drop) / max(bad.drop - good.drop, 1e-12), 1 - _NEAR, _NEAR)
    return float(good.loss ** (1 - place) * bad.loss**place)


def next_share(low: float, high: float, loss: float | None, loss_at: Callable[[float], float]) -> float:
    """Return the share of the dense cost, between two, whose plan has a predicted loss; the middle without one.

    Args:
        low: a share that is too small.
        high: a share that is large enough.
        loss: see ``expected_loss``.
        loss_at: the predicted loss of the plan at a share, which falls with it.
    """
    if loss is None:
        return (low + high) / 2
    margin = _MARGIN * (high - low)
    least, most = low + margin, high - margin
    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        if loss_at(middle) > loss:
            least = middle
        else:
            most = middle
    return most


def _ratio(limit: float, drop: float) -> float:
    return limit / drop if drop > 0 else float("inf")


def _within(value: float, least: float, most: float) -> float:
    return min(max(value, least), most)
