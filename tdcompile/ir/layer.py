"""``Layer``: one convolution or linear layer as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from tdcompile.ir.diagnostics import Reason, ReasonCode
from tdcompile.ir.saved_classes import saved_as

Pair = tuple[int, int]
_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {
    1: nn.functional.conv_transpose1d,
    2: nn.functional.conv_transpose2d,
    3: nn.functional.conv_transpose3d,
}
_PAD = {"reflect": "reflect", "replicate": "replicate", "circular": "circular"}


@dataclass(frozen=True)
class Layer:
    """One layer, without weights.

    Attributes:
        in_channels, out_channels: C and T; the features of a linear layer.
        extent: what the layer is applied over: the spatial size ``(H, W)`` of a convolution's input, or the sizes of
            the axes between batch and features of a linear layer's input, ``()`` for ``(N, C)``.
        kernel, stride, dilation: one figure for each spatial axis; empty for a linear layer.
        padding: ``(before, after)`` for each spatial axis.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
        transposed: a transposed convolution; its weight is kept as that of any other, output channels first.
        output_padding: of a transposed one, one figure for each spatial axis; else empty.
    """

    kind: Literal["conv", "linear"]
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
        """K, the number of kernel positions; 1 for a linear layer."""
        return math.prod(self.kernel)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``(T, C / groups, *kernel)``."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def out_extent(self) -> tuple[int, ...]:
        """The spatial size of the output (convolution), or ``extent`` itself (linear)."""
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
        """Weights and biases."""
        return math.prod(self.weight_shape) + (self.out_channels if self.bias else 0)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample; the bias is not counted."""
        return math.prod(self.weight_shape) * math.prod(self.extent if self.transposed else self.out_extent)

    @property
    def depthwise(self) -> bool:
        """One input channel for each group."""
        return self.groups > 1 and self.groups == self.in_channels

    @property
    def pointwise(self) -> bool:
        """A linear layer, or a convolution whose kernel has one tap."""
        return self.taps == 1

    def point(self) -> Layer:
        """A 1x1 layer of the same channels, input and bias: what stands before or after a convolution in a chain."""
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
        """A module of this shape with weights not yet set (``nn.Conv*`` or ``nn.Linear``, behind a pad where needed).

        ``owner(module)`` finds the part that has the weight.
        """
        if self.kind == "linear":
            return unset(nn.Linear, self.in_channels, self.out_channels, bias=self.bias)
        if self.transposed:
            return TransposedConv(replace(self, extent=()))
        symmetric = all(before == after for before, after in self.padding)
        conv = unset(
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
        """The layer that a module is, or None where it is neither a plain convolution nor a linear layer.

        Args:
            module: a part of the network.
            extent: the input's axes that are neither batch nor channels.
        """
        if isinstance(module, TransposedConv):
            return replace(module.layer, extent=extent)
        if type(module) is nn.Linear:
            return Layer("linear", module.in_features, module.out_features, extent, bias=module.bias is not None)
        if type(module) not in _CONV.values():
            return None
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)  # what the line above has established, for mypy
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


def in_groups(layer: Layer) -> Reason | None:
    """Why a form of one group does not apply to a layer in groups; None where it has one."""
    if layer.groups == 1:
        return None
    if layer.depthwise:
        reason = f"each of its {layer.groups} groups has one input channel: there is nothing to decompose"
        return Reason(ReasonCode.DEPTHWISE, reason)
    return Reason(ReasonCode.GROUPED, f"its {layer.groups} groups each see other channels; the form 'grouped' fits it")


@saved_as("transposed-conv", "tdcompile.layer:TransposedConv")
class TransposedConv(nn.Module):
    """A transposed convolution whose weight is ``(T, C / groups, *kernel)``, output channels first, like all others'.

    Args:
        layer: what it is; its ``extent`` is not read.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.kernel_size, self.stride, self.dilation = layer.kernel, layer.stride, layer.dilation
        self.padding, self.output_padding = tuple(before for before, _ in layer.padding), layer.output_padding
        self.weight = nn.Parameter(torch.empty(layer.weight_shape))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.empty(layer.out_channels)) if layer.bias else None)

    @property
    def layer(self) -> Layer:
        """What it is, without the size of its input."""
        return Layer(
            "conv",
            self.in_channels,
            self.out_channels,
            kernel=self.kernel_size,
            stride=self.stride,
            padding=tuple((amount, amount) for amount in self.padding),
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias is not None,
            transposed=True,
            output_padding=self.output_padding,
        )

    @classmethod
    def of(
        cls, module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d, known: dict[int, nn.Parameter]
    ) -> TransposedConv:
        """The same function as torch's own; without groups over the same memory.

        Args:
            known: the parameters made so far, by the identity of those they were made of: what is tied stays tied.
        """
        assert isinstance(module.padding, tuple)  # what torch makes of a figure, and all that it takes here
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
        """``(N, C, *spatial)`` to ``(N, T, *spatial)``."""
        weight = self.weight.reshape(self.groups, -1, *self.weight.shape[1:]).transpose(1, 2).flatten(0, 1)
        return _TRANSPOSED[len(self.kernel_size)](
            *(input, weight, self.bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        )

    def extra_repr(self) -> str:
        """The channels, kernel and stride."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"


@saved_as("pad", "tdcompile.layer:Pad")
class Pad(nn.Module):
    """Padding that differs before and after, for which ``nn.Conv*`` has no form; ``(before, after)`` for each axis."""

    def __init__(self, padding: tuple[Pair, ...], mode: str) -> None:
        super().__init__()
        self.amounts = [amount for pair in reversed(padding) for amount in pair]
        self.mode = _PAD.get(mode, "constant")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pad the last axes of ``(N, C, *spatial)``."""
        return nn.functional.pad(x, self.amounts, mode=self.mode)

    def extra_repr(self) -> str:
        """The amounts, in ``torch.nn.functional.pad``'s order."""
        return f"{self.amounts}, mode={self.mode}"


def unset(kind: type[nn.Module], *arguments: object, **options: object) -> nn.Module:
    """A module whose weights are allocated and not initialised, without touching any random state."""
    module: nn.Module = nn.utils.skip_init(kind, *arguments, **options)  # type: ignore[no-untyped-call]
    return module


def owner(module: nn.Module) -> nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear | TransposedConv:
    """The part of a built layer that holds its weight."""
    part = module[-1] if isinstance(module, nn.Sequential) else module
    assert isinstance(
        part, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear | TransposedConv
    )  # what ``Layer.build`` makes
    return part


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[Pair, ...]:
    """``(before, after)`` for each axis; 'same' puts the odd one after, as PyTorch does."""
    if isinstance(module.padding, str):
        if module.padding == "valid":
            return ((0, 0),) * len(module.kernel_size)
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((amount, amount) for amount in module.padding)
