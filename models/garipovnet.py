"""GaripovNet, the network that introduced tensor-train convolutions (Garipov et al., arXiv 1611.03214).

The variant follows Schuurmans et al., arXiv 2305.05318, with whose figures ours are compared. Every convolution is
padded by 1, and the pools are not padded (32 → 15 → 7 → 1). The last convolution has neither batch norm nor ReLU.
It returns logits; theirs ends in a log-softmax.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from tdcompile.core.network import Network
from tdcompile.support.options import Count

# Widths of the six convolutions, and the numbers of those before a 3×3 max pool of stride 2.
WIDTHS = (64, 64, 128, 128, 128, 128)
POOLED = (2, 4)


@dataclass(frozen=True)
class GaripovNet(Network):
    """GaripovNet for CIFAR: six 3×3 convolutions of 64 to 128 channels and one linear layer."""

    name: ClassVar[str] = "garipovnet"
    input_shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((3, 32, 32),)
    num_classes: Count = 10

    def build(self) -> nn.Module:
        """Return the network in eval mode, randomly initialised."""
        parts = OrderedDict[str, nn.Module]()
        channels, last = 3, len(WIDTHS)
        for number, width in enumerate(WIDTHS, start=1):
            parts[f"conv{number}"] = nn.Conv2d(channels, width, 3, padding=1)
            if number < last:
                parts[f"bn{number}"] = nn.BatchNorm2d(width)
                parts[f"relu{number}"] = nn.ReLU()
            if number in POOLED:
                parts[f"pool{number}"] = nn.MaxPool2d(3, stride=2)
            channels = width
        parts["avgpool"] = nn.AvgPool2d(4)
        parts["flatten"] = nn.Flatten()
        parts["fc"] = nn.Linear(channels, self.num_classes)
        return nn.Sequential(parts).eval()
