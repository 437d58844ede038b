"""Candidates are priced by the models that are asked for: counts by one, seconds by the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile import registry
from tdcompile.layer import Layer
from tdcompile.pipeline import Pipeline
from tdcompile.ranks import DENSE, Candidates
from tdcompile.target import Cost, CostModel, Target


@dataclass(frozen=True)
class PerWeight(CostModel):
    """Everything by the number of weights."""

    name: ClassVar[str] = ""
    params: float = 1.0
    macs: float = 1.0
    seconds: float = 1.0

    def price(self, layer: Layer, target: Target) -> Cost:
        """The same number three times."""
        size = float(torch.Size(layer.weight_shape).numel())
        return Cost(params=self.params * size, macs=self.macs * size, seconds=self.seconds * size)


@pytest.fixture
def priced() -> Iterator[None]:
    """A cost model for one test alone: what is defined is listed from then on."""
    PerWeight.name = "per-weight"
    registry.refresh()
    yield
    PerWeight.name = ""
    registry.refresh()


def candidates(budget: tdcompile.Budget) -> Candidates:
    network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 5)).eval()
    program = tdcompile.trace(network, (torch.randn(2, 4, 4, 4),)).with_(budget=budget)
    pipeline = Pipeline.parse("propose{cost=per-weight{macs=7},timer=per-weight{macs=99,seconds=3}}")
    return pipeline.run(program).facts[Candidates]


@pytest.mark.usefixtures("priced")
def test_counts_are_those_of_one_model_and_seconds_those_of_the_other() -> None:
    for budget, seconds in ((tdcompile.Budget(latency=0.5), 3), (tdcompile.Budget(macs=0.5), 1)):
        table = candidates(budget)
        for options in table.layers.values():
            assert options[0].decomposition == DENSE
            for option in options:
                assert (option.cost.macs, option.cost.seconds) == (7 * option.cost.params, seconds * option.cost.params)
