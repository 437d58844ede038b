"""``taylor``: what autograd says of each sample, to either order, whatever the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tdcompile.core.importance import Importance
from tdcompile.core.registry import make
from tdcompile.data.task import Task, Tensors
from tdcompile.frontend.tracing import trace
from tdcompile.ir.program import Program
from tdcompile.passes.importance._trial import trials


def small() -> tuple[nn.Sequential, Program]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8)).eval()
    x, labels = torch.randn(12, 12), torch.randint(8, (12,))
    return net, trace(net, (x[:2],)).with_(task=Task(train=Tensors(x, labels), calibrate=12))


@pytest.mark.parametrize("order", [1, 2])
def test_the_score_is_what_autograd_says_sample_by_sample(order: int) -> None:
    net, program = small()
    first, last = (net[place] for place in (0, 2))
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    tried, expected = trials(program, 0.5), {"0": 0.0, "2": 0.0}
    assert isinstance(program.task.train, Tensors)
    assert program.task.train.targets is not None
    for x, label in zip(program.task.train.inputs[0], program.task.train.targets, strict=True):
        hidden = first(x).detach().requires_grad_()
        out = last(net[1](hidden))
        gradients = torch.autograd.grad(F.cross_entropy(out[None], label[None]), (hidden, out))
        for name, layer, seen, g in (("0", first, x, gradients[0]), ("2", last, net[1](hidden), gradients[1])):
            moved = float(g @ F.linear(seen, tried[name].weight - layer.weight).detach())
            expected[name] += abs(moved) if order == 1 else moved**2 / 2
    ratio = (expected["0"] / tried["0"].error ** 2) / (expected["2"] / tried["2"].error ** 2)
    for batch in (5, 12):
        scores = make(Importance, f"taylor{{order={order},batch={batch}}}").score(program)
        assert scores["0"] / scores["2"] == pytest.approx(ratio, rel=1e-4)


def test_samples_are_as_many_as_asked_for() -> None:
    _, program = small()
    some, same = (make(Importance, text).score(program) for text in ("taylor{samples=4}", "taylor{samples=12}"))
    assert some != same
    assert same == make(Importance, "taylor").score(program)
