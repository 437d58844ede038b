"""Training in bf16: which convolutions compute in fp32 all the same, and when."""

import math

import pytest
import torch
from torch import nn

from tdcompile.training.mixed_precision import bf16_speedup, strided_depthwise_in_fp32


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_only_strided_depthwise_convolutions_leave_bf16_and_only_while_it_lasts(precision):
    network = nn.Sequential(
        nn.Conv2d(4, 4, 3, stride=(2, 1), groups=4),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.Conv2d(4, 1, 1, stride=2),
        nn.Conv2d(1, 1, 1, stride=2),
    )
    x, kinds = torch.randn(2, 4, 24, 24), []
    for part in network:
        part.register_forward_hook(lambda module, arguments, output: kinds.append(output.dtype))
    wanted = network(x)
    kinds.clear()
    with (
        strided_depthwise_in_fp32(network, precision, x.device),
        torch.autocast("cpu", torch.bfloat16, precision == "bf16"),
    ):
        torch.testing.assert_close(network(x).float(), wanted, atol=0.05, rtol=0.05)
    half = torch.bfloat16 if precision == "bf16" else torch.float32
    assert kinds == [torch.float32, half, half, half, half]
    kinds.clear()
    with torch.autocast("cpu", torch.bfloat16):
        network(x)
    assert kinds == [torch.bfloat16] * 5


def test_the_gain_of_bf16_is_measured():
    gain = bf16_speedup("cpu")
    assert math.isfinite(gain)
    assert gain > 0
