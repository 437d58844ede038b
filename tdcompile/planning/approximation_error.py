"""The six approximation errors of a compressed layer: weights and features, each in three scalings."""

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
    """A difference in three scalings: its norm, divided by the norm of the original, divided by the element count."""

    absolute: float
    relative: float
    scaled: float


def weight_errors(weight: Tensor, approximation: Tensor) -> Scaled:
    """Return ‖W − W̃‖_F in three scalings, in float64 (arXiv 2305.05318, section 3.2).

    Args:
        weight: W, ``(T, C / groups, *kernel)``.
        approximation: W̃, of the same shape.
    """
    lost = float((weight.double() - approximation.double()).norm())
    whole = float(weight.double().norm())
    return Scaled(lost, lost / whole if whole > 0 else 0.0, lost / weight.numel())


@torch.no_grad()
def feature_errors(graph: nn.Module, site: Site, approximation: Tensor, batches: Iterable[Batch]) -> Scaled:
    """Return ‖F − F̃‖ of the layer's output F in three scalings, averaged over the inputs of the dense network.

    The layer is linear, so F − F̃ is the layer without bias at the weight W − W̃. F includes the bias. An output that
    is zero everywhere has no relative error and is left out of that mean (our completion).

    Args:
        graph: the dense network in eval mode, which contains the layer.
        site: the layer.
        approximation: W̃, of the shape of its weight.
        batches: calibration inputs, on the network's device.

    Raises:
        InputError: no input reaches the layer.
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
    """Return the norm of each sample, ``(N,)``, float64."""
    return x.flatten(1).double().square().sum(1).sqrt()
