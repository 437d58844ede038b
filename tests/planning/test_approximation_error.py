"""The six errors, against figures worked out by hand and against two whole layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tdcompile.data.task import Batch
from tdcompile.errors import InputError
from tdcompile.ir.program import sites_of
from tdcompile.planning.approximation_error import feature_errors, weight_errors


def batches(*inputs: Tensor) -> list[Batch]:
    return [Batch((x,), None) for x in inputs]


def test_weight_errors_by_hand() -> None:
    weight, other = torch.tensor([[3.0, 4.0], [0.0, 12.0]]), torch.tensor([[3.0, 4.0], [3.0, 8.0]])
    assert weight_errors(weight, other) == pytest.approx((5.0, 5 / 13, 5 / 4))
    assert weight_errors(weight, weight) == (0.0, 0.0, 0.0)
    assert weight_errors(torch.zeros(2, 2), torch.zeros(2, 2)) == (0.0, 0.0, 0.0)


def test_feature_errors_by_hand() -> None:
    net = nn.Sequential(nn.Linear(2, 1)).eval()
    net[0].weight.data, net[0].bias.data = torch.tensor([[2.0, 0.0]]), torch.tensor([1.0])
    x = torch.tensor([[1.0, 2.0], [-2.0, 1.0], [-0.5, 4.0]])
    site = sites_of(net, (x,))["0"]
    # F = 2 x0 + 1 = 3, -3, 0; at the weight (1, 1) it is short of x0 - x1 = -1, -3, -4.5; one element each
    found = feature_errors(net, site, torch.tensor([[1.0, 1.0]]), batches(x))
    assert found.absolute == pytest.approx((1 + 3 + 4.5) / 3)
    assert found.relative == pytest.approx((1 / 3 + 3 / 3) / 2)  # the third output is zero and has no relative error
    assert found.scaled == found.absolute


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), bias=False),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
        nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2),
    ],
)
def test_feature_errors_are_those_of_two_layers(layer: nn.Conv2d) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), layer).eval(), torch.randn(10, 3, 9, 8)
    other = layer.weight.detach() + 0.1 * torch.randn_like(layer.weight)
    found = feature_errors(net, sites_of(net, (x,))["2"], other, batches(x[:7], x[7:]))
    with torch.no_grad():
        whole = net(x)
        kept, layer.weight.data = layer.weight.data, other
        lost = (whole - net(x)).flatten(1).norm(dim=1)
        layer.weight.data = kept
    assert found.absolute == pytest.approx(float(lost.mean()), rel=1e-4)
    assert found.relative == pytest.approx(float((lost / whole.flatten(1).norm(dim=1)).mean()), rel=1e-4)
    assert found.scaled == pytest.approx(float(lost.mean()) / math.prod(whole.shape[1:]), rel=1e-4)


def test_a_layer_that_no_input_reaches_is_told() -> None:
    net = nn.Sequential(nn.Linear(2, 1)).eval()
    with pytest.raises(InputError, match="reached the layer '0'"):
        feature_errors(net, sites_of(net, (torch.ones(2, 2),))["0"], torch.ones(1, 2), [])
