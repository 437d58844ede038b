"""``lwiq``: the layer that carries the classes is the important one, one pass does, and judging is on other samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.errors import InputError
from tdcompile.importance import Importance
from tdcompile.pipeline import Pipeline
from tdcompile.program import Program
from tdcompile.ranks import RankPlan
from tdcompile.registry import make
from tdcompile.task import Batch, Samples, Task


class Hidden(Samples):
    """Two classes told apart by the sign of the product of two channels: no linear map of the input tells them."""

    classes = 2

    def __init__(self, count: int = 600) -> None:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (count, 2), generator=generator) * 2.0 - 1
        self.y = (signs.prod(1) > 0).long()
        noise = 0.1 * torch.randn(count, 2, 6, 6, generator=generator)
        self.x = signs.view(-1, 2, 1, 1).expand(-1, -1, 6, 6) + noise
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: object) -> Batch:
        places = list(indices)  # type: ignore[call-overload]
        self.read += places
        return Batch((self.x[places],), self.y[places])


class Finder(nn.Module):
    """The first convolution mixes channels without telling the classes apart; the second one, behind it, does."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.find = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.act, self.relu, self.fc = nn.Identity(), nn.ReLU(), nn.Linear(8, 2)
        with torch.no_grad():
            for conv in (self.mix, self.find):
                conv.weight.zero_()
                conv.bias.zero_()
            for i, (a, b) in enumerate(((1, 1), (1, -1), (-1, 1), (-1, -1))):
                self.mix.weight[i, :, 1, 1] = torch.tensor([a, b])
                for copy in (i, i + 4):  # each behind a ReLU lights up for one combination of signs
                    self.find.weight[copy, i, 1, 1] = 1.0
                    self.find.bias[copy] = -1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.relu(self.find(self.act(self.mix(x)))).mean((2, 3)))


def program(train: Samples) -> Program:
    torch.manual_seed(0)
    made = tdcompile.trace(Finder().eval(), (torch.randn(2, 2, 6, 6),))
    return made.with_(task=Task(train, calibrate=200), budget=tdcompile.Budget(macs=0.6))


def test_the_layer_that_tells_the_classes_apart_is_the_important_one() -> None:
    scores = make(Importance, "lwiq").score(program(Hidden()))
    assert scores["find"] > 3 * scores["mix"]
    assert scores["find"] > 3 * scores["fc"]


def test_accuracy_is_of_samples_that_were_not_imprinted_and_each_is_read_once() -> None:
    samples = Hidden()
    make(Importance, "lwiq{judged=0.5}").score(program(samples))
    assert len(samples.read) == 300
    assert len(set(samples.read)) == 300


def test_a_second_budget_costs_no_second_pass() -> None:
    given, passes = program(Hidden()), []
    given = Pipeline.parse("calibrate,score{by=lwiq},propose{decompose=tt+svd}").run(given)
    hook = given.graph.get_submodule("mix").register_forward_hook(lambda *_: passes.append(1))
    plans = [
        Pipeline.parse("choose{by=lwiq}").run(given.with_(budget=tdcompile.Budget(macs=share))).facts[RankPlan]
        for share in (0.95, 0.4)
    ]
    hook.remove()
    assert not passes
    assert plans[1].predicted.macs < plans[0].predicted.macs


def test_a_class_that_is_not_seen_is_told() -> None:
    samples = Hidden()
    samples.y = torch.zeros_like(samples.y)
    samples.y[0] = 1
    with pytest.raises(InputError, match="no sample of class 1"):
        make(Importance, "lwiq{samples=5}").score(program(samples))
