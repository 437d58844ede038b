"""LeNet-5 (LeCun et al., Proc. IEEE 1998), in the form it is trained in today: ReLU and max pooling."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from tdcompile.core.network import Network
from tdcompile.support.options import Count


@dataclass(frozen=True)
class LeNet5(Network):
    """LeNet-5 for 28×28 grey images: two 5×5 convolutions and three linear layers, 61,706 parameters."""

    name: ClassVar[str] = "lenet5"
    input_shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((1, 28, 28),)
    num_classes: Count = 10

    def build(self) -> nn.Module:
        """Return the network in eval mode, randomly initialised."""
        # The first padding extends 28×28 to the paper's 32×32.
        return nn.Sequential(
            OrderedDict[str, nn.Module](
                conv1=nn.Conv2d(1, 6, 5, padding=2),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(6, 16, 5),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(16 * 5 * 5, 120),
                relu3=nn.ReLU(),
                fc2=nn.Linear(120, 84),
                relu4=nn.ReLU(),
                fc3=nn.Linear(84, self.num_classes),
            )
        ).eval()
