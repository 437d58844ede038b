"""``Layer``: the arithmetic of shapes agrees with what PyTorch computes, for every padding there is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tdcompile.ir.layer import Layer, owner

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    axes = draw(st.integers(1, 3))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(axes))  # noqa: E731
    groups = draw(st.integers(1, 3))
    kernel, stride, dilation = each(1, 3), each(1, 2), each(1, 2)
    padding = draw(st.sampled_from(["same", "valid"])) if draw(st.booleans()) else each(0, 2)
    if padding == "same":
        stride = (1,) * axes
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    module = KINDS[axes](
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    x = torch.randn(2, module.in_channels, *each(5, 7))
    return module, x


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_a_convolution_as_a_layer_has_its_shapes_costs_and_values(case: tuple[nn.Module, torch.Tensor]) -> None:
    module, x = case
    layer = Layer.of(module, tuple(x.shape[2:]))
    assert layer is not None
    with FlopCounterMode(display=False) as counter:
        y = module(x)
    assert layer.out_extent == tuple(y.shape[2:])
    assert layer.params == sum(p.numel() for p in module.parameters())
    assert 2 * layer.macs * len(x) == counter.get_total_flops()
    built = layer.build()
    part = owner(built)
    assert tuple(part.weight.shape) == layer.weight_shape == tuple(module.weight.shape)
    part.load_state_dict(module.state_dict())
    torch.testing.assert_close(built(x), y)


@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(1, 4), max_size=2), st.booleans())
def test_a_linear_layer_has_its_costs_on_any_rank_of_input(c: int, t: int, axes: list[int], bias: bool) -> None:
    module = nn.Linear(c, t, bias=bias)
    layer = Layer.of(module, tuple(axes))
    assert layer is not None
    assert layer.pointwise
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(3, *axes, c))
    assert 2 * 3 * layer.macs == counter.get_total_flops()
    assert layer.params == sum(p.numel() for p in module.parameters())
    assert Layer.of(layer.build(), tuple(axes)) == layer


@pytest.mark.parametrize("module", [nn.ReLU(), nn.ConvTranspose2d(2, 2, 3), nn.LazyLinear(3), nn.BatchNorm2d(2)])
def test_what_is_no_plain_layer_is_none(module: nn.Module) -> None:
    assert Layer.of(module, (4, 4)) is None


def test_a_subclass_may_compute_something_else_and_is_none() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    assert Layer.of(Doubled(2, 2), ()) is None


@given(st.integers(1, 4), st.integers(1, 4))
def test_depthwise_is_one_input_channel_a_group(groups: int, each: int) -> None:
    assume(groups * each > 1)
    layer = Layer.of(nn.Conv2d(groups * each, groups * each, 3, groups=groups), (5, 5))
    assert layer is not None
    assert layer.depthwise == (groups > 1 and each == 1)
