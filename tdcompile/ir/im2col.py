"""Rows of a layer's im2col matrix: one for each sample and output position; and the outputs at the same rows."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tdcompile.ir.layer import Layer


def draw_rows(layer: Layer, x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Draw rows of the im2col matrix of an input: at most ``most`` flat indices into ``(N, *out_extent)``, in order.

    They are stratified: the range is cut into equal parts, and one row is drawn from each. All samples thus give
    equally many rows, each at places of its own. All rows are returned if there are no more than ``most``.
    """
    count = x.numel() // x.shape[-1] if layer.kind == "linear" else len(x) * math.prod(_sized(layer, x).out_extent)
    if count <= most:
        return torch.arange(count)
    offsets = torch.rand(most, dtype=torch.float64, generator=generator)
    return ((torch.arange(most) + offsets) * (count / most)).long().clamp_(max=count - 1)


def patches_at(layer: Layer, x: Tensor, rows: Tensor) -> Tensor:
    """Return the input patches of rows of the im2col matrix, ``(rows, C·K)`` in the order of ``weight.flatten(1)``.

    Args:
        layer: its extent is not read, because a module that is called twice may get inputs of two sizes.
        x: the layer's input, ``(N, C, *spatial)`` or, for a linear layer, ``(..., C)``.
        rows: flat indices into ``(N, *out_extent)``.
    """
    if layer.kind == "linear":
        return x.reshape(-1, x.shape[-1])[rows]
    windows, axes = _windows(_sized(layer, x), x), len(layer.kernel)
    chosen = torch.unravel_index(rows, windows.shape[: 1 + axes])
    patches = windows[chosen]
    return (patches.flip(tuple(range(-axes, 0))) if layer.transposed else patches).flatten(1)


def values_at(layer: Layer, y: Tensor, rows: Tensor) -> Tensor:
    """Return the layer's output at the same rows, ``(rows, T)``."""
    if layer.kind == "linear":
        return y.reshape(-1, y.shape[-1])[rows]
    channels_last = y.movedim(1, -1)
    return channels_last[torch.unravel_index(rows, channels_last.shape[:-1])]


def _sized(layer: Layer, x: Tensor) -> Layer:
    """Return a convolution with the extent of its input."""
    return replace(layer, extent=tuple(x.shape[2:]))


def _windows(layer: Layer, x: Tensor) -> Tensor:
    """Return a view of all input patches of a convolution, ``(N, *out_extent, C, *kernel)``."""
    x = _spread(layer, x) if layer.transposed else _padded(layer, x)
    axes = len(layer.kernel)
    stride = (1,) * axes if layer.transposed else layer.stride
    for axis, (kernel, step, dilation) in enumerate(zip(layer.kernel, stride, layer.dilation, strict=True)):
        x = x.unfold(2 + axis, dilation * (kernel - 1) + 1, step)[..., ::dilation]
    return x.movedim(1, axes + 1)


def _padded(layer: Layer, x: Tensor) -> Tensor:
    amounts = [amount for pair in reversed(layer.padding) for amount in pair]
    return F.pad(x, amounts, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def _spread(layer: Layer, x: Tensor) -> Tensor:
    """Insert zeros so that the transposed convolution equals one of stride 1 with its kernel reversed."""
    extent = [(size - 1) * stride + 1 for size, stride in zip(layer.extent, layer.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *extent)
    spread[(..., *(slice(None, None, stride) for stride in layer.stride))] = x  # type: ignore[index]  # slices
    amounts: list[int] = []
    for (before, after), kernel, dilation, more in zip(
        *(layer.padding, layer.kernel, layer.dilation, layer.output_padding), strict=True
    ):
        reach = dilation * (kernel - 1)
        amounts = [reach - before, reach - after + more, *amounts]
    return F.pad(spread, amounts)
