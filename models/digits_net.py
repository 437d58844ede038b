"""Network of the quick start: small enough to ship with weights, large enough for a measurable speed-up."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from tdcompile.core.network import Network
from tdcompile.support.options import Count

# The widths of each stage's 3×3 convolutions, at 16×16 and at 8×8; a 2×2 max pool ends a stage.
STAGES = ((64, 64, 128, 128, 128, 128), (128, 128))


@dataclass(frozen=True)
class DigitsNet(Network):
    """A plain convolutional network for handwritten digits at 16×16, with the weights of the quick start."""

    name: ClassVar[str] = "digits_net"
    input_shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((1, 16, 16),)
    checkpoint: ClassVar[str | None] = "digits_net.safetensors"
    data: ClassVar[str | None] = "digits"
    num_classes: Count = 10

    def build(self) -> nn.Module:
        """Return the network in eval mode, randomly initialised."""
        layers: list[nn.Module] = []
        channels = self.input_shapes[0][0]
        for stage in STAGES:
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        return nn.Sequential(
            OrderedDict[str, nn.Module](
                features=nn.Sequential(*layers),
                avgpool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(channels, self.num_classes),
            )
        ).eval()
