"""The six approximation errors of a compressed layer: of its weights and of its features, in three scalings each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tdcompile.data.task import Batch
from tdcompile.errors import InputError
from tdcompile.ir.layer import owner
from tdcompile.ir.modules import input_of
from tdcompile.ir.program import Site


class Scaled(NamedTuple):
    """One difference in the three scalings: ‖·‖, ‖·‖ over the norm of the original, ‖·‖ over its element count."""

    absolute: float
    relative: float
    scaled: float


def weight_errors(weight: Tensor, approximation: Tensor) -> Scaled:
    """‖W − W̃‖_F as it is, over ‖W‖_F, and over the number of elements (arXiv 2305.05318, section 3.2), in float64.

    Args:
        weight: W, ``(T, C / groups, *kernel)``.
        approximation: W̃, of the same shape.
    """
    lost = float((weight.double() - approximation.double()).norm())
    whole = float(weight.double().norm())
    return Scaled(lost, lost / whole if whole > 0 else 0.0, lost / weight.numel())


@torch.no_grad()
def feature_errors(graph: nn.Module, site: Site, approximation: Tensor, batches: Iterable[Batch]) -> Scaled:
    """The same three of the layer's output F, its input that of the dense network, averaged over the inputs.

    The layer is linear, so F − F̃ is the layer without bias at the weight W − W̃. F itself has its bias. An output
    that is zero everywhere has no relative error and is left out of that mean (our completion).

    Args:
        graph: the dense network, in eval mode, that holds the layer.
        site: the layer.
        approximation: W̃, of the shape of its weight.
        batches: calibration inputs, on the network's device.

    Raises:
        InputError: none of the inputs reaches the layer.
    """
    difference = replace(site.layer, bias=False).build()
    owner(difference).weight = nn.Parameter(site.weight - approximation.to(site.weight), requires_grad=False)
    lost, whole, elements = [], [], []

    def tap(module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        lost.append(_norms(difference(input_of(arguments, named))))
        whole.append(_norms(output))
        elements.append(output[0].numel())

    hook = site.module.register_forward_hook(tap, with_kwargs=True)
    try:
        for batch in batches:
            graph(*batch.copies())
    finally:
        hook.remove()
    if not lost:
        raise InputError(f"no calibration data reached the layer '{site.name}'")
    each, norms = torch.cat(lost), torch.cat(whole)
    counts = torch.cat([norm.new_full(norm.shape, count) for norm, count in zip(lost, elements, strict=True)])
    seen = norms > 0
    relative = float((each[seen] / norms[seen]).mean()) if bool(seen.any()) else 0.0
    return Scaled(float(each.mean()), relative, float((each / counts).mean()))


def _norms(x: Tensor) -> Tensor:
    """The norm of each sample's part, ``(N,)``, float64."""
    return x.flatten(1).double().square().sum(1).sqrt()
