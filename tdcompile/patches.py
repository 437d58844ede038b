"""``patches_at``: rows of a layer's im2col matrix at chosen output positions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tdcompile.layer import Layer


def positions(layer: Layer, most: int, generator: torch.Generator) -> Tensor:
    """At most so many flat indices into ``layer.out_extent``, all of them where there are not more."""
    size = math.prod(layer.out_extent)
    return torch.arange(size) if size <= most else torch.randperm(size, generator=generator)[:most]


def patches_at(layer: Layer, x: Tensor, places: Tensor) -> Tensor:
    """What the layer sees at some output positions, ``(N, places, C·K)`` in the order of ``weight.flatten(1)``.

    Args:
        x: the layer's input, ``(N, C, *spatial)`` or, for a linear layer, ``(N, ..., C)``.
        places: flat indices into ``layer.out_extent``.
    """
    if layer.kind == "linear":
        return x.reshape(len(x), -1, x.shape[-1])[:, places]
    amounts = [amount for pair in reversed(layer.padding) for amount in pair]
    x = F.pad(x, amounts, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    for axis, (kernel, stride, dilation) in enumerate(zip(layer.kernel, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    axes = len(layer.kernel)
    chosen = torch.unravel_index(places, x.shape[2 : 2 + axes])
    x = x.movedim(1, axes + 1)  # (N, *extent, C, *kernel)
    return x[(slice(None), *chosen)].flatten(2)  # type: ignore[index]  # a tensor for each axis


def values_at(layer: Layer, y: Tensor, places: Tensor) -> Tensor:
    """The layer's output at the same positions, ``(N, places, T)``."""
    if layer.kind == "linear":
        return y.reshape(len(y), -1, y.shape[-1])[:, places]
    return y.flatten(2)[:, :, places].movedim(1, 2)
