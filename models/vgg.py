"""VGG-16 with batch norm (Simonyan and Zisserman, arXiv 1409.1556): the ImageNet form and the CIFAR form."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from tdcompile.core.network import Network
from tdcompile.support.options import Count

# Configuration D of the paper: widths of each stage's convolutions. A 2×2 max pool ends a stage.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
HIDDEN = 4096


def _features() -> nn.Sequential:
    """Return the 13 convolutions, with torchvision's module numbers."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in STAGES:
        for width in stage:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def _network(pooled: int, classifier: nn.Module) -> nn.Module:
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            features=_features(),
            avgpool=nn.AdaptiveAvgPool2d(pooled),
            flatten=nn.Flatten(),
            classifier=classifier,
        )
    ).eval()


@dataclass(frozen=True)
class VGG16(Network):
    """VGG-16 with batch norm for ImageNet, torchvision's vgg16_bn, 138.4 M parameters."""

    name: ClassVar[str] = "vgg16"
    input_shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((3, 224, 224),)
    num_classes: Count = 1000

    def build(self) -> nn.Module:
        """Return the network in eval mode, randomly initialised."""
        pooled = 7
        classifier = nn.Sequential(
            nn.Linear(STAGES[-1][-1] * pooled**2, HIDDEN),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(HIDDEN, self.num_classes),
        )
        return _network(pooled, classifier)


@dataclass(frozen=True)
class VGG16Cifar(Network):
    """VGG-16 with batch norm for CIFAR, with one linear layer, 14.7 M parameters."""

    name: ClassVar[str] = "vgg16_cifar"
    input_shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((3, 32, 32),)
    num_classes: Count = 10

    def build(self) -> nn.Module:
        """Return the network in eval mode, randomly initialised."""
        return _network(1, nn.Linear(STAGES[-1][-1], self.num_classes))
