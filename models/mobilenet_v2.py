"""MobileNetV2 (Sandler et al., arXiv 1801.04381), with torchvision's state-dict keys."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from tdcompile.core.network import Network
from tdcompile.ir.saved_classes import saved_as
from tdcompile.support.options import Count

STEM, HEAD = 32, 1280
# Table 2 of the paper: expansion, width, blocks, stride of the first block.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _conv(channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution, batch norm and ReLU6."""
    conv = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU6())


@saved_as("mobilenet-v2/inverted-residual", "tdcompile.models.mobilenet_v2:InvertedResidual")
class InvertedResidual(nn.Module):
    """A depthwise 3×3 convolution between a widening and a narrowing 1×1; the last has no activation."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        self.residual = stride == 1 and channels == width
        self.conv = nn.Sequential(
            *([] if expansion == 1 else [_conv(channels, hidden, 1)]),
            _conv(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels, H, W)`` to ``(N, width, H / stride, W / stride)``."""
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


@dataclass(frozen=True)
class MobileNetV2(Network):
    """MobileNetV2 for ImageNet at width 1.0, 3.5 M parameters."""

    name: ClassVar[str] = "mobilenet_v2"
    input_shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((3, 224, 224),)
    # First stage with the paper's stride; above 0, the stem and earlier stages have stride 1.
    halving: ClassVar[int] = 0
    num_classes: Count = 1000

    def build(self) -> nn.Module:
        """Return the network in eval mode, randomly initialised."""
        features: list[nn.Module] = [_conv(3, STEM, 3, stride=1 if self.halving else 2)]
        channels = STEM
        for stage, (expansion, width, blocks, first) in enumerate(STAGES):
            for block in range(blocks):
                stride = 1 if block or stage < self.halving else first
                features.append(InvertedResidual(channels, width, stride, expansion))
                channels = width
        features.append(_conv(channels, HEAD, 1))
        return nn.Sequential(
            OrderedDict[str, nn.Module](
                features=nn.Sequential(*features),
                avgpool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                classifier=nn.Sequential(nn.Dropout(0.2), nn.Linear(HEAD, self.num_classes)),
            )
        ).eval()


@dataclass(frozen=True)
class MobileNetV2Cifar(MobileNetV2):
    """MobileNetV2 for CIFAR, its stem and second stage without stride, 2.2 M parameters."""

    name: ClassVar[str] = "mobilenet_v2_cifar"
    input_shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((3, 32, 32),)
    halving: ClassVar[int] = 2
    num_classes: Count = 10
