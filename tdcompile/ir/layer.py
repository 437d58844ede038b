"""``Layer``: one convolution or linear layer as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from tdcompile.ir.conv_modules import Pad, TransposedConv, uninitialised

Pair = tuple[int, int]
LayerKind = Literal["conv", "linear"]
Ranks = tuple[int, ...]  # ranks of a decomposition of a layer
_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class Layer:
    """The shape of one layer and of its input, without weights.

    Attributes:
        in_channels, out_channels: C and T; for a linear layer the numbers of features.
        extent: for a convolution the spatial size of the input, ``(H, W)``. For a linear layer the sizes of the axes
            between batch and features, ``()`` for ``(N, C)``.
        kernel, stride, dilation: one number for each spatial axis; empty for a linear layer.
        padding: ``(before, after)`` for each spatial axis.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
        transposed: whether the convolution is transposed; its weight has the output channels first all the same.
        output_padding: for a transposed convolution one number for each spatial axis; otherwise empty.
    """

    kind: LayerKind
    in_channels: int
    out_channels: int
    extent: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[Pair, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    bias: bool = True
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def taps(self) -> int:
        """Return K, the number of kernel positions; 1 for a linear layer."""
        return math.prod(self.kernel)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Return ``(T, C / groups, *kernel)``."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def out_extent(self) -> tuple[int, ...]:
        """Return the spatial size of a convolution's output; for a linear layer ``extent``."""
        if self.kind == "linear":
            return self.extent
        if self.transposed:
            return tuple(
                (size - 1) * stride - before - after + dilation * (kernel - 1) + more + 1
                for size, (before, after), dilation, kernel, stride, more in zip(
                    *(self.extent, self.padding, self.dilation, self.kernel, self.stride, self.output_padding),
                    strict=True,
                )
            )
        return tuple(
            (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
            for size, (before, after), dilation, kernel, stride in zip(
                self.extent, self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )

    @property
    def params(self) -> int:
        """Count the weights and biases."""
        return math.prod(self.weight_shape) + (self.out_channels if self.bias else 0)

    @property
    def macs(self) -> int:
        """Count the multiply-accumulates for one sample, without the bias."""
        return math.prod(self.weight_shape) * math.prod(self.extent if self.transposed else self.out_extent)

    @property
    def depthwise(self) -> bool:
        """Return whether each group has one input channel."""
        return self.groups > 1 and self.groups == self.in_channels

    @property
    def pointwise(self) -> bool:
        """Return whether this is a linear layer or a convolution whose kernel has one tap."""
        return self.taps == 1

    def point(self) -> Layer:
        """Return the 1x1 layer with the same channels, input and bias, for the ends of a chain of factors."""
        ones = (1,) * len(self.kernel)
        return replace(
            self,
            kernel=ones,
            stride=ones,
            padding=((0, 0),) * len(ones),
            dilation=ones,
            padding_mode="zeros",
            transposed=False,
            output_padding=(),
        )

    def build(self) -> nn.Module:
        """Build a module of this shape with uninitialised weights.

        The module is an ``nn.Conv*``, ``nn.Linear`` or ``TransposedConv``, after a ``Pad`` if torch lacks the padding.
        ``owner(module)`` returns the part that has the weight.
        """
        if self.kind == "linear":
            return uninitialised(nn.Linear, self.in_channels, self.out_channels, bias=self.bias)
        if self.transposed:
            return TransposedConv(replace(self, extent=()))
        symmetric = all(before == after for before, after in self.padding)
        conv = uninitialised(
            _CONV[len(self.kernel)],
            self.in_channels,
            self.out_channels,
            self.kernel,
            stride=self.stride,
            padding=tuple(before for before, _ in self.padding) if symmetric else 0,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias,
            padding_mode=self.padding_mode if symmetric else "zeros",
        )
        return conv if symmetric else nn.Sequential(Pad(self.padding, self.padding_mode), conv)

    @staticmethod
    def of(module: nn.Module, extent: tuple[int, ...]) -> Layer | None:
        """Return the layer of a module, or None if it is neither a plain convolution nor a linear layer.

        Args:
            module: a part of the network.
            extent: the sizes of the input's axes other than batch and channels.
        """
        if isinstance(module, TransposedConv):
            return _transposed(module, extent)
        if type(module) is nn.Linear:
            return Layer("linear", module.in_features, module.out_features, extent, bias=module.bias is not None)
        if type(module) not in _CONV.values():
            return None
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)  # for mypy; the line above checks it
        return Layer(
            "conv",
            module.in_channels,
            module.out_channels,
            extent,
            kernel=module.kernel_size,
            stride=module.stride,
            padding=_padding(module),
            dilation=module.dilation,
            groups=module.groups,
            padding_mode=module.padding_mode,
            bias=module.bias is not None,
        )


def owner(module: nn.Module) -> nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear | TransposedConv:
    """Return the part of a built layer that holds its weight."""
    part = module[-1] if isinstance(module, nn.Sequential) else module
    assert isinstance(
        part, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear | TransposedConv
    )  # the kinds that ``Layer.build`` makes
    return part


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[Pair, ...]:
    """Return ``(before, after)`` for each axis; 'same' puts the odd element after, as PyTorch does."""
    if isinstance(module.padding, str):
        if module.padding == "valid":
            return ((0, 0),) * len(module.kernel_size)
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((amount, amount) for amount in module.padding)


def _transposed(module: TransposedConv, extent: tuple[int, ...]) -> Layer:
    return Layer(
        "conv",
        module.in_channels,
        module.out_channels,
        extent,
        kernel=module.kernel_size,
        stride=module.stride,
        padding=tuple((amount, amount) for amount in module.padding),
        dilation=module.dilation,
        groups=module.groups,
        bias=module.bias is not None,
        transposed=True,
        output_padding=module.output_padding,
    )
