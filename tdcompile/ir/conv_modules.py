"""Modules that torch lacks for layers: transposed convolutions with output channels first, and uneven padding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from tdcompile.ir.saved_classes import saved_as

if TYPE_CHECKING:
    from tdcompile.ir.layer import Layer, Pair

_TRANSPOSED = {
    1: nn.functional.conv_transpose1d,
    2: nn.functional.conv_transpose2d,
    3: nn.functional.conv_transpose3d,
}
_PAD = {"reflect": "reflect", "replicate": "replicate", "circular": "circular"}


@saved_as("transposed-conv", "tdcompile.layer:TransposedConv")
class TransposedConv(nn.Module):
    """A transposed convolution with its output channels first in the weight, ``(T, C / groups, *kernel)``.

    All other convolutions have that order, so decompositions need not tell them apart.

    Args:
        layer: the shape; ``extent`` is not read.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.kernel_size, self.stride, self.dilation = layer.kernel, layer.stride, layer.dilation
        self.padding, self.output_padding = tuple(before for before, _ in layer.padding), layer.output_padding
        self.weight = nn.Parameter(torch.empty(layer.weight_shape))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.empty(layer.out_channels)) if layer.bias else None)

    @classmethod
    def of(
        cls, module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d, known: dict[int, nn.Parameter]
    ) -> TransposedConv:
        """Convert torch's module; without groups the weight is a view of the same memory.

        Args:
            known: converted parameters by the id of the original, so that tied weights stay tied; new ones are added.
        """
        assert isinstance(module.padding, tuple)  # torch converts an int; a text is not allowed here
        made: TransposedConv = cls.__new__(cls)
        nn.Module.__init__(made)
        made.in_channels, made.out_channels, made.groups = module.in_channels, module.out_channels, module.groups
        made.kernel_size, made.stride, made.dilation = module.kernel_size, module.stride, module.dilation
        made.padding, made.output_padding = tuple(map(int, module.padding)), tuple(module.output_padding)
        weight = module.weight
        if id(weight) not in known:
            parts = weight.detach().reshape(module.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
            known[id(weight)] = nn.Parameter(parts, requires_grad=weight.requires_grad)
        made.weight = known[id(weight)]
        made.register_parameter("bias", module.bias)  # type: ignore[arg-type]  # a parameter, or None
        made.training = module.training
        return made

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``(N, C, *spatial)`` to ``(N, T, *spatial)``."""
        weight = self.weight.reshape(self.groups, -1, *self.weight.shape[1:]).transpose(1, 2).flatten(0, 1)
        return _TRANSPOSED[len(self.kernel_size)](
            *(input, weight, self.bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        )

    def extra_repr(self) -> str:
        """Return the channels, kernel and stride."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"


@saved_as("pad", "tdcompile.layer:Pad")
class Pad(nn.Module):
    """Padding that differs before and after an axis, which ``nn.Conv*`` does not support.

    Args:
        padding: ``(before, after)`` for each axis.
        mode: ``reflect``, ``replicate`` or ``circular``; any other pads with zeros.
    """

    def __init__(self, padding: tuple[Pair, ...], mode: str) -> None:
        super().__init__()
        self.amounts = [amount for pair in reversed(padding) for amount in pair]
        self.mode = _PAD.get(mode, "constant")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pad the last axes of ``(N, C, *spatial)``."""
        return nn.functional.pad(x, self.amounts, mode=self.mode)

    def extra_repr(self) -> str:
        """Return the amounts, in ``torch.nn.functional.pad``'s order."""
        return f"{self.amounts}, mode={self.mode}"


def uninitialised(kind: type[nn.Module], *arguments: object, **options: object) -> nn.Module:
    """Build a module without initialising its weights, so that no random state changes."""
    module: nn.Module = nn.utils.skip_init(kind, *arguments, **options)  # type: ignore[no-untyped-call]
    return module
