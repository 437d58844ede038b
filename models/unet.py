"""A small U-Net (Ronneberger et al., arXiv 1505.04597) with batch norm and padded convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tdcompile.core.network import Network
from tdcompile.ir.saved_classes import saved_as
from tdcompile.support.options import Count


@saved_as("unet", "tdcompile.models.unet:UNetModule")
class UNetModule(nn.Module):
    """Two levels down and up again; each level has two 3×3 convolutions.

    Args:
        width: channels of the first level; each level has twice as many.
        classes: number of classes.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.down1, self.down2 = _level(3, width), _level(width, 2 * width)
        self.bottom = _level(2 * width, 4 * width)
        self.pool = nn.MaxPool2d(2)
        self.up2 = nn.Upsample(scale_factor=2, mode="nearest")
        self.merge2 = _level(6 * width, 2 * width)
        self.up1 = nn.Upsample(scale_factor=2, mode="nearest")
        self.merge1 = _level(3 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, 3, H, W)``, H and W multiples of 4, to class scores ``(N, classes, H, W)``."""
        first = self.down1(x)
        second = self.down2(self.pool(first))
        y = self.bottom(self.pool(second))
        y = self.merge2(torch.cat((self.up2(y), second), 1))
        y = self.merge1(torch.cat((self.up1(y), first), 1))
        scores: Tensor = self.head(y)
        return scores


def _level(source: int, target: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inner in (source, target):
        layers += [nn.Conv2d(inner, target, 3, padding=1, bias=False), nn.BatchNorm2d(target), nn.ReLU()]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class UNet(Network):
    """A U-Net for scenes of digits (``--data scenes``): 48×48 colour images to 11 classes a pixel.

    Its weights are those of ``python -m tdcompile.models.train unet --data scenes --epochs 25 --lr 0.05 --batch 8``: an
    mIoU of 43.56 % on the test scenes.

    Attributes:
        width: channels of the first level.
        num_classes: classes of a pixel.
    """

    name: ClassVar[str] = "unet"
    input_shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((3, 48, 48),)
    checkpoint: ClassVar[str | None] = "unet.safetensors"
    data: ClassVar[str | None] = "scenes"
    width: Count = 32
    num_classes: Count = 11

    def build(self) -> nn.Module:
        """Return the network in eval mode, randomly initialised."""
        return UNetModule(self.width, self.num_classes).eval()
