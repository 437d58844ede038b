"""Rows of a layer's im2col matrix, and its outputs, at chosen output positions."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tdcompile.ir.layer import Layer


def positions(layer: Layer, most: int, generator: torch.Generator) -> Tensor:
    """Draw at most ``most`` flat indices into ``layer.out_extent``; return all in order if there are no more."""
    size = math.prod(layer.out_extent)
    return torch.arange(size) if size <= most else torch.randperm(size, generator=generator)[:most]


def patches_at(layer: Layer, x: Tensor, places: Tensor) -> Tensor:
    """Return the input patches at output positions, ``(N, places, C·K)`` in the order of ``weight.flatten(1)``.

    Args:
        x: the layer's input, ``(N, C, *spatial)``; for a linear layer ``(N, ..., C)``, with its first axes flattened or
            not.
        places: flat indices into ``layer.out_extent``.
    """
    if layer.kind == "linear":
        return x.reshape(-1, math.prod(layer.extent), x.shape[-1])[:, places]
    windows = _windows(layer, x)
    chosen = torch.unravel_index(places, windows.shape[1 : -1 - len(layer.kernel)])
    return _flat(layer, windows[(slice(None), *chosen)])  # type: ignore[index]  # a tensor for each axis


def spread_rows(layer: Layer, x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Return at most ``most`` rows of the im2col matrix of all samples, ``(rows, C·K)``.

    The rows are stratified: the matrix is cut into equal parts in the order of samples and positions, and one row is
    drawn from each. All samples thus give equally many rows, each at places of its own.

    Args:
        layer: its extent is not read, because a module that is called twice may get inputs of two sizes.
        x: the layer's input, ``(N, C, *spatial)`` or, for a linear layer, ``(..., C)``.
    """
    if layer.kind == "linear":
        x = x.reshape(-1, x.shape[-1])
        return x if len(x) <= most else x[_strata(len(x), most, generator)]
    windows = _windows(replace(layer, extent=tuple(x.shape[2:])), x)
    shape = windows.shape[: -1 - len(layer.kernel)]
    if math.prod(shape) <= most:
        return _flat(layer, windows).flatten(0, -2)
    return _flat(layer, windows[torch.unravel_index(_strata(math.prod(shape), most, generator), shape)])


def _strata(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw one index from each of ``count`` equal parts of ``range(size)``, in order."""
    offsets = torch.rand(count, dtype=torch.float64, generator=generator)
    return ((torch.arange(count) + offsets) * (size / count)).long().clamp_(max=size - 1)


def _windows(layer: Layer, x: Tensor) -> Tensor:
    """Return a view of all input patches of a convolution, ``(N, *extent, C, *kernel)``; see ``_flat``."""
    x = _spread(layer, x) if layer.transposed else _padded(layer, x)
    axes = len(layer.kernel)
    stride = (1,) * axes if layer.transposed else layer.stride
    for axis, (kernel, step, dilation) in enumerate(zip(layer.kernel, stride, layer.dilation, strict=True)):
        x = x.unfold(2 + axis, dilation * (kernel - 1) + 1, step)[..., ::dilation]
    return x.movedim(1, axes + 1)


def _flat(layer: Layer, windows: Tensor) -> Tensor:
    """Flatten patches to ``(..., C·K)``; a transposed convolution is one with its kernel reversed."""
    axes = len(layer.kernel)
    return (windows.flip(tuple(range(-axes, 0))) if layer.transposed else windows).flatten(-axes - 1)


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


def values_at(layer: Layer, y: Tensor, places: Tensor) -> Tensor:
    """Return the layer's output at the same positions, ``(N, places, T)``."""
    if layer.kind == "linear":
        return y.reshape(-1, math.prod(layer.extent), y.shape[-1])[:, places]
    return y.flatten(2)[:, :, places].movedim(1, 2)
