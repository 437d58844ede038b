"""A small network for super-resolution with a sub-pixel convolution (ESPCN, Shi et al., arXiv 1609.05158)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from tdcompile.core.network import Network
from tdcompile.support.options import Count


@dataclass(frozen=True)
class Espcn(Network):
    """Four convolutions at the low resolution, then a pixel shuffle to ``scale`` times the size, in colour.

    Attributes:
        width: channels of the inner convolutions.
        scale: factor of the size.
    """

    name: ClassVar[str] = "espcn"
    input_shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((3, 16, 16),)
    width: Count = 64
    scale: Count = 2

    def build(self) -> nn.Module:
        """Return the network in eval mode, randomly initialised."""
        return nn.Sequential(
            OrderedDict[str, nn.Module](
                conv1=nn.Conv2d(3, self.width, 5, padding=2),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(self.width, self.width, 3, padding=1),
                relu2=nn.ReLU(),
                conv3=nn.Conv2d(self.width, self.width, 3, padding=1),
                relu3=nn.ReLU(),
                conv4=nn.Conv2d(self.width, 3 * self.scale**2, 3, padding=1),
                shuffle=nn.PixelShuffle(self.scale),
            )
        ).eval()
