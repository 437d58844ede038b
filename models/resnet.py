"""Residual networks for ImageNet (He et al., arXiv 1512.03385), with torchvision's state-dict keys.

As in torchvision the bottleneck's stride sits in its 3×3 convolution ("v1.5"), not in the first 1×1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from tdcompile.core.network import Network
from tdcompile.ir.saved_classes import saved_as
from tdcompile.support.options import Count


@saved_as("resnet/basic-block", "tdcompile.models.resnet:BasicBlock")
class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut."""

    expansion: ClassVar[int] = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels, H, W)`` to ``(N, width, H / stride, W / stride)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


@saved_as("resnet/bottleneck", "tdcompile.models.resnet:Bottleneck")
class Bottleneck(nn.Module):
    """A 3×3 convolution between two 1×1, around a shortcut."""

    expansion: ClassVar[int] = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = _shortcut(channels, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels, H, W)`` to ``(N, 4 · width, H / stride, W / stride)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


@saved_as("resnet/res-net", "tdcompile.models.resnet:ResNet")
class ResNet(nn.Module):
    """A stem, four stages of 64 to 512, global average pooling, one linear layer.

    The stem is a 7×7 convolution and a max pool, each of stride 2, or, for small images, a 3×3 convolution.
    """

    def __init__(
        self, block: type[BasicBlock | Bottleneck], blocks: tuple[int, ...], num_classes: int, small: bool = False
    ) -> None:
        super().__init__()
        kernel, stride = (3, 1) if small else (7, 2)
        self.conv1 = nn.Conv2d(3, 64, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(block, 64, 64, blocks[0], stride=1)
        self.layer2 = _stage(block, 64 * block.expansion, 128, blocks[1], stride=2)
        self.layer3 = _stage(block, 128 * block.expansion, 256, blocks[2], stride=2)
        self.layer4 = _stage(block, 256 * block.expansion, 512, blocks[3], stride=2)
        self.fc = nn.Linear(512 * block.expansion, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, 3, H, W)`` to logits ``(N, num_classes)``."""
        out = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def _shortcut(channels: int, width: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and channels == width:
        return None
    return nn.Sequential(nn.Conv2d(channels, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))


def _stage(block: type[BasicBlock | Bottleneck], channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = block(channels, width, stride)
    return nn.Sequential(first, *(block(width * block.expansion, width, 1) for _ in range(1, blocks)))


@dataclass(frozen=True)
class _Family(Network):
    """Base of the depths."""

    block: ClassVar[type[BasicBlock | Bottleneck]]
    blocks: ClassVar[tuple[int, ...]]
    small: ClassVar[bool] = False
    input_shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((3, 224, 224),)
    num_classes: Count = 1000

    def build(self) -> nn.Module:
        """Return the network in eval mode, randomly initialised."""
        return ResNet(self.block, self.blocks, self.num_classes, self.small).eval()


@dataclass(frozen=True)
class ResNet18(_Family):
    """ResNet-18 for ImageNet, 11.7 M parameters."""

    name: ClassVar[str] = "resnet18"
    block: ClassVar[type[BasicBlock | Bottleneck]] = BasicBlock
    blocks: ClassVar[tuple[int, ...]] = (2, 2, 2, 2)


@dataclass(frozen=True)
class ResNet18Cifar(ResNet18):
    """ResNet-18 for CIFAR, with a 3×3 stem, 11.2 M parameters."""

    name: ClassVar[str] = "resnet18_cifar"
    small: ClassVar[bool] = True
    input_shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((3, 32, 32),)
    num_classes: Count = 10


@dataclass(frozen=True)
class ResNet34(_Family):
    """ResNet-34 for ImageNet, 21.8 M parameters."""

    name: ClassVar[str] = "resnet34"
    block: ClassVar[type[BasicBlock | Bottleneck]] = BasicBlock
    blocks: ClassVar[tuple[int, ...]] = (3, 4, 6, 3)


@dataclass(frozen=True)
class ResNet50(_Family):
    """ResNet-50 for ImageNet, 25.6 M parameters."""

    name: ClassVar[str] = "resnet50"
    block: ClassVar[type[BasicBlock | Bottleneck]] = Bottleneck
    blocks: ClassVar[tuple[int, ...]] = (3, 4, 6, 3)
