"""The CIFAR residual networks of He et al. 2016 (arXiv 1512.03385, section 4.2), whose shortcuts have no parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from tdcompile.core.network import Network
from tdcompile.ir.saved_classes import saved_as
from tdcompile.support.options import Count


@saved_as("cifar-resnet/shortcut", "tdcompile.models.cifar_resnet:Shortcut")
class Shortcut(nn.Module):
    """Parameter-free shortcut, option A of the paper: every second pixel, zero channels padded on both sides."""

    def __init__(self, added: int) -> None:
        super().__init__()
        self.before, self.after = added // 2, added - added // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, C + added, ceil(H / 2), ceil(W / 2))``."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


@saved_as("cifar-resnet/block", "tdcompile.models.cifar_resnet:Block")
class Block(nn.Module):
    """Two 3×3 convolutions around a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if stride == 1 else Shortcut(width - channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, width, H / stride, W / stride)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


@saved_as("cifar-resnet/cifar-res-net", "tdcompile.models.cifar_resnet:CifarResNet")
class CifarResNet(nn.Module):
    """A stem of 16 channels, three stages of 16, 32 and 64, global average pooling, one linear layer."""

    def __init__(self, blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, 3, H, W)`` to logits ``(N, num_classes)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def _stage(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(channels, width, stride)
    return nn.Sequential(first, *(Block(width, width, 1) for _ in range(1, blocks)))


@dataclass(frozen=True)
class _Family(Network):
    """Base of the depths: 6n + 2 layers for n blocks per stage."""

    depth: ClassVar[int]
    input_shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((3, 32, 32),)
    num_classes: Count = 10

    def build(self) -> nn.Module:
        """Return the network in eval mode, randomly initialised."""
        return CifarResNet((self.depth - 2) // 6, self.num_classes).eval()


@dataclass(frozen=True)
class ResNet20(_Family):
    """ResNet-20 for CIFAR, 0.27 M parameters."""

    name: ClassVar[str] = "resnet20"
    depth: ClassVar[int] = 20


@dataclass(frozen=True)
class ResNet32(_Family):
    """ResNet-32 for CIFAR, 0.46 M parameters."""

    name: ClassVar[str] = "resnet32"
    depth: ClassVar[int] = 32


@dataclass(frozen=True)
class ResNet44(_Family):
    """ResNet-44 for CIFAR, 0.66 M parameters."""

    name: ClassVar[str] = "resnet44"
    depth: ClassVar[int] = 44


@dataclass(frozen=True)
class ResNet56(_Family):
    """ResNet-56 for CIFAR, 0.85 M parameters."""

    name: ClassVar[str] = "resnet56"
    depth: ClassVar[int] = 56


@dataclass(frozen=True)
class ResNet110(_Family):
    """ResNet-110 for CIFAR, 1.7 M parameters."""

    name: ClassVar[str] = "resnet110"
    depth: ClassVar[int] = 110
