"""The measurement of all models: a miss of the latency budget by little is measured again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.backend import export_and_measure
from tdcompile.backend.export_and_measure import settled_timings
from tdcompile.backend.session import Timing
from tdcompile.ir.target import Budget


def measured(monkeypatch: pytest.MonkeyPatch, budget: Budget, shares: list[float]) -> tuple[float, int]:
    """Return the share of the last model that counts, and the number of measurements, of which these are the shares."""
    program = tdcompile.trace(nn.Linear(4, 4), (torch.randn(2, 4),)).with_(budget=budget)
    left = iter(shares)

    def times(*given, **options):
        return [Timing.of([1.0]), Timing.of([next(left)], [1.0])]

    monkeypatch.setattr(export_and_measure, "time_models", times)
    timings = settled_timings(program, [Path("dense.onnx"), Path("model.onnx")], 1.0)
    return timings[-1].median, len(shares) - len(list(left))


@pytest.mark.parametrize(("shares", "counted"), [([0.53, 0.49, 0.5], 0.5), ([0.53, 0.54, 0.5], 0.53)])
def test_the_median_of_three_counts_after_a_near_miss(monkeypatch, shares, counted):
    assert measured(monkeypatch, Budget(latency=0.5), shares) == (counted, 3)


@pytest.mark.parametrize("share", [0.4, 0.519, 0.55])
def test_a_budget_that_is_met_or_far_away_is_measured_once(monkeypatch, share):
    assert measured(monkeypatch, Budget(latency=0.5), [share, 9.0, 9.0]) == (share, 1)


def test_nothing_is_measured_again_without_a_latency_budget(monkeypatch):
    assert measured(monkeypatch, Budget(macs=0.5), [0.9, 9.0, 9.0]) == (0.9, 1)
